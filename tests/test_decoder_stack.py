"""A backbone's layers run past its own forward: only where that gives its bits, and only while nobody listens."""

from __future__ import annotations

import pytest
import torch
from test_decoder_layer import RUNS, generated, model_of, products_run
from tiny_models import SMALL, ready
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastalign.models import decoder_layer, decoder_stack
from fastalign.models.adapters import attach_lora
from fastalign.models.attention import reading_layout
from fastalign.ops.attention import PagedLayout
from fastalign.ops.backend import load_native
from fastalign.ops.gemm import PackedWeights

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
    model.model.__class__ = kind
    own_calls.clear()
    assert generated(model) == plain
    assert len(own_calls) == 1  # the step that packs


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


def step_of(model):
    """A step of three tokens of one sequence, and what is to be called with it."""
    rows, config = 3, model.config
    lengths = torch.tensor([0, rows], dtype=torch.int32)
    shape = (1, config.num_key_value_heads, 4, config.head_dim)
    keys, values = ([torch.zeros(shape) for _ in range(config.num_hidden_layers)] for _ in range(2))
    layout = PagedLayout(lengths, lengths[1:], torch.zeros(1, 1, dtype=torch.int32), torch.arange(rows), keys, values)
    return torch.tensor([[3, 4, 5]]), torch.arange(rows)[None], layout


def test_rows_that_are_not_finite_decide_nothing():
    model = model_of("llama").model
    ids, positions, layout = step_of(model)
    with torch.no_grad(), reading_layout(), PackedWeights().active():

        def own():
            return model(input_ids=ids, position_ids=positions, use_cache=False, attention_layout=layout).last_hidden_state

        truth = decoder_stack.last_hidden(model, ids, positions, layout, own)  # packs
        assert decoder_stack.last_hidden(model, ids, positions, layout, lambda: own() * torch.nan).isnan().all()
        assert model not in decoder_stack._exact
        assert torch.equal(decoder_stack.last_hidden(model, ids, positions, layout, own), truth)
        assert decoder_stack._exact[model][1]
        assert torch.equal(decoder_stack.last_hidden(model, ids, positions, layout, None), truth)


def test_a_layer_that_is_not_ready_costs_the_others_nothing(monkeypatch, own_calls):
    model, runs, run = model_of("llama"), [], decoder_layer.run
    generated(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    own_calls.clear()
    monkeypatch.setattr(decoder_layer, "run", lambda *arguments: (runs.append(1), run(*arguments))[1])
    generated(model)
    assert len(runs) == len(own_calls) - 1 > 6  # the first layer alone, and not in the step that packs
    handle.remove()


def test_fewer_layers_are_fewer(monkeypatch):
    model = model_of("llama")
    before = generated(model)
    model.config.num_hidden_layers = 1
    found = generated(model)
    assert found != before
    monkeypatch.setattr(decoder_stack, "_run", lambda *_: None)
    assert generated(model) == found


def test_a_backbone_that_asks_its_parts_otherwise_keeps_its_forward(own_calls):
    if "mellum" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no family whose rotary embedding asks for a kind of layer")
    sizes = SMALL | {"head_dim": 16, "mlp_layer_types": ["dense", "dense"]}
    generated(ready(AutoModelForCausalLM.from_config(CONFIG_MAPPING["mellum"](**sizes))))
    assert len(own_calls) > 6


def test_adapters_go_through_the_backbone(own_calls):
    generated(attach_lora(model_of("llama"), r=2, alpha=4, target_modules=["q_proj"]))
    assert len(own_calls) > 6
