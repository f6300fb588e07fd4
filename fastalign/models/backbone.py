"""A causal language model taken apart: the backbone that gives hidden rows, and the head that the fused losses read."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastalign.models.attention import UnsupportedModelError, reading_layout
from fastalign.models.decoder_stack import last_hidden
from fastalign.models.recorded import listener
from fastalign.models.row_counts import row_counts
from fastalign.ops.attention import PagedLayout, TreeLayout
from fastalign.packing import Packed


@dataclass(frozen=True)
class Head:
    """How logits come from hidden rows: logit_scale * softcap(hidden @ weightᵀ + bias).

    Attributes:
        weight: [V, H], the parameter itself.
        bias: [V] or None.
        logit_softcap: logits become softcap * tanh(logits / softcap), or None.
        logit_scale: multiplies the logits (cohere's logit_scale, granite's 1 / logits_scaling).
    """

    weight: Tensor
    bias: Tensor | None
    logit_softcap: float | None
    logit_scale: float

    def temperature(self, temperature: float = 1.0) -> float:
        """The sampling temperature and the model's scale as the one divisor that the ops of logits take."""
        return temperature / self.logit_scale


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside: the model itself, or what a PEFT wrapper wraps (its layers carry the adapter)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel):
        inner = getattr(base, "_orig_mod", None) or getattr(base, "module", None)  # torch.compile's name of it, and DataParallel's
        hint = "; give the model inside, before it is wrapped" if isinstance(inner, nn.Module) else ""
        raise TypeError(f"expected a transformers PreTrainedModel or a PEFT model around one, got {type(base).__name__}{hint}")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(f"{base.config.model_type}: prompt-learning adapters add virtual tokens to every sequence; use LoRA")
    return base


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a sequence may have, by the positions and by what the rotary embedding bears; None where nothing bounds it."""
    config = causal_lm(model).config.get_text_config()
    bounds = (getattr(config, "max_position_embeddings", None), _rope_limit(config))
    return min((bound for bound in bounds if bound is not None), default=None)


def within_positions(max_length: int, model: nn.Module) -> int:
    """The length of a sequence, at most the model's positions."""
    positions = positions_of(model)
    return max_length if positions is None else min(max_length, positions)


def head_of(model: nn.Module) -> Head:
    """The head of a causal LM, with what its family does to the logits.

    Raises:
        UnsupportedModelError: when there is no linear head, or an adapter sits on it.
    """
    base = causal_lm(model)
    family = base.config.model_type
    head = base.get_output_embeddings()
    saved = getattr(head, "modules_to_save", None)  # PEFT trains a full copy of the head
    if saved is not None and head.disable_adapters:
        head = head.original_module
    elif saved is not None:
        head = saved[head.active_adapter] if isinstance(head.active_adapter, str) else saved[head.active_adapter[0]]
    if not isinstance(head, nn.Linear):
        if head is None:
            raise UnsupportedModelError(f"{family}: {type(base).__name__} has no head over the vocabulary; load it as AutoModelForCausalLM")
        found = f"{type(head).__module__}.{type(head).__name__}"  # PEFT's adapted layer is called Linear, too
        raise UnsupportedModelError(f"{family}: the output embeddings must be one nn.Linear, got {found}; keep adapters off the head")
    config = base.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    if softcap is not None and scale != 1.0:
        raise UnsupportedModelError(f"{family}: both a final soft-cap and a logit scale; their order is not known to fastalign")
    return Head(head.weight, head.bias, softcap, scale)


def hidden_states(model: nn.Module, packed: Packed) -> Tensor:
    """The backbone's last hidden rows of a token tree, differentiable.

    Args:
        model: a causal LM with the "fastalign" attention (`load.load_causal_lm`), or a PEFT model around one.
        packed: the tree, its ids on the model's device. T tokens.

    Returns:
        [T, H] in the model's dtype.
    """
    return tree_hidden_states(model, packed.input_ids, packed.position_ids, TreeLayout(packed.cu_seqlens, packed.parent))


def tree_hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor, layout: TreeLayout) -> Tensor:
    """`hidden_states` of a tree that is given by its parts, [T, H]."""
    return _forward(model, input_ids, position_ids, layout)


def paged_hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor, layout: PagedLayout) -> Tensor:
    """The backbone's last hidden rows of one generation step, [T, H]; keys and values go to the layout's cache."""
    return _forward(model, input_ids, position_ids, layout)


def _forward(model: nn.Module, input_ids: Tensor, position_ids: Tensor, layout: TreeLayout | PagedLayout) -> Tensor:
    base = causal_lm(model)
    rows = input_ids.shape[0]
    steps = isinstance(layout, PagedLayout)  # of an engine, which keeps to the limit itself: asking a GPU would stop it
    limit = None if steps and position_ids.is_cuda else _rope_limit(base.config.get_text_config())
    if limit is not None and rows and int(position_ids.max()) >= limit:
        raise UnsupportedModelError(
            f"{base.config.model_type}: its rotary embedding changes for the whole batch past position {limit}, got "
            f"{int(position_ids.max())}; keep sequences within {limit} tokens"
        )
    padding = row_counts(base).padding(rows) if input_ids.device.type == "cpu" else 0
    if padding:
        input_ids = nn.functional.pad(input_ids, (0, padding))
        position_ids = nn.functional.pad(position_ids, (0, padding))
    if (heard := listener()) is not None:
        heard.begin(rows, rows + padding)
    ids, positions = input_ids[None], position_ids[None]

    def own() -> Tensor:
        made = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # a 4-D mask counts as ready; our attention reads the layout
        arguments: dict[str, Any] = {"attention_mask": made, "use_cache": False, "return_dict": True, "attention_layout": layout}
        return base.base_model(input_ids=ids, position_ids=positions, **arguments).last_hidden_state

    activated = getattr(model, "activated", nullcontext)  # one adapter of several says when it is its turn
    with reading_layout(), activated():
        ours = steps and ids.device.type == "cpu"
        out = last_hidden(base.base_model, ids, positions, layout, own) if ours else own()  # type: ignore[arg-type]
    return out[0, :rows]


def _rope_limit(config: PreTrainedConfig) -> int | None:
    """The longest sequence whose rotary frequencies do not depend on the others in the batch; None: any."""
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            limits.append(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(limits, default=None)
