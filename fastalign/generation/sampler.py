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
        with borrowed(last - first, head.weight.shape[0], hidden) as buffer:
            logits = head_logits(hidden[first:last], head.weight, head.bias, out=buffer)
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
        heat = rows.temperature[source] / np.float32(self.head.logit_scale)
        truncation = (column(values[source]) for values in (rows.top_k, rows.top_p, rows.min_p))
        tokens, kept = sample(logits, random, column(heat), *truncation, logit_softcap=self.head.logit_softcap)
        if ban is not None:
            logits[ban.rows, ban.tokens] = ban.logits
        drawn, kept_mass = tokens.cpu().numpy(), kept.cpu().numpy()
        if not self.logprobs or (drawn < 0).any():
            nothing = np.zeros_like(kept_mass)
            return Drawn(drawn, nothing, nothing, kept_mass)
        logprobs, raw, lse = self._logprobs(logits, tokens, rows.temperature[source])
        if ban is not None:
            kept_mass *= self._allowed_mass(ban, lse, rows.temperature[source])
        cut = kept_mass < 1
        logprobs[cut] -= np.log(kept_mass[cut])
        return Drawn(drawn, logprobs, raw, kept_mass)

    def _logprobs(self, logits: Tensor, tokens: Tensor, temperature: NDArray[np.float32]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[D] fp32 each: log-probs at each draw's own temperature, those at temperature 1, and the former's log-sum-exp."""
        raw, raw_lse = self._at(logits, tokens, 1.0)
        logprobs, lse = raw.copy(), raw_lse.copy()
        for value in np.unique(temperature):
            if value in (0.0, 1.0):  # greedy: the log-prob is the model's own
                continue
            mine = np.flatnonzero(temperature == value)
            if len(mine) == len(temperature):  # nothing to gather
                logprobs, lse = self._at(logits, tokens, float(value))
            else:
                index = torch.from_numpy(mine).to(logits.device)
                logprobs[mine], lse[mine] = self._at(logits[index], tokens[index], float(value))
        return logprobs, raw, lse

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

    def _allowed_mass(self, ban: _Ban, lse: np.ndarray, temperature: NDArray[np.float32]) -> np.ndarray:
        """[D] fp32: the probability of everything that is not banned; 1 for greedy draws, whose log-prob is the model's."""
        at = ban.rows.cpu().numpy()
        heat = np.where(temperature[at] > 0, temperature[at], 1) / self.head.logit_scale
        z, cap = ban.logits.double().cpu().numpy(), self.head.logit_softcap
        lost = np.exp((z if cap is None else np.tanh(z / cap) * cap) / heat - lse[at])
        mass = 1 - np.bincount(at, lost, minlength=len(lse))
        return np.where(temperature > 0, mass, 1.0).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Ban:
    """Logits taken away for one draw: logits[rows, tokens]."""

    rows: Tensor
    tokens: Tensor
    logits: Tensor
