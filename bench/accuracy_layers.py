"""rms_norm, swiglu and rope: values and gradients; plain torch is what the models of transformers compute."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from bench.layers import Layer, layers, value_and_gradients

NAMES = {"rms_norm": ("y", "dx", "dweight"), "swiglu": ("y", "dgate", "dup"), "rope": ("y", "dx")}


def _case(at: At, op: str) -> Case:
    tokens, *sizes = (37, 72, 100, 2, 16) if at.quick else (515, 512, 1408, 8, 64)
    layer: Layer = layers(at.randn, tokens, *sizes)[op]
    grad = at.randn(*layer.torch(*layer.inputs).shape)

    def run(function: object, dtype: torch.dtype) -> Values:
        inputs: list[Tensor] = [t.to(dtype) for t in layer.inputs]
        return dict(zip(NAMES[op], value_and_gradients(function, inputs, layer.num_grads, grad.to(dtype)), strict=True))  # type: ignore[arg-type]

    return Case(lambda: run(layer.ours, at.dtype), run(layer.torch, at.dtype), run(layer.torch, torch.float64))


@accuracy("rms_norm")
def rms_norm(at: At) -> Case:
    return _case(at, "rms_norm")


@accuracy("swiglu")
def swiglu(at: At) -> Case:
    return _case(at, "swiglu")


@accuracy("rope")
def rope(at: At) -> Case:
    return _case(at, "rope")
