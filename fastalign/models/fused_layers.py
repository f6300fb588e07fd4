"""A model's own norms, gates and rotary embeddings through `ops`, on the CPU: same parameters, same state dict, same saved files.

Which classes compute what the ops compute is not read off their names alone: each is run on random numbers beside the op, and
what differs (Gemma's 1 + weight, GELU gates, partial or interleaved rotations) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastalign.ops.rms_norm import rms_norm
from fastalign.ops.rope import rope
from fastalign.ops.swiglu import swiglu

ROPE = "apply_rotary_pos_emb"  # what transformers' attention calls, by this name
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def use_fused_layers(model: nn.Module) -> None:
    """Turns the norms, MLPs and attentions of a model that the ops compute into subclasses that call them, in place.

    On another device, dtype or under torch.compile they run what they ran before.
    """
    with torch.no_grad():
        for module in model.modules():
            if is_fused(module):
                continue  # again
            fused = next((make(module) for fits, make in _LAYERS if fits(module)), None)
            if fused is not None:
                module.__class__ = fused


def is_fused(module: nn.Module) -> bool:
    """Whether `use_fused_layers` made its class."""
    return type(module) in _classes.values()


def _known(kind: type, make: Callable[[type], dict[str, Any]]) -> type:
    """The subclass of `kind` with what `make` gives; made once."""
    if kind not in _classes:
        _classes[kind] = type(f"Fused{kind.__name__}", (kind,), {"__module__": kind.__module__, **make(kind)})
    return _classes[kind]


_classes: dict[type, type] = {}
_looks: dict[tuple[Any, ...], bool] = {}  # what was compared → whether it agreed


def _agrees(key: tuple[Any, ...], compare: Callable[[], bool]) -> bool:
    if key not in _looks:
        try:
            _looks[key] = compare()
        except (RuntimeError, ValueError, TypeError, IndexError):  # it does not even take such inputs
            _looks[key] = False
    return _looks[key]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """To the dtype's rounding, of the largest value."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    error, size = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    return bool(error <= TOLERANCE[ours.dtype] * size)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _plain(weight: Any) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.dtype in TOLERANCE


def _fits_norm(module: nn.Module) -> bool:
    eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    if not isinstance(eps, float) or not _plain(weight) or weight.dim() != 1 or len(list(module.parameters())) != 1:
        return False

    def compare() -> bool:
        x, other = _random(3, len(weight), dtype=weight.dtype), _random(1, len(weight), dtype=weight.dtype)[0]
        theirs = torch.func.functional_call(module, {"weight": other}, (x,))
        return _close(rms_norm(x, other, eps=eps), theirs)

    return _agrees((type(module), weight.dtype, len(weight), eps), compare)


def _norm(module: nn.Module) -> type:
    def make(kind: type) -> dict[str, Any]:
        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

        return {"forward": forward}

    return _known(type(module), make)


def _fits_mlp(module: nn.Module) -> bool:
    layers: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if len(list(module.children())) != 4 or type(getattr(module, "act_fn", None)).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    if not all(isinstance(layer, nn.Linear) and _plain(layer.weight) for layer in layers):
        return False
    weight = layers[0].weight

    def compare() -> bool:
        x = _random(2, weight.shape[-1], dtype=weight.dtype)
        return _close(_mlp_forward(module, x), module(x))

    return _agrees((type(module), weight.dtype, *(layer.weight.shape for layer in layers)), compare)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _mlp(module: nn.Module) -> type:
    return _known(type(module), lambda kind: {"forward": _mlp_forward})


def _fits_attention(module: nn.Module) -> bool:
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or forward.__closure__ is not None or ROPE not in forward.__code__.co_names:
        return False
    theirs = forward.__globals__.get(ROPE)
    if not isinstance(theirs, FunctionType):
        return False

    def compare() -> bool:
        q, k, angle = _random(1, 2, 3, 8), _random(1, 1, 3, 8) + 1, _random(1, 3, 8)
        cos, sin = angle.cos(), angle.sin()
        found = theirs(q, k, cos, sin)
        return _close(rope(q, cos, sin), found[0]) and _close(rope(k, cos, sin), found[1])

    return _agrees((theirs,), compare)


def _attention(module: nn.Module) -> type:
    """The family's own forward, with the op under the name of the function that it calls."""

    def make(kind: type) -> dict[str, Any]:
        forward: Any = kind.forward  # type: ignore[attr-defined]
        theirs = forward.__globals__[ROPE]

        def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if args or kwargs or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:  # a part of the head may be rotated alone
                return theirs(q, k, cos, sin, *args, **kwargs)
            return rope(q, cos, sin), rope(k, cos, sin)

        copy = FunctionType(forward.__code__, {**forward.__globals__, ROPE: apply}, forward.__name__, forward.__defaults__)
        copy.__kwdefaults__, copy.__annotations__, copy.__doc__ = forward.__kwdefaults__, forward.__annotations__, forward.__doc__
        return {"forward": copy}

    return _known(type(module), make)


_LAYERS = ((_fits_norm, _norm), (_fits_mlp, _mlp), (_fits_attention, _attention))
