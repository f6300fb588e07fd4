"""The head gradient between forward and backward when it goes to `weight.main_grad`: a work buffer that outlives the call.

A fresh [V, H] fp32 tensor a step costs its page faults (545 MB at V=151,936, H=896); a lent one is reused.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_spare: list[Tensor] = []
_returnable: list[weakref.ref[Loan]] = []


class Loan:
    """A lent buffer. It goes back when its loss is freed, or when the next loss asks after its backward has run."""

    def __init__(self, main_grad: Tensor) -> None:
        self.main_grad = main_grad
        self.tensor: Tensor | None = _take(main_grad)

    def add(self, op: str, scale: Tensor, gradient: Tensor) -> None:
        """main_grad += scale · gradient, where `gradient` is what the forward left in the buffer."""
        if self.tensor is None:
            raise RuntimeError(
                f"{op}: the head gradient of this loss was given to a later call; call backward twice before the next forward"
            )
        self.main_grad.add_(gradient, alpha=scale.item())
        _returnable.append(weakref.ref(self))

    def __del__(self) -> None:
        if self.tensor is not None and len(_spare) < 2:
            _spare.append(self.tensor)


def lend_for(weight: Tensor, wanted: bool) -> Loan | None:
    """A buffer for the gradient of a weight that has a `main_grad`; None for one that has not. Raises ValueError if it does not fit."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not wanted:
        return None
    if torch.compiler.is_compiling():
        raise ValueError("linear_loss: weight.main_grad is not available under torch.compile; remove the attribute or do not compile")
    if main_grad.shape != weight.shape or main_grad.dtype != torch.float32 or main_grad.device != weight.device:
        raise ValueError(
            f"linear_loss: weight.main_grad must be float32 {list(weight.shape)} on {weight.device},"
            f" got {main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}"
        )
    return Loan(main_grad)


def release() -> None:
    """Gives the spare buffers back to the system."""
    _spare.clear()


def _take(like: Tensor) -> Tensor:
    while _returnable:
        loan = _returnable.pop()()
        if loan is not None and loan.tensor is not None:
            _spare.append(loan.tensor)
            loan.tensor = None
    for i, tensor in enumerate(_spare):
        if tensor.shape == like.shape and tensor.device == like.device:
            return _spare.pop(i)
    return torch.empty_like(like)
