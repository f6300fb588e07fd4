"""What to draw in a step, the draws while they are on the device, and as the host has read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastalign.generation.rows import Rows
from fastalign.staging import to_device


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
class Sampled:
    """Draws that the host has not read yet.

    Attributes:
        tokens: [D] int64 where the logits are, for the next step to begin with; any id for a draw that failed.
        read: waits for them.
    """

    tokens: Tensor
    read: Callable[[], Drawn]

    @classmethod
    def joined(cls, parts: Sequence[Sampled]) -> Sampled:
        """The draws of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.tokens for part in parts]), lambda: Drawn.joined([part.read() for part in parts]))

    @classmethod
    def known(cls, drawn: Drawn, device: torch.device) -> Sampled:
        """Draws that have been read."""
        (tokens,) = to_device(device, drawn.tokens)
        return cls(tokens.clamp(min=0), lambda: drawn)


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
            source, np.repeat(np.arange(len(drawing)), count), rows.sample[source] + np.arange(len(source)) - first, rows.expected[source]
        )

    def cut(self, part: slice | NDArray[np.int64]) -> Draws:
        return Draws(self.source[part], self.at[part], self.sample[part], self.position[part])
