"""How a TRL trainer takes turns: it blocks at the start of a step and reports when the step is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from .turns import Gate


class Turns(TrainerCallback):
    """Times a step from the trainer's `on_step_begin` to its `on_step_end`: all of it but drawing the next batch and logging.

    Args:
        begin: called with the referee's message, before the step.
        result: called with the step's times (`Gate.elapsed`) and its logged numbers; what it returns is reported.
    """

    def __init__(
        self, gate: Gate, begin: Callable[[dict[str, Any]], None], result: Callable[[dict[str, float], dict[str, float]], dict[str, Any]]
    ):
        self.gate, self.begin, self.result = gate, begin, result
        self.times: dict[str, float] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin(self.gate.wait())

    def on_step_end(self, args, state, control, **kwargs):
        self.times = self.gate.elapsed()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:  # the trainer's closing summary has none
            self.gate.report(**self.result(self.times, logs))


def plain_config(options: dict[str, Any]) -> dict[str, Any]:
    """Trainer arguments that both comparisons share: one AdamW at a constant rate, no saving, no trackers, no recomputation."""
    return {
        "output_dir": options["output_dir"],
        "max_steps": options["max_steps"],
        "learning_rate": options["learning_rate"],
        "lr_scheduler_type": "constant",
        "bf16": options["dtype"] == "bfloat16",
        "use_cpu": options["device"] == "cpu",
        "gradient_checkpointing": False,  # TRL's default is True: slower, less memory
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": options["seed"],
    }
