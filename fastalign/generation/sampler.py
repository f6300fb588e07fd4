"""Hidden rows to tokens and their log-probs, a chunk of logits at a time.

The log-prob comes from the very function that the trainer's loss calls on the very logits that its GEMM gives, so both
agree to the bit wherever the hidden rows do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastalign.generation.draws import Drawn, Draws, Sampled
from fastalign.generation.rows import Rows
from fastalign.generation.stops import StopTable
from fastalign.models.backbone import Head
from fastalign.ops.linear_head import MIN_GEMM_ROWS, borrowed, head_logits
from fastalign.ops.logits import logp_rows
from fastalign.ops.sampling import sample, uniform
from fastalign.staging import fetch, to_device, to_host

CHUNK_BYTES = 64 << 20  # logits held at once
KeepLogits = Callable[[slice, Tensor], None]


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

    def draw(self, hidden: Tensor, draws: Draws, keep: KeepLogits | None = None) -> Sampled:
        """Draws every token of a step from hidden [K, H].

        The host waits for nothing here, unless there are logits processors or alternatives to report.

        Args:
            keep: given spans of these rows and their logits as the head gave them, to have and to hold.
        """
        parts = [self._chunk(hidden, draws.cut(slice(at, at + self.chunk)), keep) for at in range(0, len(draws.at), self.chunk)]
        return Sampled.joined(parts)

    def waits(self, draws: Draws) -> bool:
        """Whether `draw` reads what it draws, or what was drawn before."""
        return bool((self.rows.processed[draws.source] | (self.rows.top[draws.source] > 0)).any())

    def _chunk(self, hidden: Tensor, draws: Draws, keep: KeepLogits | None) -> Sampled:
        head, first, last = self.head, int(draws.at[0]), int(draws.at[-1]) + 1
        with borrowed(last - first, head.weight.shape[0], head.weight) as buffer:
            logits = head_logits(hidden[first:last].to(head.weight.dtype), head.weight, head.bias, out=buffer)
            if keep is not None:
                own = logits.untyped_storage()  # a view holds all of what it is of; the buffer is written again
                view = own.nbytes() > logits.numel() * logits.element_size() or own.data_ptr() == buffer.untyped_storage().data_ptr()
                changed = bool((self.rows.min_length[draws.source] > draws.position + 1).any())  # see `_ban`
                keep(slice(first, last), logits.clone() if view or changed else logits)
            if len(draws.at) != last - first:
                logits = logits[to_device(logits.device, draws.at - first)[0]]
            return self._draw(logits, draws)

    def _draw(self, logits: Tensor, draws: Draws) -> Sampled:
        special = self.rows.processed[draws.source]
        if not special.any():
            return self._drawn(logits, draws, self.head)
        parts = []
        for i in range(len(special)):
            one = slice(i, i + 1)
            parts.append((self._processed if special[i] else self._drawn)(logits[one], draws.cut(one), self.head))
        return Sampled.joined(parts)

    def _processed(self, logits: Tensor, draws: Draws, head: Head) -> Sampled:
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
            return Sampled.known(Drawn(np.full(1, -1, np.int64), nothing, nothing, nothing, {0: error}), logits.device)
        sampled = self._drawn(scores.float().contiguous(), draws, replace(head, logit_softcap=None, logit_scale=1.0))
        drawn = sampled.read()
        if drawn.tokens[0] < 0:
            return sampled
        (raw,) = to_host(self._at(logits, sampled.tokens, 1.0, head)[0])
        logprobs = raw if self.rows.temperature[row] == 0 else drawn.logprobs
        drawn = replace(drawn, logprobs=logprobs, raw_logprobs=raw, top=self._top(logits, draws, sampled.tokens, raw, head))
        return replace(sampled, read=lambda: drawn)

    def _drawn(self, logits: Tensor, draws: Draws, head: Head) -> Sampled:
        rows, source = self.rows, draws.source
        ban = self._ban(logits, draws)
        heat = rows.temperature[source]
        columns: list[NDArray[Any]] = [rows.seed[source].view(np.int64), rows.request[source], draws.sample, draws.position]
        columns += [(heat / head.logit_scale).astype(np.float32), rows.top_k[source], rows.top_p[source], rows.min_p[source]]
        *key, scaled, top_k, top_p, min_p = to_device(logits.device, *columns)
        drawn, kept = sample(logits, uniform(*key), scaled, top_k, top_p, min_p, logit_softcap=head.logit_softcap)
        tokens = drawn.clamp(min=0)  # a draw that failed has no log-prob, the others do
        if not rows.wants[source].any():
            pair = fetch(drawn, kept)
            return Sampled(tokens, lambda: _without_logprobs(*pair()))
        logp, lse = self._at_own(logits, tokens, heat, head)
        unbanned, raw_logp = lse, logp
        if ban is not None:
            logits[ban.rows, ban.tokens] = ban.logits
            unbanned = self._at_own(logits, tokens, heat, head)[1]
        if ban is not None or (heat * (heat - 1) != 0).any():
            raw_logp = self._at(logits, tokens, 1.0, head)[0]
        found = fetch(drawn, kept, logp, raw_logp, lse, unbanned)
        if not rows.top[source].any():
            return Sampled(tokens, lambda: _with_logprobs(found(), heat, ban is not None))
        known = _with_logprobs(found(), heat, ban is not None)
        known = replace(known, top=self._top(logits, draws, tokens, known.raw_logprobs, head))
        return Sampled(tokens, lambda: known)

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
            (index,) = to_device(logits.device, np.flatnonzero(heat == value))
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
        at, tokens = to_device(logits.device, np.repeat(early, [len(ids) for ids in stops]), np.concatenate(stops))
        ban = _Ban(at, tokens, logits[at, tokens])
        logits[at, tokens] = -torch.inf
        return ban


def _without_logprobs(tokens: NDArray[np.int64], kept: NDArray[np.float32]) -> Drawn:
    nothing = np.zeros_like(kept)
    return Drawn(tokens, nothing, nothing, kept)


def _with_logprobs(columns: Sequence[NDArray[Any]], heat: NDArray[np.float64], banned: bool) -> Drawn:
    """Of tokens, what truncation kept of the sampled distribution, log-probs and log-sum-exps with the banned tokens left out and in."""
    tokens, kept, logprobs, raw, lse, unbanned = columns
    logprobs, kept_mass = logprobs.copy(), kept.copy()
    if banned:
        kept_mass *= np.exp(lse - unbanned)
    cut = kept < 1
    logprobs[cut] -= np.log(kept[cut])
    greedy = heat == 0
    logprobs[greedy], kept_mass[greedy] = raw[greedy], 1
    return Drawn(tokens, logprobs, raw, kept_mass)


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
