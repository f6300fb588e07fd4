"""The TRL side of the DPO comparison: `DPOTrainer`, its reference a frozen copy that is forwarded every step, as is its default."""

from __future__ import annotations

from typing import Any

from .turns import Gate


def side(gate: Gate, options: dict[str, Any]) -> None:
    """Loads the trainer, then runs one optimizer step a turn."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from .callback_in_trl import Turns, plain_config
    from .inputs import read_records
    from .memory import PeakMemory, states_mib

    disable_progress_bars()
    memory = PeakMemory(options["device"])
    torch.manual_seed(options["seed"])
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    model, reference = (AutoModelForCausalLM.from_pretrained(options[name], dtype=options["dtype"]) for name in ("model", "reference"))
    config = DPOConfig(
        **plain_config(options),
        per_device_train_batch_size=options["batch_size"],
        max_length=options["max_length"],
        train_sampling_strategy="sequential",
    )
    data = Dataset.from_list(read_records(options["data"]))
    trainer = DPOTrainer(model, ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    seen = watch(trainer)

    def begin(message: dict[str, Any]) -> None:
        seen.update(loss=0.0, tokens=0, computed=0)
        memory.reset()

    def result(times: dict[str, float], logs: dict[str, float]) -> dict[str, Any]:
        return {**times, "peak_mib": memory.peak_mib(), "margin": float(logs["rewards/margins"]), **seen}

    trainer.add_callback(Turns(gate, begin, result))
    gate.ready(states_mib=states_mib(trainer.model, reference=True), imports_mib=memory.imports_mib, preparation_s=0.0)
    trainer.train()


def watch(trainer: Any) -> dict[str, float]:
    """Counts what each step computes: tokens of both sequences of every pair, tokens with padding, and the loss."""
    seen: dict[str, float] = {}
    original = trainer.compute_loss

    def compute_loss(model: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = batch["attention_mask"]
        seen["tokens"] += int(mask.sum())
        seen["computed"] += 2 * mask.numel()  # policy and reference
        loss = original(model, batch, *args, **kwargs)
        seen["loss"] += float((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss

    trainer.compute_loss = compute_loss
    return seen
