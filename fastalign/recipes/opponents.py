"""Other policies that complete a prompt beside the policy: the reference, and a mixture of both."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from ..data import Prompt
from ..generation import Engine, SamplingParams
from ..models.adapters import is_adapted, reference_disabled
from ..models.mixture import GeometricMixture
from ..rollout import Sample
from .reference import Reference


class Opponent(Protocol):
    """Another policy."""

    def samples(self, prompts: list[Prompt], params: SamplingParams, keys: list[int]) -> list[list[Sample]]:
        """`params.n` completions of each prompt, drawn independently of the policy's; keys: the requests' random keys."""


class ReferenceOpponent:
    """The reference itself: its copy, or the policy with its adapter off.

    Args:
        reference: whose model samples.
        tokenizer: of the policy.
        options: of the engine.
    """

    def __init__(self, reference: Reference, tokenizer: Any, **options: Any) -> None:
        self.reference, self.engine = reference, Engine(reference.model, tokenizer, **options)

    def samples(self, prompts: list[Prompt], params: SamplingParams, keys: list[int]) -> list[list[Sample]]:
        with reference_disabled(self.reference.model) if self.reference.adapted else nullcontext():
            return _samples(self.engine, prompts, params, keys)


class MixtureOpponent:
    """π^(1-β) π_ref^β of the policy as it is and its reference.

    Args:
        model: the policy.
        reference: a copy of its own.
        coefficient: β.

    Raises:
        ValueError: the reference is the policy with its adapter off.
        UnsupportedModelError: as `GeometricMixture`.
    """

    def __init__(self, model: nn.Module, reference: Reference, tokenizer: Any, coefficient: float, **options: Any) -> None:
        if is_adapted(model):
            raise ValueError("nash_md samples from policy and reference at once: an adapter has no second model to mix; train all weights")
        self.mixture = GeometricMixture(model, reference.model, coefficient)
        self.engine = Engine(self.mixture, tokenizer, **options)

    def samples(self, prompts: list[Prompt], params: SamplingParams, keys: list[int]) -> list[list[Sample]]:
        with self.engine.updating_weights():  # the policy has moved since
            self.mixture.refresh()
        return _samples(self.engine, prompts, params, keys)


def _samples(engine: Engine, prompts: list[Prompt], params: SamplingParams, keys: list[int]) -> list[list[Sample]]:
    """Under another seed: with the policy's own, equal policies would draw equal completions."""
    other = replace(params, seed=None if params.seed is None else params.seed + 1)
    rollout = engine.rollout([prompt.ids for prompt in prompts], other, request_ids=keys)
    engine.release_cache()
    return rollout.samples
