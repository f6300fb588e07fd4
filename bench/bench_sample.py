"""Drawing one token a row from logits, against torch: softmax then multinomial, and the exponential race.

    python bench/bench_sample.py [--quick] [--rounds 5] [--dtype float32] [--clock wall|cpu] [--threads N]

The floor is one read of the logits (their maximum). "fastalign top-k 50 top-p 0.9" has torch's sort-based truncation as its torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.ops.sampling import sample


def case(device, quick, dtype):
    rows, vocab = (8, 32000) if quick else (32, 151936)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator) * 2).to(device, dtype)
    return logits, torch.rand(rows, generator=generator, dtype=torch.float64).to(device)


def columns(logits, *, top_k=0, top_p=1.0):
    rows, device = len(logits), logits.device
    values = (1.0, top_k, top_p, 0.0)
    return [torch.full((rows,), value, device=device) for value in values]


def bench_sample(versus, device, quick, dtype):
    logits, uniforms = case(device, quick, dtype)
    plain = columns(logits)

    def exponential_race():
        p = torch.softmax(logits.float(), -1)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    sides = {
        "fastalign": lambda: sample(logits, uniforms, *plain),
        "torch": lambda: torch.multinomial(torch.softmax(logits.float(), -1), 1),
        "exponential race": exponential_race,
        "floor": lambda: logits.amax(-1),
    }
    versus("sample", shape_of(logits), dtype, sides, bytes=float(logits.nbytes))


def bench_sample_truncated(versus, device, quick, dtype):
    logits, uniforms = case(device, quick, dtype)
    truncated = columns(logits, top_k=50, top_p=0.9)

    def sorted_truncation():
        ordered, index = torch.sort(logits.float(), -1, descending=True)
        p = torch.softmax(ordered[:, :50], -1)
        p = torch.where(p.cumsum(-1) - p < 0.9, p, 0.0)
        return index.gather(1, torch.multinomial(p, 1))

    sides = {
        "fastalign top-k 50 top-p 0.9": lambda: sample(logits, uniforms, *truncated),
        "torch": sorted_truncation,
        "floor": lambda: logits.amax(-1),
    }
    versus("sample, truncated", shape_of(logits), dtype, sides, bytes=float(logits.nbytes))


def shape_of(logits):
    return f"B={logits.shape[0]} V={logits.shape[1]}"


if __name__ == "__main__":
    run_file(__file__)
