"""A GRPO batch through linear_loss: what groups without an advantage cost when there is no KL.

    python bench/bench_grpo_batch.py [--quick] [--dtype float32] [--clock cpu --threads 1]

"fastalign, 70 % without a signal": 7 groups of 10 have equal rewards, so their advantages are 0. `recipes.policy.build_chunks` leaves
them out before the forward; "…, in the head" shows what remains when they reach the head all the same (linear_loss then skips only
their gradient). "torch" is the full batch with its logits in memory. The floor is the GEMMs (forward, dL/dhidden, dL/dweight) of the
tokens that have an advantage. The target: at most 0.40 of "fastalign", the full batch; hidden states are given, as the body is no part
of the op (a skipped group does not pass it either).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.algorithms import resolve
from fastalign.ops.linear_loss import linear_loss
from fastalign.ops.policy_equations import clip
from fastalign.recipes.policy import build_chunks, group_advantages, micro_batch
from fastalign.rollout import Rollout, Sample

ROW = resolve("grpo", kl_coef=0.0)


def rollout(groups: int, length: int, vocab: int, dead: int) -> Rollout:
    """Groups of 8 completions; the first `dead` groups have equal rewards."""
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab) for _ in range(16)] for _ in range(groups)]
    samples = []
    for g in range(groups):
        ids = [[rng.randrange(vocab) for _ in range(length)] for _ in range(8)]
        rewards = [1.0 if g < dead else float(i % 2) for i in range(8)]
        samples.append([Sample(x, [-1.0] * length, [-1.0] * length, rewards={"r": r}) for x, r in zip(ids, rewards, strict=True)])
    return Rollout(prompts, samples)


def batch(groups, length, vocab, dead, *, everything=False):
    """(targets, objective, advantages [N]) of each micro-batch. everything: forward groups without an advantage too."""
    data = rollout(groups, length, vocab, dead)
    advantages = group_advantages(data, ROW, {"r": 1.0})
    kept = torch.full_like(advantages, 1.0) if everything else advantages
    chunks = build_chunks(data, kept, ROW, budget=length, max_tokens=1 << 30)
    for chunk in chunks:
        chunk.advantages = torch.repeat_interleave(advantages[kept != 0], length)
    return [(c.packed.targets, micro_batch(c, ROW).objective, c.advantages) for c in chunks]


def bench_grpo_batch(versus, device, quick, dtype):
    groups, length, vocab, width = (10, 8, 16000, 512) if quick else (10, 16, 151936, 896)
    tokens = groups * 8 * length
    hidden = torch.randn(tokens, width).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * width**-0.5).to(device, dtype).requires_grad_()
    main_grad = torch.zeros(vocab, width, device=device)  # as the trainer has it
    dead = groups * 7 // 10
    live = tokens * (groups - dead) // groups

    def step(batches):
        def run():
            hidden.grad, weight.main_grad = None, main_grad
            for targets, objective, _ in batches:
                linear_loss(hidden[: len(targets)], weight, targets.to(device), objective, return_entropy=True)[0].backward()
            del weight.main_grad

        return run

    def eager():
        hidden.grad = weight.grad = None
        targets, _, advantages = full[0]
        logp = (hidden @ weight.T).float().log_softmax(1).gather(1, targets.to(device)[:, None]).squeeze(1)
        clip(logp, logp.detach(), advantages, torch.tensor([0, tokens])).mean().backward()

    x, w = hidden.detach()[:live], weight.detach()
    logits, d_hidden, d_weight = torch.empty(live, vocab, dtype=dtype, device=device), torch.empty_like(x), torch.empty_like(w)

    def floor():
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=d_hidden)
        torch.mm(logits.t(), x, out=d_weight)

    full = batch(groups, length, vocab, 0)
    sides = {
        "fastalign": step(full),
        f"fastalign, {dead}0 % no signal": step(batch(groups, length, vocab, dead)),
        "fastalign, …, in the head": step(batch(groups, length, vocab, dead, everything=True)),
        "floor": floor,
    }
    if quick:
        sides["torch"] = eager
    found = versus("grpo batch", f"N={tokens} V={vocab} H={width}", dtype, sides, flop=6.0 * tokens * vocab * width, memory=False)
    whole, sparse = found["fastalign"].ms, found[f"fastalign, {dead}0 % no signal"].ms
    floor = f"; floor {found['floor'].ms / whole:.3f}" if "floor" in found else ""
    print(f"\ngrpo batch {dtype}: {sparse / whole:.3f} of the full batch (target 0.40){floor}")


if __name__ == "__main__":
    run_file(__file__)
