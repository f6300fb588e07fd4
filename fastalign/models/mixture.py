"""The geometric mixture of two causal language models as one model, which the engine samples like any other.

π_mix(a | s) ∝ π(a | s)^(1-β) π_ref(a | s)^β is the softmax of (1-β) z + β z_ref: one linear head over both backbones' hidden rows side by
side. So a mixture is a backbone of twice the layers and a head [(1-β) W, β W_ref], and one KV cache holds both.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastalign.models.attention import UnsupportedModelError
from fastalign.models.backbone import Head, causal_lm, head_of


class GeometricMixture(PreTrainedModel):
    """π^(1-β) π_ref^β, normalized. It shares both models' weights; its head is a copy, which `refresh` brings up to date.

    The reference's attention layers are counted on from the model's last one, for the KV cache that both share.

    Args:
        model: π, live.
        reference: another model of the same configuration; nobody else may sample from it.
        coefficient: β in [0, 1]; 0 is the model, 1 the reference.

    Raises:
        UnsupportedModelError: models of different configurations, or logits that are no linear function of hidden rows.
        ValueError: a coefficient out of range.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "backbones"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, model: nn.Module, reference: nn.Module, coefficient: float) -> None:
        if not 0 <= coefficient <= 1:
            raise ValueError(f"GeometricMixture: expected a coefficient from 0 to 1, got {coefficient}")
        first, second = causal_lm(model), causal_lm(reference)
        config = copy.deepcopy(first.config)
        super().__init__(config)
        own, other = head_of(first), head_of(second)
        _check(first, second, own, other)
        layers = first.config.get_text_config().num_hidden_layers
        self.config.get_text_config().num_hidden_layers = 2 * layers
        for module in second.modules():
            if isinstance(getattr(module, "layer_idx", None), int) and not getattr(module, "counted_on", False):
                module.layer_idx, module.counted_on = int(module.layer_idx) + layers, True  # type: ignore[assignment]
        self.backbones = _Backbones(first, second)
        self.coefficient, self.generation_config = coefficient, first.generation_config
        vocab, width = own.weight.shape
        self.head = nn.Linear(2 * width, vocab, bias=own.bias is not None, device=own.weight.device, dtype=own.weight.dtype)
        self.head.requires_grad_(False)
        self.refresh()

    def refresh(self) -> None:
        """Brings the head up to date with both models' heads; call it inside the engine's `updating_weights`."""
        first, second = (head_of(model) for model in self.backbones.models)
        weights = 1 - self.coefficient, self.coefficient
        with torch.no_grad():
            torch.cat([weights[0] * first.weight, weights[1] * second.weight], 1, out=self.head.weight)
            if first.bias is not None and second.bias is not None:
                self.head.bias.copy_(weights[0] * first.bias + weights[1] * second.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbones.models[0].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class _Backbones(nn.Module):
    """Both backbones of one packed row."""

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel) -> None:
        super().__init__()
        self.models = nn.ModuleList([first, second])

    def forward(self, **arguments: Any) -> SimpleNamespace:
        """The hidden rows of both models side by side: last_hidden_state [1, T, 2H]."""
        rows: list[Tensor] = [model.base_model(**arguments).last_hidden_state for model in self.models]  # type: ignore[operator]
        return SimpleNamespace(last_hidden_state=torch.cat(rows, -1))


def _check(first: PreTrainedModel, second: PreTrainedModel, own: Head, other: Head) -> None:
    if first is second:
        raise UnsupportedModelError("a mixture needs two models, got one twice; an adapter that is switched off is no model of its own")
    shapes = own.weight.shape, other.weight.shape
    if first.config.model_type != second.config.model_type or shapes[0] != shapes[1] or own.logit_scale != other.logit_scale:
        raise UnsupportedModelError(f"a mixture needs models of one configuration, got {first.config.model_type} {tuple(shapes[0])} and "
                                    f"{second.config.model_type} {tuple(shapes[1])}")  # fmt: skip
    if own.logit_softcap is not None:
        raise UnsupportedModelError(f"{first.config.model_type}: soft-capped logits cannot be mixed by one linear head")
