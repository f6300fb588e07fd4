"""One optimizer step: packed micro-batches forward, losses with their gradients fused, clip, update.

Every divisor is global and given up front, so the result does not depend on the cut into micro-batches.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.backbone import head_of, hidden_states
from ..models.recorded import Replay
from ..models.switching import trained_parameters
from ..ops.linear_logp import linear_logp
from ..ops.linear_loss import linear_loss
from ..ops.linear_scores import linear_scores
from ..packing import Packed
from .optimizer import MainGradients

log = logging.getLogger("fastalign")


@dataclass(frozen=True)
class LogitOptions:
    """How log-probs are taken from hidden states: softmax temperature, and bytes of logits held at once (None: chosen)."""

    temperature: float = 1.0
    max_chunk_bytes: int | None = None


class Batch(Protocol):
    """What `Updater` adds up: one forward and backward pass, whatever its loss reads."""

    def forward_backward(self, model: nn.Module, options: LogitOptions, *, backward: bool = True) -> tuple[Tensor, dict]:
        """Adds the gradients; returns the share of the loss, detached, and metrics that are summed (`logp` [N]: kept as it is).

        Nothing of it is read here, so that a GPU has work while the host packs the next batch.
        """


@dataclass(frozen=True)
class MicroBatch:
    """A pass whose loss is an objective of log-probs.

    Attributes:
        packed: the token tree, on any device.
        objective: `objective(logp, entropy, span)` → its share of the final scalar, or (share, {name: sum}).
        units: [U+1] offsets of the runs of targets that the objective couples; None: every token on its own.
        log_square_sum: [N] fp32 buffer that gets log Σ_v p(v)² of each target's distribution before the objective is called, at the
            price of another pass over the head; None: not computed.
        replay: what is known of this forward pass already; None: nothing.
    """

    packed: Packed
    objective: Callable[[Tensor, Tensor, slice], object]
    units: Tensor | None = None
    log_square_sum: Tensor | None = None
    replay: Replay | None = None

    def forward_backward(self, model: nn.Module, options: LogitOptions, *, backward: bool = True) -> tuple[Tensor, dict]:
        """Adds the gradients; returns the share of the loss and the metrics of `linear_loss`."""
        replay = self.replay
        with nullcontext() if replay is None else replay.active():
            head = head_of(model)
            packed = self.packed.to(head.weight.device)
            hidden = scored_hidden(model, packed)
        temperature = head.temperature(options.temperature)
        logits: dict[str, Any] = {"bias": head.bias, "temperature": temperature, "logit_softcap": head.logit_softcap}
        logits["max_chunk_bytes"] = options.max_chunk_bytes
        if self.log_square_sum is not None:
            with torch.no_grad():
                found = linear_scores(hidden, head.weight, packed.targets, fields=("log_square_sum",), **logits)
            assert found.log_square_sum is not None
            self.log_square_sum.copy_(found.log_square_sum)
        loss, metrics = linear_loss(
            hidden,
            head.weight,
            packed.targets,
            self.objective,
            units=self.units,
            return_entropy=True,
            known_logits=None if replay is None else replay.logits(packed.rows, hidden.shape[1]),
            **logits,
        )
        if backward:
            loss.backward()
        return loss.detach(), metrics


def scored_hidden(model: nn.Module, packed: Packed) -> Tensor:
    """Hidden rows that predict a target, [N, H] in the head's dtype."""
    return hidden_states(model, packed).index_select(0, packed.rows).to(head_of(model).weight.dtype)


@torch.no_grad()
def score(model: nn.Module, packed: Packed, *, temperature: float = 1.0) -> Tensor:
    """Log-probs [N] fp32 (nats) of a packed batch's targets, no gradient: the reference's, or an old policy's; on the model's device."""
    head = head_of(model)
    packed = packed.to(head.weight.device)
    return linear_logp(
        scored_hidden(model, packed),
        head.weight,
        packed.targets,
        bias=head.bias,
        temperature=head.temperature(temperature),
        logit_softcap=head.logit_softcap,
    )


@dataclass
class Update:
    """What a step did: the loss, the gradient norm before clipping, sums by name, and whether it was applied."""

    loss: float
    grad_norm: float
    sums: dict[str, float]
    logps: list[Tensor]
    applied: bool


class Updater:
    """Owns gradients, optimizer and schedule of one model."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule, *, max_grad_norm: float, options: LogitOptions):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.gradients = MainGradients(p for _, p in trained_parameters(model))
        self.max_grad_norm, self.options = max_grad_norm, options
        self.skipped_in_a_row = 0

    def accumulate(self, batches: Iterable[Batch]) -> Update:
        """Gradients and metrics of all micro-batches, no update yet."""
        self.gradients.zero()
        logps = []
        found: list[tuple[str, Tensor | float]] = []
        for batch in batches:
            loss, metrics = batch.forward_backward(self.model, self.options)
            logp = metrics.pop("logp", None)
            if logp is not None:
                found.append(("targets", logp.numel()))
                logps.append(logp)
            found += [("", loss), *((name, value.sum() if isinstance(value, Tensor) else value) for name, value in metrics.items())]
        sums: defaultdict[str, float] = defaultdict(float)
        for (name, _), number in zip(found, _read([value for _, value in found]), strict=True):
            sums[name] += number
        return Update(sums.pop("", 0.0), self.gradients.norm(), dict(sums), logps, applied=False)

    def update(self, batches: Iterable[Batch], commit: Callable[[Callable[[], None]], None] | None = None) -> Update:
        """Accumulates, clips and steps. A loss or gradient that is not finite changes no weight and is reported.

        Args:
            commit: wraps the change of the weights (the engine bumps its version there).

        Raises:
            FloatingPointError: at the third step in a row that is not finite.
        """
        result = self.accumulate(batches)
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self.gradients.clip(result.grad_norm, self.max_grad_norm)
            apply = self.optimizer.step
            commit(apply) if commit is not None else apply()
            result.applied = True
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            log.warning("step skipped: loss %s, gradient norm %s; the weights were not changed", result.loss, result.grad_norm)
            if self.skipped_in_a_row >= 3:
                raise FloatingPointError(
                    f"three steps in a row had a loss or gradient that is not finite (last: loss {result.loss}, gradient norm "
                    f"{result.grad_norm}); lower --learning_rate, or check the model's weights for NaN"
                )
        self.schedule.step()
        return result


def _read(values: Sequence[Tensor | float]) -> list[float]:
    """Scalars as numbers; those of a device by one copy."""
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    tensors = [(i, value) for i, value in enumerate(values) if isinstance(value, Tensor)]
    for device in {value.device for _, value in tensors}:
        own = [(i, value) for i, value in tensors if value.device == device]
        for (i, _), number in zip(own, torch.stack([value.detach().double().reshape(()) for _, value in own]).tolist(), strict=True):
            numbers[i] = number
    return numbers
