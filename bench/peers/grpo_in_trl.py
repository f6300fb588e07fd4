"""The TRL side of the GRPO comparison: `GRPOTrainer`, transformers' `generate`, no vLLM."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from .turns import Gate


def side(gate: Gate, options: dict[str, Any]) -> None:
    """Loads the trainer, then runs one optimizer step a turn. The first turn is the warm-up."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOTrainer

    from .callback_in_trl import Turns
    from .memory import PeakMemory, states_mib

    memory = PeakMemory(options["device"])
    torch.manual_seed(options["seed"])
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=options["dtype"])
    trainer = build(GRPOTrainer, model, tokenizer, options)
    trainer.remove_callback(PrinterCallback)
    clock = Clock(trainer, memory, options["completion_tokens"])
    trainer.add_callback(Turns(gate, clock.begin, clock.result))
    gate.ready(states_mib=states_mib(trainer.model, reference=options["beta"] > 0), imports_mib=memory.imports_mib)
    trainer.train()


def build(trainer_type: Any, model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    """The trainer on the shared prompts, in their order, at the shared lengths."""
    from datasets import Dataset
    from trl import GRPOConfig

    from .callback_in_trl import plain_config
    from .inputs import read_records
    from .reward import checksum

    config = GRPOConfig(
        **plain_config(options),
        per_device_train_batch_size=options["trl_batch_size"],
        gradient_accumulation_steps=options["num_prompts"] * options["num_generations"] // options["trl_batch_size"],
        num_generations=options["num_generations"],
        max_completion_length=options["completion_tokens"],
        beta=options["beta"],
        loss_type="grpo",  # the mean of sequence means, as fastalign's `grpo`
        use_bias_correction_kl=False,  # the published k3 term, as fastalign's
        shuffle_dataset=False,
    )
    data = Dataset.from_list(read_records(options["data"]))
    trainer = trainer_type(model, reward_funcs=checksum, args=config, train_dataset=data, processing_class=tokenizer)
    never = len(tokenizer) + model.config.vocab_size  # no token has this id: every completion is as long as allowed
    trainer.eos_token_ids = [never]
    trainer.generation_kwargs["eos_token_id"] = trainer.generation_config.eos_token_id = never
    trainer.generation_config.pad_token_id = tokenizer.pad_token_id
    return trainer


class Clock:
    """Times the phases of a step by wrapping the trainer's own methods, and keeps what the other side checks against."""

    def __init__(self, trainer: Any, memory: Any, completion_tokens: int):
        self.trainer, self.memory, self.completion_tokens = trainer, memory, completion_tokens
        self.phases: dict[str, float] = defaultdict(float)
        self.rollout: dict[str, Any] = {}
        self.loss = 0.0
        self.wrap("_generate", self.around_generate)
        self.wrap("_calculate_rewards", self.around_rewards)
        self.wrap("_get_per_token_logps_and_entropies", self.around_logps)
        self.wrap("compute_loss", self.around_loss)

    def wrap(self, name: str, around: Any) -> None:
        original = getattr(self.trainer, name)
        setattr(self.trainer, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    def around_generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.timed("rollout", original, *args, **kwargs)
        self.rollout = {"prompt_ids": result[0], "completion_ids": result[1]}
        return result

    def around_rewards(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self.timed("reward", original, *args, **kwargs)

    def around_logps(self, original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is not self.trainer.ref_model:
            return original(model, *args, **kwargs)
        return self.timed("reference", original, model, *args, **kwargs)

    def around_loss(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        self.loss += float(loss.detach())
        return loss

    def timed(self, phase: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = original(*args, **kwargs)
        self.phases[phase] += time.perf_counter() - began
        return result

    def begin(self, message: dict[str, Any]) -> None:
        """Sets the step's completion length and forgets the step before."""
        tokens = message.get("completion_tokens", self.completion_tokens)
        self.trainer.generation_kwargs["max_new_tokens"] = self.trainer.generation_config.max_new_tokens = tokens
        self.phases.clear()
        self.loss = 0.0
        self.memory.reset()

    def result(self, times: dict[str, float], logs: dict[str, float]) -> dict[str, Any]:
        """The step's numbers; what is not one of the named phases is the update (forward, backward, optimizer)."""
        phases = dict(self.phases)
        phases["update"] = times["seconds"] - sum(phases.values())
        return {
            **times,
            "phases": phases,
            "peak_mib": self.memory.peak_mib(),
            "loss": self.loss,
            "grad_norm": float(logs["grad_norm"]),
            "kl": float(logs.get("kl", 0.0)),
            "completion_lengths": sorted({len(ids) for ids in self.rollout["completion_ids"]}),
            "rollout": self.rollout if self.trainer.state.global_step == 1 else None,
        }
