"""Hidden rows to tokens and their log-probs, a chunk of logits at a time.

The log-prob comes from the very function that the trainer's loss calls on the very logits that its GEMM gives, so both
agree to the bit wherever the hidden rows do.
"""

from __future__ import annotations

from dataclasses import dataclass

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

CHUNK_BYTES = 64 << 20  # logits held at once


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was drawn, [D] each.

    Attributes:
        tokens: int64; -1 where the logits were NaN or +inf.
        logprobs, raw_logprobs, kept_mass: fp32; zeros and ones when not asked for.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    raw_logprobs: NDArray[np.float32]
    kept_mass: NDArray[np.float32]


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

    def cut(self, part: slice) -> Draws:
        return Draws(self.source[part], self.at[part], self.sample[part], self.position[part])


class Sampler:
    """Draws from one model's head.

    Args:
        head: the head as the trainer reads it.
        rows: the sequences' columns.
        stops: whose sets are banned before min_tokens.
        logprobs: whether anybody wants log-probs.
    """

    def __init__(self, head: Head, rows: Rows, stops: StopTable, logprobs: bool) -> None:
        self.head, self.rows, self.stops, self.logprobs = head, rows, stops, logprobs
        vocab, size = head.weight.shape[0], head.weight.element_size()
        self.chunk = max(MIN_GEMM_ROWS, CHUNK_BYTES // (vocab * size))

    def draw(self, hidden: Tensor, draws: Draws) -> Drawn:
        """Draws every token of a step from hidden [K, H]."""
        parts = [self._chunk(hidden, draws.cut(slice(at, at + self.chunk))) for at in range(0, len(draws.at), self.chunk)]
        if len(parts) == 1:
            return parts[0]
        names = ("tokens", "logprobs", "raw_logprobs", "kept_mass")
        return Drawn(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def _chunk(self, hidden: Tensor, draws: Draws) -> Drawn:
        head, first, last = self.head, int(draws.at[0]), int(draws.at[-1]) + 1
        with borrowed(last - first, head.weight.shape[0], head.weight) as buffer:
            logits = head_logits(hidden[first:last].to(head.weight.dtype), head.weight, head.bias, out=buffer)
            if len(draws.at) != last - first:
                logits = logits[torch.from_numpy(draws.at - first).to(logits.device)]
            return self._draw(logits, draws)

    def _draw(self, logits: Tensor, draws: Draws) -> Drawn:
        rows, source, device = self.rows, draws.source, logits.device

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device)

        random = uniform(
            column(rows.seed[source].view(np.int64)), column(rows.request[source]), column(draws.sample), column(draws.position)
        )
        ban = self._ban(logits, draws)
        heat = rows.temperature[source]
        truncation = (column(values[source]) for values in (rows.top_k, rows.top_p, rows.min_p))
        scaled = column((heat / self.head.logit_scale).astype(np.float32))
        tokens, kept = sample(logits, random, scaled, *truncation, logit_softcap=self.head.logit_softcap)
        drawn, kept_of_sampled = tokens.cpu().numpy(), kept.cpu().numpy()
        if not self.logprobs or (drawn < 0).any():
            nothing = np.zeros_like(kept_of_sampled)
            return Drawn(drawn, nothing, nothing, kept_of_sampled)
        logprobs, lse = self._at_own(logits, tokens, heat)
        kept_mass = kept_of_sampled.copy()
        if ban is not None:
            logits[ban.rows, ban.tokens] = ban.logits
            kept_mass *= np.exp(lse - self._at_own(logits, tokens, heat)[1])
        raw = logprobs.copy() if ban is None and (heat * (heat - 1) == 0).all() else self._at(logits, tokens, 1.0)[0]
        cut = kept_of_sampled < 1
        logprobs[cut] -= np.log(kept_of_sampled[cut])
        greedy = heat == 0
        logprobs[greedy], kept_mass[greedy] = raw[greedy], 1
        return Drawn(drawn, logprobs, raw, kept_mass)

    def _at_own(self, logits: Tensor, tokens: Tensor, temperature: NDArray[np.float64]) -> tuple[np.ndarray, np.ndarray]:
        """[D] fp32 log-probs and log-sum-exps at each draw's own temperature; greedy draws at 1."""
        heat = np.where(temperature > 0, temperature, 1)
        values = np.unique(heat)
        if len(values) == 1:
            return self._at(logits, tokens, float(values[0]))
        logprobs, lse = np.empty(len(heat), np.float32), np.empty(len(heat), np.float32)
        for value in values:
            mine = np.flatnonzero(heat == value)
            index = torch.from_numpy(mine).to(logits.device)
            logprobs[mine], lse[mine] = self._at(logits[index], tokens[index], float(value))
        return logprobs, lse

    def _at(self, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        head = self.head
        logp, lse, _, _ = logp_rows(logits, tokens, temperature=head.temperature(temperature), logit_softcap=head.logit_softcap)
        return logp.cpu().numpy(), lse.cpu().numpy()

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


@dataclass(frozen=True, eq=False)
class _Ban:
    """Logits taken away for one draw: logits[rows, tokens]."""

    rows: Tensor
    tokens: Tensor
    logits: Tensor
