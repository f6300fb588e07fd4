"""Which of a model's adapters computes. One set of frozen base weights serves as many models as it has adapters.

PEFT's `set_adapter` and `disable_adapter` also freeze every adapter but the chosen one. A parameter that requires no gradient when the
backward pass reaches it gets none, without a word, so a critic would stop to learn at the reference's first forward. Here a switch
changes what computes and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

POLICY = "default"  # PEFT's name of a model's first adapter, which it saves at the top of a folder
REFERENCE = "reference"  # a frozen adapter that is the reference; without one the base is


def adapter_layers(model: nn.Module) -> Iterator[Any]:
    """PEFT's layers inside a model."""
    return (module for module in model.modules() if "_disable_adapters" in vars(module))


def current_adapter(model: nn.Module) -> str | None:
    """The adapter that computes; None: none does."""
    layer = next(adapter_layers(model))
    return None if layer.disable_adapters else layer.active_adapters[0]


def belongs(parameter: str, adapter: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return f".{adapter}." in parameter or parameter.endswith(f".{adapter}")


def parameters_of(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """One adapter's parameters, in the model's order."""
    return [p for name, p in model.named_parameters() if belongs(name, adapter)]


def own_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of the model; of several adapters only the current one's, for the others are other models'."""
    known: Any = getattr(model, "peft_config", {})
    others = known.keys() - {current_adapter(model)} if len(known) > 1 else ()
    return [(name, p) for name, p in model.named_parameters() if not any(belongs(name, each) for each in others)]


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those of `own_parameters` that require a gradient."""
    return [(name, p) for name, p in own_parameters(model) if p.requires_grad]


@contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """Inside, forward passes run with one adapter; no parameter's `requires_grad` changes.

    Args:
        model: a PEFT model.
        name: the adapter; None: none, the base alone.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    known: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    if name is not None and name not in known:
        raise ValueError(f"using_adapter: the model has no adapter {name!r}; it has {', '.join(known)}")
    if current_adapter(model) == name:
        yield model
        return
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in adapter_layers(model)]
    try:
        for layer, _, _ in before:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        yield model
    finally:
        for layer, disabled, active in before:
            layer._disable_adapters, layer._active_adapter = disabled, active


def recompute_contexts(model: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of gradient checkpointing: what is computed anew in the backward pass uses the adapter that the forward pass used."""
    return nullcontext(), using_adapter(model, current_adapter(model))
