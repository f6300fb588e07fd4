"""Hidden rows to tokens and their log-probs, a chunk of logits at a time.

The log-prob comes from the very function that the trainer's loss calls on the very logits that its GEMM gives, so both
agree to the bit wherever the hidden rows do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastalign.generation.rows import Rows
from fastalign.generation.stops import StopTable
from fastalign.models.backbone import Head
from fastalign.ops.linear_head import MIN_GEMM_ROWS, borrowed, head_logits
from fastalign.ops.logits import logp_rows
from fastalign.ops.sampling import sample, uniform
from fastalign.ops.staging import to_host

CHUNK_BYTES = 64 << 20  # logits held at once
KeepLogits = Callable[[slice, Tensor], None]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was drawn, [D] each.

    Attributes:
        tokens: int64; -1 where the logits were NaN or +inf, or a logits processor failed.
        logprobs, raw_logprobs, kept_mass: fp32; zeros and ones when not asked for.
        errors: by draw, what a logits processor raised.
        top: by draw, the most probable (token id, raw log-prob), where somebody asks for them.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    raw_logprobs: NDArray[np.float32]
    kept_mass: NDArray[np.float32]
    errors: dict[int, Exception] = field(default_factory=dict)
    top: dict[int, list[tuple[int, float]]] | None = None

    def cut(self, kept: NDArray[np.int64]) -> Drawn:
        """The draws `kept`, ascending indices."""
        place = {int(old): new for new, old in enumerate(kept)}
        top = None if self.top is None else {place[i]: found for i, found in self.top.items() if i in place}
        return Drawn(self.tokens[kept], self.logprobs[kept], self.raw_logprobs[kept], self.kept_mass[kept], {}, top)

    @classmethod
    def joined(cls, parts: Sequence[Drawn]) -> Drawn:
        """The draws of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        names = ("tokens", "logprobs", "raw_logprobs", "kept_mass")
        tokens, logprobs, raw, kept_mass = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        first = np.cumsum([0, *(len(part.tokens) for part in parts)]).tolist()
        errors = {at + i: error for at, part in zip(first, parts, strict=False) for i, error in part.errors.items()}
        top = {at + i: found for at, part in zip(first, parts, strict=False) for i, found in (part.top or {}).items()}
        return cls(tokens, logprobs, raw, kept_mass, errors, top if any(part.top is not None for part in parts) else None)


@dataclass(frozen=True, eq=False)
class Draws:
    """What to draw, [D] each: D >= K, as a prompt that forks draws several samples from one hidden row.

    Attributes:
        source: the row that holds a draw's parameters.
        at: which of the K hidden rows it reads, ascending.
        sample: its sample index; position: the index of the token it draws.
    """

    source: NDArray[np.int64]
    at: NDArray[np.int64]
    sample: NDArray[np.int64]
    position: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Rows, drawing: NDArray[np.int64]) -> Draws:
        """The draws of the rows whose known tokens have all been forwarded."""
        count = rows.draws[drawing]
        source = np.repeat(drawing, count)
        first = np.repeat(np.cumsum(count) - count, count)
        return cls(
            source, np.repeat(np.arange(len(drawing)), count), rows.sample[source] + np.arange(len(source)) - first, rows.length[source]
        )

    def cut(self, part: slice | NDArray[np.int64]) -> Draws:
        return Draws(self.source[part], self.at[part], self.sample[part], self.position[part])


class Sampler:
    """Draws from one model's head.

    Args:
        head: the head as the trainer reads it.
        rows: the sequences' columns.
        stops: whose sets are banned before min_tokens.
    """

    def __init__(self, head: Head, rows: Rows, stops: StopTable) -> None:
        self.head, self.rows, self.stops = head, rows, stops
        vocab, size = head.weight.shape[0], head.weight.element_size()
        self.chunk = max(MIN_GEMM_ROWS, CHUNK_BYTES // (vocab * size))

    def draw(self, hidden: Tensor, draws: Draws, keep: KeepLogits | None = None) -> Drawn:
        """Draws every token of a step from hidden [K, H].

        Args:
            keep: given spans of these rows and their logits as the head gave them, to have and to hold.
        """
        parts = [self._chunk(hidden, draws.cut(slice(at, at + self.chunk)), keep) for at in range(0, len(draws.at), self.chunk)]
        return Drawn.joined(parts)

    def _chunk(self, hidden: Tensor, draws: Draws, keep: KeepLogits | None) -> Drawn:
        head, first, last = self.head, int(draws.at[0]), int(draws.at[-1]) + 1
        with borrowed(last - first, head.weight.shape[0], head.weight) as buffer:
            logits = head_logits(hidden[first:last].to(head.weight.dtype), head.weight, head.bias, out=buffer)
            if keep is not None:
                own = logits.untyped_storage()  # a view holds all of what it is of; the buffer is written again
                view = own.nbytes() > logits.numel() * logits.element_size() or own.data_ptr() == buffer.untyped_storage().data_ptr()
                changed = bool((self.rows.min_length[draws.source] > draws.position + 1).any())  # see `_ban`
                keep(slice(first, last), logits.clone() if view or changed else logits)
            if len(draws.at) != last - first:
                logits = logits[torch.from_numpy(draws.at - first).to(logits.device)]
            return self._draw(logits, draws)

    def _draw(self, logits: Tensor, draws: Draws) -> Drawn:
        special = self.rows.processed[draws.source]
        if not special.any():
            return self._drawn(logits, draws, self.head)
        parts = []
        for i in range(len(special)):
            one = slice(i, i + 1)
            parts.append((self._processed if special[i] else self._drawn)(logits[one], draws.cut(one), self.head))
        return Drawn.joined(parts)

    def _processed(self, logits: Tensor, draws: Draws, head: Head) -> Drawn:
        """One draw through its request's logits processors."""
        row, position = int(draws.source[0]), int(draws.position[0])
        ids = torch.from_numpy(self.rows.tokens[row : row + 1, :position].copy()).to(logits.device)
        scores = _final(logits, head).clone()
        try:
            for processor in self.rows.processors[row]:
                scores = processor(ids, scores)
                _check_scores(scores, logits, processor)
        except Exception as error:
            nothing = np.zeros(1, np.float32)
            return Drawn(np.full(1, -1, np.int64), nothing, nothing, nothing, {0: error})
        drawn = self._drawn(scores.float().contiguous(), draws, replace(head, logit_softcap=None, logit_scale=1.0))
        if drawn.tokens[0] < 0:
            return drawn
        tokens = torch.from_numpy(drawn.tokens).to(logits.device)
        (raw,) = to_host(self._at(logits, tokens, 1.0, head)[0])
        logprobs = raw if self.rows.temperature[row] == 0 else drawn.logprobs
        return replace(drawn, logprobs=logprobs, raw_logprobs=raw, top=self._top(logits, draws, tokens, raw, head))

    def _drawn(self, logits: Tensor, draws: Draws, head: Head) -> Drawn:
        rows, source, device = self.rows, draws.source, logits.device

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device)

        random = uniform(
            column(rows.seed[source].view(np.int64)), column(rows.request[source]), column(draws.sample), column(draws.position)
        )
        ban = self._ban(logits, draws)
        heat = rows.temperature[source]
        truncation = (column(values[source]) for values in (rows.top_k, rows.top_p, rows.min_p))
        scaled = column((heat / head.logit_scale).astype(np.float32))
        tokens, kept = sample(logits, random, scaled, *truncation, logit_softcap=head.logit_softcap)
        if not rows.wants[source].any():
            drawn, kept_of_sampled = to_host(tokens, kept)
            nothing = np.zeros_like(kept_of_sampled)
            return Drawn(drawn, nothing, nothing, kept_of_sampled)
        failed, tokens = tokens, tokens.clamp(min=0)  # a draw that failed has no log-prob, the others do
        logp, lse = self._at_own(logits, tokens, heat, head)
        unbanned, raw_logp = lse, logp
        if ban is not None:
            logits[ban.rows, ban.tokens] = ban.logits
            unbanned = self._at_own(logits, tokens, heat, head)[1]
        if ban is not None or (heat * (heat - 1) != 0).any():
            raw_logp = self._at(logits, tokens, 1.0, head)[0]
        columns = to_host(failed, kept, logp, raw_logp, lse, unbanned)
        drawn, kept_of_sampled, logprobs, raw = columns[0], columns[1], columns[2].copy(), columns[3]
        kept_mass = kept_of_sampled.copy()
        if ban is not None:
            kept_mass *= np.exp(columns[4] - columns[5])
        cut = kept_of_sampled < 1
        logprobs[cut] -= np.log(kept_of_sampled[cut])
        greedy = heat == 0
        logprobs[greedy], kept_mass[greedy] = raw[greedy], 1
        return Drawn(drawn, logprobs, raw, kept_mass, {}, self._top(logits, draws, tokens, raw, head))

    def _top(
        self, logits: Tensor, draws: Draws, tokens: Tensor, raw: NDArray[np.float32], head: Head
    ) -> dict[int, list[tuple[int, float]]] | None:
        """The most probable tokens of the draws that ask for them, at temperature 1."""
        counts = self.rows.top[draws.source]
        if not counts.any():
            return None
        found = {}
        for i in np.flatnonzero(counts).tolist():
            scores = _final(logits[i], head)
            values, ids = scores.topk(min(int(counts[i]), len(scores)))
            at_sampled = float(scores[tokens[i]])
            found[i] = [(int(token), float(raw[i]) + float(value) - at_sampled) for token, value in zip(ids, values, strict=True)]
        return found

    def _at_own(self, logits: Tensor, tokens: Tensor, temperature: NDArray[np.float64], head: Head) -> tuple[Tensor, Tensor]:
        """[D] fp32 log-probs and log-sum-exps at each draw's own temperature; greedy draws at 1."""
        heat = np.where(temperature > 0, temperature, 1)
        if (heat == heat[0]).all():
            return self._at(logits, tokens, float(heat[0]), head)
        logprobs, lse = logits.new_empty(2, len(heat), dtype=torch.float32).unbind()
        for value in np.unique(heat):
            index = torch.from_numpy(np.flatnonzero(heat == value)).to(logits.device)
            logprobs[index], lse[index] = self._at(logits[index], tokens[index], float(value), head)
        return logprobs, lse

    def _at(self, logits: Tensor, tokens: Tensor, temperature: float, head: Head) -> tuple[Tensor, Tensor]:
        logp, lse, _, _ = logp_rows(logits, tokens, temperature=head.temperature(temperature), logit_softcap=head.logit_softcap)
        return logp, lse

    def _ban(self, logits: Tensor, draws: Draws) -> _Ban | None:
        """Before min_tokens a stop token has probability 0: writes -inf over its logit, and returns what to put back."""
        rows, source = self.rows, draws.source
        early = np.flatnonzero(rows.min_length[source] > draws.position + 1)
        if not len(early):
            return None
        stops = [self.stops.ids[index] for index in rows.stop_set[source[early]]]
        at = torch.from_numpy(np.repeat(early, [len(ids) for ids in stops])).to(logits.device)
        tokens = torch.from_numpy(np.concatenate(stops)).to(logits.device)
        ban = _Ban(at, tokens, logits[at, tokens])
        logits[at, tokens] = -torch.inf
        return ban


def _final(logits: Tensor, head: Head) -> Tensor:
    """Logits as the model gives them: fp32, soft-capped and scaled."""
    values = logits.float()
    if head.logit_softcap is not None:
        values = torch.tanh(values / head.logit_softcap) * head.logit_softcap
    return values * head.logit_scale


def _check_scores(scores: object, logits: Tensor, processor: object) -> None:
    if not isinstance(scores, Tensor) or scores.shape != logits.shape:
        name = getattr(processor, "__name__", type(processor).__name__)
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"logits processor {name} must return logits of shape {tuple(logits.shape)}, got {got}")


@dataclass(frozen=True, eq=False)
class _Ban:
    """Logits taken away for one draw: logits[rows, tokens]."""

    rows: Tensor
    tokens: Tensor
    logits: Tensor
