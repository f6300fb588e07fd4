"""A backbone's layers run past its own forward: only where that gives its bits, and only while nobody listens."""

from __future__ import annotations

import pytest
import torch
from test_decoder_layer import RUNS, generated, model_of, products_run
from tiny_models import SMALL, ready
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastalign.models import decoder_stack
from fastalign.models.adapters import attach_lora
from fastalign.ops.backend import load_native

pytestmark = pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")


@pytest.fixture
def own_calls(monkeypatch):
    """One entry a call of a backbone's own forward."""
    calls, last_hidden = [], decoder_stack.last_hidden

    def count(model, ids, positions, layout, own):
        return last_hidden(model, ids, positions, layout, lambda: (calls.append(1), own())[1])

    monkeypatch.setattr("fastalign.models.backbone.last_hidden", count)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", RUNS)
def test_the_bits_are_those_of_the_backbone(monkeypatch, own_calls, family, dtype):
    if not products_run(dtype):
        pytest.skip("the packed products of this dtype are not used here")
    model = model_of(family, dtype)
    found = generated(model)
    assert len(own_calls) == 2  # the step that packs, and the one that is compared
    monkeypatch.setattr(decoder_stack, "_run", lambda *_: None)
    assert generated(model) == found
    assert len(own_calls) > 6


def test_a_backbone_that_computes_something_else_is_left_alone(own_calls):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMALL))
    kind = type(model.model)

    class Doubled(kind):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.last_hidden_state = 2 * out.last_hidden_state
            return out

    ready(model)
    plain = generated(model)
    model.model.__class__ = Doubled
    own_calls.clear()
    assert generated(model) != plain
    assert len(own_calls) > 6
    assert decoder_stack._exact[model.model][1] is False
    model.model.__class__ = kind  # another class is looked at anew
    assert generated(model) == plain


@pytest.mark.parametrize(
    "part", ["model.layers.0", "model", "model.norm", "model.rotary_emb", "model.embed_tokens", "model.layers.1.mlp.up_proj"]
)
def test_hooks_are_called(part):
    model, seen = model_of("llama"), []
    found = generated(model)
    handle = model.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    assert generated(model) == found
    assert len(seen) > 6
    handle.remove()


def test_a_forward_put_into_a_module_is_called():
    model, seen = model_of("llama"), []
    found = generated(model)
    for module in (model.model.layers[0], model.model.layers[1].mlp):
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: (seen.append(1), own(*args, **kwargs))[1]
    assert generated(model) == found
    assert len(seen) > 12


def test_logits_that_are_not_finite_decide_nothing():
    model = model_of("llama")
    weight = model.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(Exception, match="NaN"):
        generated(model)
    assert model.model not in decoder_stack._exact
    with torch.no_grad():
        weight.copy_(kept)
    generated(model)
    assert decoder_stack._exact[model.model][1]


def test_adapters_go_through_the_backbone(own_calls):
    generated(attach_lora(model_of("llama"), r=2, alpha=4, target_modules=["q_proj"]))
    assert len(own_calls) > 6
