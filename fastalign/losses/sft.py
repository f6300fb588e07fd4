"""Supervised losses: equations over the log-probs of scored tokens."""

from __future__ import annotations

from torch import Tensor


def nll(logp: Tensor) -> Tensor:
    """Negative log-likelihood. logp [N] in nats → [N]."""
    return -logp


SUPERVISED = {"nll": nll}
