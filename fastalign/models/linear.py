"""nn.Linear whose fp32 rows have the same bits in any batch, on the CPU."""

from __future__ import annotations

from torch import Tensor, nn

from fastalign.ops.gemm import linear


class RowLinear(nn.Linear):
    """An nn.Linear that multiplies through `ops.gemm`: same parameters, same state dict, same saved files."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_row_linears(model: nn.Module) -> None:
    """Turns every plain nn.Linear of a model into a `RowLinear`, in place; subclasses (quantized, adapted) stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
