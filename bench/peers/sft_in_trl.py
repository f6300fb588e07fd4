"""The TRL side of the SFT comparison: `SFTTrainer` with its default collator, which pads a batch to its longest sequence."""

from __future__ import annotations

from typing import Any

from .turns import Gate


def side(gate: Gate, options: dict[str, Any]) -> None:
    """Loads the trainer, then runs one optimizer step a turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    from .callback_in_trl import Turns
    from .memory import PeakMemory, states_mib

    memory = PeakMemory(options["device"])
    torch.manual_seed(options["seed"])
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=options["dtype"])
    trainer = build(model, tokenizer, options)
    trainer.remove_callback(PrinterCallback)
    seen = watch(trainer)

    def begin(message: dict[str, Any]) -> None:
        seen.update(loss=0.0, tokens=0, scored=0, computed=0)
        memory.reset()

    def result(times: dict[str, float], logs: dict[str, float]) -> dict[str, Any]:
        return {**times, "peak_mib": memory.peak_mib(), "grad_norm": float(logs["grad_norm"]), **seen}

    trainer.add_callback(Turns(gate, begin, result))
    gate.ready(states_mib=states_mib(trainer.model, reference=False), imports_mib=memory.imports_mib)
    trainer.train()


def build(model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    """The trainer on the shared records, in their order, scoring completions only."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    from .callback_in_trl import plain_config
    from .inputs import read_records

    disable_progress_bars()
    config = SFTConfig(
        **plain_config(options),
        per_device_train_batch_size=options["batch_size"],
        max_length=options["max_length"],
        completion_only_loss=True,
        loss_type=options["loss"],
        packing=False,  # its padding-free packing needs flash-attn
        train_sampling_strategy="sequential",
    )
    return SFTTrainer(model, args=config, train_dataset=Dataset.from_list(read_records(options["data"])), processing_class=tokenizer)


def watch(trainer: Any) -> dict[str, float]:
    """Counts what each step computes: real tokens, scored tokens, tokens with padding, and the loss."""
    seen: dict[str, float] = {}
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        labels, mask = inputs["labels"], inputs["attention_mask"]
        seen["tokens"] += int(mask.sum())
        seen["scored"] += int((labels[:, 1:] != -100).sum())
        seen["computed"] += mask.numel()
        loss = original(model, inputs, *args, **kwargs)
        seen["loss"] += float((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss

    trainer.compute_loss = compute_loss
    return seen
