"""The TRL side of the distillation comparison: `GKDTrainer` on the given token ids, two forward passes an optimizer step."""

from __future__ import annotations

from typing import Any


def train(options: dict[str, Any]) -> list[dict[str, float]]:
    """Loss and gradient norm of each step, as the trainer logs them."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from .callback_in_trl import plain_config

    disable_progress_bars()
    torch.manual_seed(options["seed"])
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    student, teacher = (AutoModelForCausalLM.from_pretrained(options[name], dtype="float32") for name in ("model", "teacher"))
    config = GKDConfig(
        **plain_config(options),
        per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=2,
        lmbda=0.0,
        beta=options["beta"],
        train_sampling_strategy="sequential",
    )
    examples = Dataset.from_list(options["examples"])
    trainer = GKDTrainer(student, teacher, args=config, train_dataset=examples, processing_class=tokenizer, data_collator=padded)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [{name: float(row[name]) for name in ("loss", "grad_norm")} for row in trainer.state.log_history if "grad_norm" in row]


def padded(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch padded on the right; what is not scored, or is padding, has the label -100."""
    import torch

    width = max(len(e["input_ids"]) for e in examples)

    def rows(of: Any, fill: int) -> torch.Tensor:
        return torch.tensor([[*of(e), *[fill] * (width - len(e["input_ids"]))] for e in examples])

    return {
        "input_ids": rows(lambda e: e["input_ids"], 0),
        "attention_mask": rows(lambda e: [1] * len(e["input_ids"]), 0),
        "labels": rows(lambda e: [i if s else -100 for i, s in zip(e["input_ids"], e["scored"], strict=True)], -100),
    }
