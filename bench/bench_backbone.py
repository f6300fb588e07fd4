"""PPO's four models on one backbone against models of their own, weights and time of a step: python -m bench.bench_backbone."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.bench_adapters import build
from fastalign.models.adapters import attach_lora
from fastalign.models.load import load_causal_lm
from fastalign.models.reward import load_reward_model, scores_at
from fastalign.models.shared import begin_scores, weights_bytes
from fastalign.packing import conversation, pack
from fastalign.recipes.arithmetic import build_tokenizer
from fastalign.recipes.reference import Reference
from fastalign.recipes.sft_task import micro_batches
from fastalign.training.optimizer import build_optimizer, build_schedule
from fastalign.training.scores import ScoreBatch
from fastalign.training.step import LogitOptions, Updater


@dataclass
class Models:
    """What a run holds."""

    policy: nn.Module
    critic: nn.Module
    judge: nn.Module


def shared(folder: str) -> Models:
    policy = attach_lora(load_causal_lm(folder))
    critic, judge = (begin_scores(policy, name, build_tokenizer()) for name in ("critic", "reward_0"))
    return Models(policy, critic, judge.requires_grad_(False))


def lora_apart(folder: str) -> Models:
    critic, judge = (load_reward_model(folder, build_tokenizer(), start=True) for _ in range(2))
    return Models(attach_lora(load_causal_lm(folder)), attach_lora(critic, task_type="SEQ_CLS"), judge.requires_grad_(False))


def whole_critic(folder: str) -> Models:
    critic, judge = (load_reward_model(folder, build_tokenizer(), start=True) for _ in range(2))
    return Models(attach_lora(load_causal_lm(folder)), critic, judge.requires_grad_(False))


def updater_of(model: nn.Module) -> Updater:
    optimizer = build_optimizer(model.train(), lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = build_schedule(optimizer, "constant", warmup_steps=0, max_steps=100)
    return Updater(model, optimizer, schedule, max_grad_norm=1.0, options=LogitOptions())


def step_of(models: Models, tokens: int) -> tuple[Callable[[], None], list[Updater]]:
    """What PPO does with sampled completions: rewards, reference, values, an update of the critic and one of the policy."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (tokens // 128, 128), generator=generator).tolist()
    trees = [conversation(row, [False] * 64 + [True] * 64) for row in ids]
    packed, batch = pack(trees), micro_batches(trees, tokens)
    updaters = [updater_of(models.policy), updater_of(models.critic)]
    reference = Reference(models.policy)

    def step() -> None:
        with torch.no_grad():
            scores_at(models.judge, packed, packed.rows)
            reference.score(packed)
            scores_at(models.critic, packed, packed.rows)
        updaters[1].update([ScoreBatch(packed, packed.rows, lambda values: (values - 1).square().mean())])
        updaters[0].update(batch)

    return step, updaters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, half of them scored")
    parser.add_argument("--rounds", type=int, default=5, help="steps a side, in turns; the median counts")
    parser.add_argument("--cpu_time", action="store_true", help="CPU time in place of the wall's, for a shared machine")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        build(bias=False).save_pretrained(folder)
        sides = {"one backbone": shared(folder), "LoRA critic of its own": lora_apart(folder), "whole critic": whole_critic(folder)}
    steps = {name: step_of(models, options.tokens) for name, models in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(options.rounds + 1):
        for name, (step, _) in steps.items():
            began = clock()
            step()
            if round_number:  # the first one warms up
                times[name].append(clock() - began)
    print(f"{'critic and reward model':24} {'weights, MiB':>13} {'gradients and moments, MiB':>27} {'step, ms':>9}")
    for name, models in sides.items():
        trained = sum(p.numel() for updater in steps[name][1] for p in updater.gradients.parameters)
        held = weights_bytes([models.policy, models.critic, models.judge])
        print(f"{name:24} {held / 2**20:13.1f} {12 * trained / 2**20:27.1f} {1e3 * statistics.median(times[name]):9.1f}")


if __name__ == "__main__":
    main()
