"""The sampler: how often a drawn token is not the one that fp64 draws with the same uniform; plain torch sums its CDF in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from fastalign.ops.sampling import sample, sample_reference


@accuracy("sample")
def sample_tokens(at: At) -> Case:
    rows, vocab = (200, 500) if at.quick else (300, 32000)
    logits = at.randn(rows, vocab, scale=3.0)
    uniforms = torch.rand(rows, dtype=torch.float64, device=at.device)
    full = [torch.full((rows,), value, device=at.device) for value in (0.8, 0, 1.0, 0.0)]  # temperature, top_k, top_p, min_p
    cut = [full[0], full[1], torch.full((rows,), 0.9, device=at.device), full[3]]

    def missed(tokens: Tensor, columns: list[Tensor]) -> Tensor:
        return (tokens != sample_reference(logits, uniforms, *columns)[0]).double().mean()

    def ours() -> Values:
        return {
            "mismatch": missed(sample(logits, uniforms, *full)[0], full),
            "mismatch top_p": missed(sample(logits, uniforms, *cut)[0], cut),
        }

    probability = torch.softmax(logits.float() / 0.8, -1)
    drawn = torch.searchsorted(probability.cumsum(1), uniforms.float()[:, None], right=True)[:, 0].clamp(max=vocab - 1)
    ordered, index = probability.sort(1, descending=True)
    kept = torch.where(ordered.cumsum(1) - ordered < 0.9, ordered, 0.0)
    cut_probability = torch.zeros_like(probability).scatter_(1, index, kept)
    cdf = cut_probability.cumsum(1)
    cut_drawn = torch.searchsorted(cdf, uniforms.float()[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=vocab - 1)
    plain = {"mismatch": missed(drawn, full), "mismatch top_p": missed(cut_drawn, cut)}
    return Case(ours, plain, {name: torch.zeros(()) for name in plain}, rates=tuple(plain))
