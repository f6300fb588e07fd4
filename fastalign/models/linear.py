"""nn.Linear whose fp32 rows have the same bits in any batch, on the CPU; inside a quantized engine, with int8 weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastalign.catalogue import nearest
from fastalign.models.recorded import Recording, listener
from fastalign.ops.gemm import PackedWeights, linear
from fastalign.ops.int8 import QUANTIZATIONS, active_weights


class RowLinear(nn.Linear):
    """An nn.Linear that multiplies through `ops.gemm`: same parameters, same state dict, same saved files."""

    def forward(self, input: Tensor) -> Tensor:
        heard = listener()
        return self.product(input) if heard is None else heard.linear(self, input)

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] · weight [N, K]ᵀ + bias → [..., N]."""
        quantized = active_weights()
        if quantized is None or torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        return quantized.linear(x, self.weight, self.bias)


def use_row_linears(model: nn.Module) -> None:
    """Turns every plain nn.Linear of a model into a `RowLinear`, in place; subclasses (quantized, adapted) stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear


def recording_of(model: nn.Module, num_rows: int, max_bytes: int) -> Recording:
    """Room for what a model's layers put out for so many tokens.

    Args:
        model: a causal LM with row linears.
        num_rows: tokens that will be forwarded, each once.
        max_bytes: of memory.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [module for module in model.modules() if isinstance(module, RowLinear) and module is not head]
    row_bytes = sum(layer.out_features * layer.weight.element_size() for layer in layers)
    most = min(num_rows, max_bytes // max(1, row_bytes))
    return Recording(most + MOST_PADDING, max_bytes, row_bytes)


MOST_PADDING = 64  # rows that a pass may have beside its tokens


def packs_for(model: nn.Module, quantization: str | None) -> PackedWeights:
    """The copies of a model's weights that an engine multiplies by.

    Raises:
        ValueError: as `check_quantization`.
    """
    check_quantization(model, quantization)
    return PackedWeights(quantization)


def check_quantization(model: nn.Module, quantization: str | None) -> None:
    """Raises where a model's linear layers cannot be multiplied as integers.

    Args:
        model: a transformers causal LM with row linears; its head, embeddings and what is no nn.Linear are never quantized.
        quantization: None or a name of `ops.int8.QUANTIZATIONS`.

    Raises:
        ValueError: an unknown name, a device or dtype without a kernel, a model without a linear layer beside its head.
    """
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"Engine: {nearest(str(quantization), QUANTIZATIONS, prefix='quantization ')}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = [module for module in model.modules() if isinstance(module, RowLinear) and module is not head]
    if not layers:
        raise ValueError(f"Engine: quantization={quantization!r}: {type(model).__name__} has no nn.Linear beside its head; leave it out")
    for weight in (layer.weight for layer in layers):
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"Engine: quantization={quantization!r} is for float32 and bfloat16 weights on the CPU, got {weight.dtype} on "
                f"{weight.device}; leave it out"
            )
