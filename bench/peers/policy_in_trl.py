"""The TRL side of the policy comparison: a trainer's own advantages, reference, loss and gradient of completions that it is given."""

from __future__ import annotations

from itertools import chain
from typing import Any

from .policy_batch import MAX_COMPLETION_LENGTH, NUM_GENERATIONS, NUM_PROMPTS, Batch, Found


def load_states(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Weights of the policy, of the policy that sampled and of the reference."""
    import torch
    from transformers import AutoModelForCausalLM

    return {
        name: AutoModelForCausalLM.from_pretrained(options[name], dtype=torch.float32).state_dict()
        for name in ("model", "old", "reference")
    }


def measure(kind: str, theirs: dict[str, Any], batch: Batch, states: dict[str, Any], options: dict[str, Any], *, engine: bool) -> Found:
    """Loss, metrics, advantages and gradients of one batch under `GRPOTrainer`, `RLOOTrainer` or `GMPOTrainer` (grpo, rloo, gmpo).

    Args:
        engine: the sampled log-probs are not the old policy's but the reference's, as if an engine had other weights or rounding.
    """
    trainer = build(kind, theirs, batch, options)
    logprobs = None
    if engine:
        first = sampled(trainer, batch, states, "reference")
        pairs = zip(first["old_per_token_logps"], first["completion_mask"].bool(), strict=True)
        logprobs = [row[mask].tolist() for row, mask in pairs]
        trainer.use_vllm = True
    inputs = sampled(trainer, batch, states, "old", logprobs)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: float(values[-1]) for name, values in trainer._metrics["train"].items()}
    gradients = {name: p.grad.detach().clone() for name, p in trainer.model.named_parameters()}
    return Found(float(loss.detach()), metrics, inputs["advantages"].tolist(), gradients)


def build(kind: str, theirs: dict[str, Any], batch: Batch, options: dict[str, Any]) -> Any:
    """The trainer, whose whole batch is one micro-batch."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    from .callback_in_trl import plain_config

    disable_progress_bars()
    kinds = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer), "gmpo": (GMPOConfig, GMPOTrainer)}
    config_of, trainer_of = kinds[kind]
    config = config_of(
        **plain_config(options),
        per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
        num_generations=NUM_GENERATIONS,
        num_iterations=2,  # so that it takes the log-probs of the policy that sampled
        max_completion_length=MAX_COMPLETION_LENGTH,
        **theirs,
    )
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rewards = list(chain.from_iterable(batch.rewards))
    trainer = trainer_of(
        AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32),
        reward_funcs=lambda **_: rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "-"}] * NUM_PROMPTS),
        processing_class=tokenizer,
    )
    trainer.model.train()
    return trainer


def sampled(trainer: Any, batch: Batch, states: dict[str, Any], sampler: str, logprobs: Any = None) -> dict[str, Any]:
    """What the trainer makes of a rollout whose tokens are given: advantages, log-probs of the policy that sampled and of the reference.

    Args:
        logprobs: those that an engine reports.
    """
    prompts = [ids for ids in batch.prompts for _ in range(NUM_GENERATIONS)]
    completions = list(chain.from_iterable(batch.completions))
    trainer._tokenize_prompts = lambda _: (prompts, None, {})
    trainer._generate_single_turn = lambda *_: completions if "RLOO" in type(trainer).__name__ else (completions, logprobs)
    trainer.model.load_state_dict(states[sampler])
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(states["reference"])
    inputs = trainer._generate_and_score_completions([{"prompt": "-"}] * len(prompts))
    trainer.model.load_state_dict(states["model"])
    return inputs
