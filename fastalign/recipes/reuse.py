"""The rollout's forward pass as the update's: recorded while sampling, looked at, and handed to the first update."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..generation import Engine
from ..generation.runner import free_bytes
from ..models.backbone import causal_lm
from ..models.linear import recording_of
from ..models.recorded import Recording, Replay
from ..packing import one_sequence
from ..training.step import score
from .policy import PolicyChunk

log = logging.getLogger("fastalign")

MEMORY_SHARE = 4  # a recording takes one part in so many of the memory that is free
TOLERANCE = 1e-5  # nats: what undoing a truncation may round


@dataclass
class Reused:
    """What the first update on a rollout takes over.

    Attributes:
        replays: one a micro-batch; None: that one is computed.
        gap: |log-prob computed anew − the sampler's| of the tokens that were computed anew, fp32; they stand for the others.
        share: of the tokens to be forwarded, those that are known.
    """

    replays: list[Replay | None]
    gap: Tensor
    share: float


class ForwardReuse:
    """Keeps the forward passes of rollouts for the updates that follow them.

    Each rollout's is used only after one of its completions, computed anew, gave the log-probs that the sampler saw; where it does not,
    that is told, and nothing is reused any more.

    Args:
        engine: over the very weights that are trained.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.works = engine, engine.records
        self._recording: Recording | None = None

    def forget(self) -> None:
        """Before a rollout: the last one's is of no use any more."""
        self._recording = None

    @contextmanager
    def recording(self, num_tokens: int) -> Iterator[None]:
        """Inside, the engine's forward passes are kept, of a rollout of at most so many tokens; more calls add to the first."""
        if not self.works:
            yield
            return
        if self._recording is None:
            model = causal_lm(self.engine.model)
            self._recording = recording_of(model, num_tokens, free_bytes(model) // MEMORY_SHARE)
        with self.engine.recording(self._recording):
            yield

    def take(self, model: nn.Module, chunks: Sequence[PolicyChunk], *, temperature: float, key: int) -> Reused | None:
        """What the micro-batches may take from the rollout; None where nothing was kept, or it was not what is computed now.

        Args:
            key: which completion is computed anew.
        """
        recording, self._recording = self._recording, None
        if recording is None or all(chunk.recorded is None or not chunk.packed.num_targets for chunk in chunks):
            return None
        gap = self._look(model, chunks, temperature, random.Random(key))
        if not bool((gap <= TOLERANCE).all()):
            log.warning(
                "the forward passes of sampling are computed again from now on: a completion's log-probs differed from those of training by"
                " up to %.1e nats; --reuse_forward false says so from the start",
                float(gap.max()),
            )
            self.works = False
            return None
        known = sum(int((chunk.recorded >= 0).sum()) for chunk in chunks if chunk.recorded is not None)
        readers = [i for i, chunk in enumerate(chunks) if chunk.recorded is not None]
        replays: list[Replay | None] = [None] * len(chunks)
        for i in readers:
            rows = chunks[i].recorded
            assert rows is not None
            replays[i] = Replay(recording, rows, last=i == readers[-1])
        return Reused(replays, gap, known / max(1, sum(chunk.packed.num_tokens for chunk in chunks)))

    def _look(self, model: nn.Module, chunks: Sequence[PolicyChunk], temperature: float, draw: random.Random) -> Tensor:
        """|difference| of one completion's log-probs [L] from the sampler's."""
        chunk = draw.choice([chunk for chunk in chunks if chunk.packed.num_targets])
        sizes = chunk.packed.cu_targets.diff().tolist()
        sequence = draw.choice([i for i, size in enumerate(sizes) if size])
        own = slice(*chunk.packed.cu_targets[sequence : sequence + 2].tolist())
        found = score(model, one_sequence(chunk.packed, sequence), temperature=temperature)
        return (found - chunk.sampler_logp[own].to(found.device)).abs().nan_to_num(nan=torch.inf)
