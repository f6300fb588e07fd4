"""Giving one model instance another forward. Its class and every other instance stay as they are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.integrations.padded_batch import as_tree
from fastalign.models.attention import UnsupportedModelError
from fastalign.models.backbone import causal_lm, head_of, tree_hidden_states

Forward = Callable[[Any, Callable[..., Any], dict[str, Any]], Any]
NOT_FOR_BACKBONE = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep", "return_dict")


@dataclass
class Layer:
    """One forward that was put on an instance, and what was there before: an attribute of the instance, or None: the class's."""

    forward: Forward | None  # None: only passes on
    previous: Any
    ours: Any = None


def replace_forward(base: PreTrainedModel, mark: str, forward: Forward) -> None:
    """Makes `forward(model, previous, arguments)` the forward of this instance.

    Args:
        mark: the attribute that remembers it. Where the last forward put on the instance has the same mark, it is replaced.
        forward: gets the model, the forward below it (bound) and all arguments by name.
    """
    _drop_lost(base, mark)
    layers: list[Layer] = base.__dict__.setdefault(mark, [])
    if layers and base.__dict__.get("forward") is layers[-1].ours:
        layers[-1].forward = forward
        return
    parameters = list(inspect.signature(type(base).forward).parameters)[1:]
    index = len(layers)

    @functools.wraps(type(base).forward)  # transformers reads the signature: columns to keep, arguments of generate
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer: Layer = self.__dict__[mark][index]  # through self, so that a copy of the model finds its own
        previous = functools.partial(type(self).forward, self) if layer.previous is None else layer.previous
        if layer.forward is None:
            return previous(*args, **kwargs)
        return layer.forward(self, previous, dict(zip(parameters, args, strict=False)) | kwargs)

    ours = MethodType(replaced, base)
    layers.append(Layer(forward, base.__dict__.get("forward"), ours))
    base.__dict__["forward"] = ours


def restore_forward(base: PreTrainedModel, mark: str) -> None:
    """Undoes `replace_forward`; where another library has wrapped the forward since, ours stays below it and only passes on."""
    layers: list[Layer] = base.__dict__.get(mark, [])
    for layer in layers:
        layer.forward = None
    while layers and base.__dict__.get("forward") is layers[-1].ours:
        previous = layers.pop().previous
        if previous is None:
            del base.__dict__["forward"]
        else:
            base.__dict__["forward"] = previous
    if not layers:
        base.__dict__.pop(mark, None)


def has_forward(base: PreTrainedModel, mark: str) -> bool:
    """Whether a forward with this mark is at work."""
    _drop_lost(base, mark)
    return any(layer.forward is not None for layer in base.__dict__.get(mark, []))


def _drop_lost(base: PreTrainedModel, mark: str) -> None:
    """Forgets layers that nothing calls any more: pickle gives a method back by its name, accelerate's unwrapping the innermost one."""
    found, own = base.__dict__.get("forward"), type(base).forward
    undecorated = inspect.unwrap(own)
    if found is None or getattr(found, "__func__", None) in (own, undecorated):
        base.__dict__.pop(mark, None)


@contextmanager
def own_forward(base: PreTrainedModel) -> Iterator[None]:
    """Inside, the forward of this instance is its class's."""
    put_on = base.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if put_on is not None:
            base.__dict__["forward"] = put_on


def plain_causal_lm(model: nn.Module, what: str) -> PreTrainedModel:
    """The transformers model inside, when its loss is that of one head over one text backbone.

    Raises:
        UnsupportedModelError: encoder-decoders, models of several inputs, mixtures of experts that add a router loss, heads
            that are no floating-point nn.Linear.
        TypeError: no transformers model.
    """
    base = causal_lm(model)
    family, config = base.config.model_type, base.config.get_text_config()
    if base.config.is_encoder_decoder or config is not base.config:
        raise UnsupportedModelError(f"{what}: {family} is no plain decoder of text; only those have been tested")
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(f"{what}: {family} adds a router loss; set config.output_router_logits = False")
    head = head_of(base)
    if not head.weight.is_floating_point():
        raise UnsupportedModelError(f"{what}: the head of {family} is quantized ({head.weight.dtype}); keep it out of the quantization")
    return base


def scored_tree_rows(base: PreTrainedModel, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """`scored_rows` of a padded batch with a backbone that runs it as a token tree: hidden [N, H], targets [N], the mask.

    Raises:
        ValueError: an input that a tree has no place for (images, positions, token types).
    """
    known = {"input_ids", "attention_mask", "labels", "num_items_in_batch", "use_cache", "return_dict", "output_router_logits"}
    others = [name for name, value in arguments.items() if name not in known and value is not None]
    if others or arguments.get("input_ids") is None or arguments.get("labels") is None:
        raise ValueError(f"a packed batch is made from input_ids, attention_mask and labels alone, got {', '.join(others) or 'fewer'}")
    input_ids, shifted = arguments["input_ids"], arguments["labels"][:, 1:]
    mask = shifted != -100
    tree = as_tree(input_ids, arguments.get("attention_mask"), mask)
    if tree is None:  # nothing is scored: one token keeps the loss connected to the model
        tree = as_tree(input_ids[:1, :2], None, torch.ones(1, 1, dtype=torch.bool))
        assert tree is not None
        return tree_hidden_states(base, tree.input_ids, tree.position_ids, tree.layout)[:0], shifted[mask], mask
    return tree_hidden_states(base, tree.input_ids, tree.position_ids, tree.layout)[tree.rows], shifted[mask], mask


def scored_rows(base: PreTrainedModel, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Runs the backbone and keeps the rows that a label scores.

    Args:
        arguments: of the model's forward, by name, with `labels` [B, T] or, already shifted, `shift_labels`.

    Returns:
        hidden [N, H], targets [N], the mask [B, T-1] (of shift_labels: [B, T]) they come from, and the backbone's output.
    """
    labels, shifted, ignored = arguments.get("labels"), arguments.get("shift_labels"), arguments.get("ignore_index", -100)
    inputs = {name: value for name, value in arguments.items() if name not in NOT_FOR_BACKBONE}
    if inputs.get("output_router_logits"):
        raise UnsupportedModelError(f"{base.config.model_type}: a router loss is not computed here; leave output_router_logits off")
    if inputs.get("use_cache") is None:
        inputs["use_cache"] = False  # a loss needs no cache
    out = base.base_model(**inputs, return_dict=True)
    hidden = out.last_hidden_state
    if shifted is None:
        assert labels is not None
        _check_labels("labels", labels, hidden)
        hidden, shifted = hidden[:, :-1], labels[:, 1:]
    else:
        _check_labels("shift_labels", shifted, hidden)
    device = head_of(base).weight.device
    hidden, shifted = hidden.to(device), shifted.to(device)
    mask = shifted != ignored
    return hidden[mask], shifted[mask], mask, out


def _check_labels(name: str, given: Tensor, hidden: Tensor) -> None:
    if given.shape != hidden.shape[:2]:
        raise ValueError(f"{name}: expected {list(hidden.shape[:2])}, one a position of the input, got {list(given.shape)}")


def spread(values: Tensor | None, mask: Tensor) -> Tensor | None:
    """values [N] of the scored rows → the mask's shape, 0 elsewhere; stays connected to the graph when N = 0."""
    return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)


def probe_batch(base: PreTrainedModel) -> dict[str, Tensor]:
    """Three short random sequences, one padded, two with one prompt: input_ids, attention_mask and labels, [3, 7]."""
    generator = torch.Generator().manual_seed(0)
    device = head_of(base).weight.device
    ids = torch.randint(0, base.config.vocab_size, (3, 7), generator=generator).to(device)
    ids[2, :3] = ids[0, :3]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tolerance(base: PreTrainedModel, *, rounded: bool = False) -> float:
    """How far two computations of a log-prob may be apart, in nats: rounding in the dtype of the head, or in autocast's."""
    exact = not rounded and head_of(base).weight.dtype in (torch.float32, torch.float64)
    return 1e-4 if exact else 0.1
