"""The attention that reads a layout, as transformers knows it: `model.set_attn_implementation("fastalign")`.

A model called with `attention_layout=TreeLayout(...)` or `PagedLayout(...)` attends by that layout; called without, it
behaves as with "sdpa" and honours the attention mask, so `model(...)` and `model.generate(...)` keep working.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastalign.models.decoder_layer import use_decoder_runs
from fastalign.models.fused_layers import use_fused_layers
from fastalign.models.linear import use_row_linears
from fastalign.ops.attention import PagedLayout, TreeLayout, paged_attention, tree_attention

NAME = "fastalign"


class UnsupportedModelError(ValueError):
    """The model cannot run as a token tree; the message names the family and the reason."""


_observers: ContextVar[list[dict[str, Any]] | None] = ContextVar("fastalign_attention_calls", default=None)
_reading_layout: ContextVar[bool] = ContextVar("fastalign_reading_layout", default=False)


@contextmanager
def reading_layout() -> Iterator[None]:
    """Inside, transformers builds no dense [T, T] mask: the layout says who sees whom."""
    token = _reading_layout.set(True)
    try:
        yield
    finally:
        _reading_layout.reset(token)


@contextmanager
def observe_calls() -> Iterator[list[dict[str, Any]]]:
    """Inside, every attention call that reads a layout is noted: {"layer": int, "scale": float, "window", "softcap": a number or None}."""
    calls: list[dict[str, Any]] = []
    token = _observers.set(calls)
    try:
        yield calls
    finally:
        _observers.reset(token)


def register() -> None:
    """Makes "fastalign" a name that `set_attn_implementation` accepts. Harmless when repeated."""
    AttentionInterface.register(NAME, fastalign_attention)
    AttentionMaskInterface.register(NAME, _mask)


def use_fastalign_attention(model: PreTrainedModel) -> None:
    """Switches a model to the attention that reads a layout, to linears whose rows do not depend on the batch and to fused layers, which
    generation runs without what is between them.

    Raises:
        UnsupportedModelError: when the family does not route its attention through transformers' AttentionInterface.
    """
    register()
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(f"{model.config.model_type}: the family has its own attention code and never calls AttentionInterface")
    model.set_attn_implementation(NAME)
    use_row_linears(model)
    use_fused_layers(model)
    use_decoder_runs(model)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0: a sample and its training forward must see the same network."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # plain numbers that families hand to the attention function
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def fastalign_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    attention_layout: TreeLayout | PagedLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query [B, Hq, L, D], key and value [B, Hkv, L, D] → ([B, L, Hq, D], None).

    Raises:
        UnsupportedModelError: for attention sinks, which no backend of this op computes.
        ValueError: with a layout, when the batch is not 1 or dropout is not 0.
    """
    if s_aux is not None:
        raise UnsupportedModelError(f"{type(module).__name__}: attention sinks (s_aux) are not computed by the fastalign attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if attention_layout is None:
        return _plain(module, query, key, value, attention_mask, scale, dropout, softcap, kwargs), None
    if query.shape[0] != 1:
        raise ValueError(f"fastalign attention: a layout describes one packed row, expected batch size 1, got {query.shape[0]}")
    if dropout:
        raise ValueError(f"fastalign attention: expected dropout 0, got {dropout}; call fastalign.models.attention.disable_dropout(model)")
    calls = _observers.get()
    if calls is not None:
        layer = getattr(module, "layer_idx", len(calls))
        calls.append({"layer": layer, "window": sliding_window, "scale": scale, "softcap": softcap})
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type):  # as sdpa does: rotary embeddings leave q and k wider than v
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if isinstance(attention_layout, TreeLayout):
        out = tree_attention(q, k, v, attention_layout, scale=scale, window=sliding_window, softcap=softcap)
    else:
        layer = module.layer_idx
        assert isinstance(layer, int)
        out = paged_attention(q, k, v, attention_layout, layer, scale=scale, window=sliding_window, softcap=softcap)
    return out[None], None


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention without a layout: sdpa, or its definition where a soft-cap asks for the scores themselves."""
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)[0]
    group = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, group), repeat_kv(value, group)
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is None and query.shape[2] > 1:  # sdpa_mask leaves a purely causal mask to the kernel
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - query.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training).nan_to_num()  # a padding row sees no key
    return (weights @ value).transpose(1, 2).contiguous()


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _reading_layout.get() else sdpa_mask(*args, **kwargs)
