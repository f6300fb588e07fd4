"""One side of the integration's comparison: a TRL trainer as it is, or after `accelerate_trainer`."""

from __future__ import annotations

import hashlib
import time
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
    if options["accelerate"] is not None:
        from fastalign.integrations.trl import accelerate_trainer

        accelerate_trainer(trainer, **options["accelerate"])
    trainer.remove_callback(PrinterCallback)
    seen = watch_generation(trainer)

    def begin(message: dict[str, Any]) -> None:
        seen.update(generation=0.0, samples="")
        memory.reset()

    def result(times: dict[str, float], logs: dict[str, float]) -> dict[str, Any]:
        return {**times, **seen, "peak_mib": memory.peak_mib(), "logs": logs}

    trainer.add_callback(Turns(gate, begin, result))
    has_reference = getattr(trainer, "ref_model", None) is not None
    gate.ready(states_mib=states_mib(trainer.model, reference=has_reference), imports_mib=memory.imports_mib)
    trainer.train()


def build(model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    """The trainer of one method on the shared records, in their order, at its defaults but for the sizes."""
    import trl
    from datasets import Dataset, disable_progress_bars

    from .callback_in_trl import plain_config
    from .inputs import read_records
    from .reward import checksum

    disable_progress_bars()
    method = options["method"]
    config = plain_config(options) | {"per_device_train_batch_size": options["batch_size"], "num_train_epochs": 1}
    rewards: dict[str, Any] = {}
    if method == "GRPO":
        lengths = {"num_generations": options["num_generations"], "max_completion_length": options["completion_tokens"]}
        config |= lengths | {"beta": 0.04, "num_iterations": 2, "shuffle_dataset": False}
        rewards = {"reward_funcs": checksum}
    else:
        config |= {"max_length": options["max_length"], "train_sampling_strategy": "sequential"}
    return getattr(trl, method + "Trainer")(
        model,
        args=getattr(trl, method + "Config")(**config),
        train_dataset=Dataset.from_list(read_records(options["data"])),
        processing_class=tokenizer,
        **rewards,
    )


def watch_generation(trainer: Any) -> dict[str, Any]:
    """The seconds a step spends sampling, and a digest of what was sampled; nothing for methods that do not sample."""
    seen: dict[str, Any] = {}
    if not hasattr(trainer, "_generate"):
        return seen
    original = trainer._generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = original(*args, **kwargs)
        seen["generation"] += time.perf_counter() - began
        seen["samples"] += hashlib.sha256(repr(found[1]).encode()).hexdigest()[:12]
        return found

    trainer._generate = generate
    return seen
