"""Proof, once a model, that running it as a token tree gives what running its sequences one by one gives."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastalign.models.attention import NAME, UnsupportedModelError, observe_calls
from fastalign.models.backbone import causal_lm, head_of, hidden_states
from fastalign.packing import Segment, pack, sequences

_probed: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()

# Attention that sees the whole past, or a window of it that reaches the attention function as `sliding_window`.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@torch.no_grad()
def probe(model: torch.nn.Module) -> None:
    """Compares a packed tree of 22 random tokens with its three sequences run alone. Cached per model object.

    Raises:
        UnsupportedModelError: naming the family and what went wrong.
    """
    base = causal_lm(model)
    if base in _probed:
        return
    family = base.config.model_type
    if base.config._attn_implementation != NAME:
        raise UnsupportedModelError(f'{family}: the attention is "{base.config._attn_implementation}"; call use_fastalign_attention(model)')
    check_config(base, family)
    training = base.training
    base.eval()
    try:
        _compare(base, family)
    finally:
        base.train(training)
    _probed[base] = True


def check_config(base: PreTrainedModel, family: str) -> None:
    """Raises UnsupportedModelError for layers that carry state along the packed row."""
    config = base.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        raise UnsupportedModelError(f"{family}: layers of type {', '.join(sorted(unknown))} carry state along the packed row")


def _compare(base: PreTrainedModel, family: str) -> None:
    generator = torch.Generator().manual_seed(0)
    device, head = next(base.parameters()).device, head_of(base)
    ids = torch.randint(0, head.weight.shape[0], (22,), generator=generator).tolist()
    deep = Segment(ids[5:9], children=(Segment(ids[9:14]), Segment(ids[14:17])))
    packed = pack([Segment(ids[:5], children=(deep,)), Segment(ids[17:])])
    try:
        with observe_calls() as calls:
            tree = _logits(base, hidden_states(base, packed.to(device)))
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{family}: the packed forward failed: {error}") from error
    if not calls:
        raise UnsupportedModelError(f"{family}: the attention layout never reaches the attention function, so packed sequences would mix")
    check_calls(base, family, calls)
    tolerance = 2e-3 if head.weight.dtype == torch.float32 else 0.1
    for rows, path in zip(_paths(packed.cu_seqlens, packed.parent), sequences(packed), strict=True):
        alone = base(input_ids=torch.tensor([path], device=device), use_cache=False).logits[0].float()
        off = (tree[rows] - alone).abs().max().item() / max(1.0, alone.abs().max().item())
        if not off <= tolerance:
            raise UnsupportedModelError(f"{family}: packed logits are off by {off:.2g} of their size from separate ones, over {tolerance}")


def check_calls(base: PreTrainedModel, family: str, calls: list[dict]) -> None:
    """Raises UnsupportedModelError unless every layer read the attention layout, each with its own window."""
    layers = {call["layer"] for call in calls}
    if len(calls) != len(layers):
        raise UnsupportedModelError(
            f"{family}: {len(calls)} attention calls of {len(layers)} layers; a layer that attends twice has one place for keys and values"
        )
    expected = base.config.get_text_config().num_hidden_layers
    if len(layers) != expected:
        raise UnsupportedModelError(f"{family}: only {len(layers)} of {expected} layers read the attention layout")
    types = getattr(base.config.get_text_config(), "layer_types", None) or []
    for call in calls:
        if call["layer"] < len(types) and (types[call["layer"]] == "sliding_attention") != (call["window"] is not None):
            raise UnsupportedModelError(f"{family}: layer {call['layer']} is {types[call['layer']]} but its window is {call['window']}")


def _logits(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = head_of(base)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    if head.logit_softcap is not None:
        logits = torch.tanh(logits / head.logit_softcap) * head.logit_softcap
    return logits * head.logit_scale


def _paths(cu_seqlens: Tensor, parent: Tensor) -> list[Tensor]:
    """The rows of every root-to-leaf path, in the order of `packing.sequences`."""
    bounds, parents = cu_seqlens.tolist(), parent.tolist()
    paths = []
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        chain, s = [], leaf
        while s >= 0:
            chain.append(torch.arange(bounds[s], bounds[s + 1]))
            s = parents[s]
        paths.append(torch.cat(chain[::-1]))
    return paths
