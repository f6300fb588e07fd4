"""A backbone's decoder layers one after the other, while an engine generates on the CPU.

Around its layers transformers' forward makes masks, records what may be asked for and looks up defaults: a millisecond of a step, as
long as the layers of stories260k take for one token (AMD EPYC). A backbone is run this way only after a step gave the bits of its own
forward.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastalign.models import decoder_layer
from fastalign.ops.attention import PagedLayout
from fastalign.ops.gemm import active_packs

PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")


def last_hidden(model: nn.Module, ids: Tensor, positions: Tensor, layout: PagedLayout, own: Callable[[], Tensor]) -> Tensor:
    """The backbone's last hidden rows [1, T, H] of a step of generation.

    Args:
        model: the backbone, without its head.
        ids, positions: [1, T].
        layout: the step.
        own: calls the backbone itself.
    """
    kinds = (type(model), *map(type, model._modules.values()))
    known = _exact.get(model)
    if known is not None and known != (kinds, True):
        if known[0] == kinds:
            return own()
        known = None  # a part was replaced
    found = _run(model, ids, positions, layout)
    if found is None:
        return own()
    if known is None:
        theirs = own()  # writes the same keys and values once more
        if bool(theirs.isfinite().all()):
            _exact[model] = kinds, torch.equal(found, theirs)
        return theirs
    return found


_exact: WeakKeyDictionary[nn.Module, tuple[tuple[type, ...], bool]] = (
    WeakKeyDictionary()
)  # its class and its parts', whether the bits agree


def _run(model: nn.Module, ids: Tensor, positions: Tensor, layout: PagedLayout) -> Tensor | None:
    """None where this function does not know the backbone or a layer is not to be run so, now."""
    packs, parts = active_packs(), model._modules
    if packs is None or packs.quantizes or torch.is_grad_enabled() or set(parts) != set(PARTS):
        return None
    embed, layers, norm, rotary = (parts[name] for name in PARTS)
    if embed is None or layers is None or norm is None or rotary is None:
        return None
    each = layers._modules.values()
    if not all(layer is not None and decoder_layer.is_planned(layer) for layer in each):
        return None
    if not all(decoder_layer.is_plain(part) for part in (model, layers, *each)):
        return None
    x = embed(ids)
    rotation = rotary(x, positions)
    for layer in each:
        x = decoder_layer.run(layer, layer._plan, x, layout, rotation)  # type: ignore[union-attr, arg-type]
        if x is None:
            return None
    return norm(x)
