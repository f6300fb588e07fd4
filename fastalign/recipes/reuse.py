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
from ..generation.free_memory import free_bytes
from ..models.backbone import causal_lm, head_of
from ..models.linear import recording_of
from ..models.recorded import Audit, Recording, Replay
from ..models.switching import own_parameters
from ..ops.linear_logp import linear_logp
from ..packing import one_sequence, tokens_of
from ..training.step import scored_hidden
from .policy import PolicyChunk

log = logging.getLogger("fastalign")

MEMORY_SHARE = 4  # a recording takes one part in so many of the memory that is free
TOLERANCE = 1e-5  # nats: what undoing a truncation may round
TOLERANCE_OF_OUTPUTS = 1e-4  # of a layer's largest one


@dataclass
class Reused:
    """What the first update on a rollout takes over.

    Attributes:
        replays: one a micro-batch; None: that one is computed.
        gap: |log-prob computed anew − the sampler's| of the tokens that were computed anew, fp32; they stand for the others.
        flop: of all products of the forward pass.
    """

    replays: list[Replay | None]
    gap: Tensor
    flop: float

    @property
    def share(self) -> float:
        """The part of the forward pass's products that was not computed; to be asked after the update."""
        return sum(replay.saved for replay in self.replays if replay is not None) / max(1.0, self.flop)


class ForwardReuse:
    """Keeps the forward passes of rollouts for the updates that follow them.

    Each rollout's is used only after one of its completions was computed anew and agreed: its log-probs with those that the sampler saw,
    its layers' outputs and logits with those that were kept. Where they do not, that is told, and nothing is reused any more.

    Args:
        engine: over the very weights that are trained.

    Attributes:
        works: False once it did not agree, and for engines that cannot record.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.works = engine, engine.records
        self._recording: Recording | None = None
        self._max_bytes = -1  # decided at the first rollout: freed memory stays with the process, and would look taken later

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
            if self._max_bytes < 0:
                self._max_bytes = free_bytes(model) // MEMORY_SHARE
            self._recording = recording_of(model, num_tokens, self._max_bytes)
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
        gap, of_outputs = _look(model, recording, chunks, temperature, random.Random(key))
        if not (bool((gap <= TOLERANCE).all()) and of_outputs <= TOLERANCE_OF_OUTPUTS):
            log.warning(
                "the forward passes of sampling are computed again from now on: in a completion that was computed anew log-probs"
                " differed by up to %.1e nats and layers by %.1e of their outputs; --reuse_forward false says so from the start",
                float(gap.max()),
                of_outputs,
            )
            self.works = False
            return None
        readers = [i for i, chunk in enumerate(chunks) if chunk.recorded is not None]
        replays: list[Replay | None] = [None] * len(chunks)
        for i in readers:
            rows = chunks[i].recorded
            assert rows is not None
            replays[i] = Replay(recording, rows, last=i == readers[-1])
        return Reused(replays, gap, _flop(model, chunks))


def _look(
    model: nn.Module, recording: Recording, chunks: Sequence[PolicyChunk], temperature: float, draw: random.Random
) -> tuple[Tensor, float]:
    """Computes one completion anew: |differences| of its log-probs [L] from the sampler's, and the largest of outputs from those kept."""
    chunk = draw.choice([chunk for chunk in chunks if chunk.packed.num_targets and chunk.recorded is not None])
    assert chunk.recorded is not None
    sizes = chunk.packed.cu_targets.diff().tolist()
    sequence = draw.choice([i for i, size in enumerate(sizes) if size])
    own = slice(*chunk.packed.cu_targets[sequence : sequence + 2].tolist())
    one, head = one_sequence(chunk.packed, sequence), head_of(model)
    audit = Audit(recording, chunk.recorded[tokens_of(chunk.packed, sequence)])
    with torch.no_grad(), audit.active():
        hidden = scored_hidden(model, one)
        audit.logits(hidden, head.weight, head.bias, one.rows)
        heat, cap = head.temperature(temperature), head.logit_softcap
        found = linear_logp(hidden, head.weight, one.targets, bias=head.bias, temperature=heat, logit_softcap=cap)
    return (found - chunk.sampler_logp[own].to(found.device)).abs().nan_to_num(nan=torch.inf), audit.gap


def _flop(model: nn.Module, chunks: Sequence[PolicyChunk]) -> float:
    """Of the products of a forward pass over the chunks: a multiplication and an addition for each weight and token."""
    base = causal_lm(model)
    apart = {base.get_input_embeddings().weight, head_of(model).weight}
    layers = sum(p.numel() for _, p in own_parameters(model) if p.dim() > 1 and p not in apart)
    tokens, targets = (sum(counts) for counts in zip(*((c.packed.num_tokens, c.packed.num_targets) for c in chunks), strict=True))
    return 2.0 * (layers * tokens + head_of(model).weight.numel() * targets)
