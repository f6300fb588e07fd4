"""Decoder layers as one run of native calls: only where that gives the bits of their own forward, and only in generation."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, SMALL, prompts_of, ready
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import fastalign as fa
from fastalign.models import decoder_layer, decoder_run
from fastalign.models.adapters import attach_lora
from fastalign.models.attention import use_fastalign_attention
from fastalign.ops.backend import load_native, use_backend

NATIVE = load_native()[0]
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")

RUNS = ["llama", "qwen2", "qwen3", "mistral"]
OWN = ["gemma2", "gpt2", "phi3"]


def model_of(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = SMALL | {"head_dim": 16} | changes
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": SMALL["vocab_size"]}
    return ready(AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes)).to(dtype))


def planned(model):
    return [decoder_layer.plan_of(m) for m in model.modules() if decoder_layer.is_planned(m)]


def generated(model, **options):
    params = fa.SamplingParams(n=2, max_tokens=9, seed=3, ignore_eos=True)
    outputs = fa.Engine(model, **options).generate(prompts_of(5, 11, 1), params)
    return [(o.token_ids, o.logprobs, o.raw_logprobs) for group in outputs for o in group.outputs]


@pytest.fixture
def counted(monkeypatch):
    """How often a layer was ready to be run, and how often it was left to its own forward."""
    counts, ready = {True: 0, False: 0}, decoder_layer.ready

    def count(*arguments):
        found = ready(*arguments)
        counts[found is not None] += 1
        return found

    monkeypatch.setattr(decoder_layer, "ready", count)
    return counts


def products_run(dtype):
    """Whether this machine's products of a dtype have a packed form with the dense bits, which these runs need."""
    return bool(planned(model_of("llama", dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", RUNS)
def test_runs_have_the_bits_of_the_layers(monkeypatch, counted, family, dtype):
    if not products_run(dtype):
        pytest.skip("the packed products of this dtype are not used here")
    changes = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {"sliding_window": 6} if family == "mistral" else {}
    model = model_of(family, dtype, **changes)
    assert len(planned(model)) == 2
    assert all(plan.window == changes.get("sliding_window") for plan in planned(model))
    counted.update({True: 0, False: 0})
    found = generated(model)
    assert counted[True] > counted[False] == 3  # the first step packs the weights: the stack asks for one layer, then each asks itself
    monkeypatch.setattr(decoder_layer, "run", lambda *_: None)
    assert generated(model) == found


def test_models_that_differ_in_their_configuration_alone_have_plans_of_their_own():
    windows = [plan.window for window in (6, None, 5) for plan in planned(model_of("mistral", sliding_window=window))]
    assert windows == [6, 6, None, None, 5, 5]


@pytest.mark.parametrize("family", OWN)
def test_other_shapes_keep_their_own_forward(family):
    assert not planned(model_of(family))


def test_a_layer_that_computes_something_else_is_left_alone():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMALL))
    kind = type(model.model.layers[0])

    class Halved(kind):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) / 2

    model.model.layers[1].__class__ = Halved
    assert len(planned(ready(model))) == 1
    use_fastalign_attention(model)  # again: no class upon a class
    assert [type(layer).__mro__[1] for layer in model.model.layers] == [kind, kind]
    assert [type(layer).__name__ for layer in model.model.layers] == [kind.__name__, "Halved"]  # what FSDP policies look for


def test_gradients_trees_and_copies_are_as_before(counted):
    model = model_of("llama")
    counted.update({True: 0, False: 0})
    ids = torch.tensor([prompts_of(7)[0]])
    model(ids).logits.sum().backward()
    assert counted == {True: 0, False: 0}
    assert all(p.grad is not None for p in model.parameters())
    twin = copy.deepcopy(model)
    assert planned(twin) == planned(model)
    assert generated(twin) == generated(model)


@pytest.mark.parametrize("part", ["mlp", "self_attn.o_proj", "post_attention_layernorm"])
def test_hooks_on_a_part_are_called(part):
    model, seen = model_of("llama"), []
    handle = model.model.layers[1].get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    found = generated(model)
    assert len(seen) > 3
    handle.remove()
    assert generated(model) == found


def test_adapters_and_integers_go_through_the_layer(counted):
    model = model_of("llama")
    counted.update({True: 0, False: 0})
    generated(model, quantization="int8")
    assert counted[True] == 0
    generated(attach_lora(model, r=2, alpha=4, target_modules=["q_proj"]))
    assert counted[True] == 0


def test_layers_that_were_numbered_anew_write_their_own_cache():
    model = model_of("llama")
    for layer, number in zip(model.model.layers, (1, 0), strict=True):
        layer.self_attn.layer_idx = number
    found = generated(model)
    for layer, number in zip(model.model.layers, (0, 1), strict=True):
        layer.self_attn.layer_idx = number
    assert generated(model) == found


def own_forward(monkeypatch):
    monkeypatch.setattr(decoder_layer, "run", lambda *_: None)


def test_a_part_that_was_replaced_is_called(monkeypatch):
    model = model_of("llama")
    before = generated(model)
    mlp = model.model.layers[0].mlp

    class Doubled(type(mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp.__class__ = Doubled
    found = generated(model)
    assert found != before
    own_forward(monkeypatch)
    assert generated(model) == found


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_head_norms_that_were_replaced_are_called(monkeypatch, name):
    model = model_of("qwen3")
    before = generated(model)
    setattr(model.model.layers[1].self_attn, name, torch.nn.Identity())
    found = generated(model)
    assert found != before
    own_forward(monkeypatch)
    assert generated(model) == found


def test_layers_with_weights_of_their_own_keep_their_forward():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMALL))
    kind = type(model.model.layers[0])

    class Gained(kind):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * self.gain

    model.model.layers[1].__class__ = Gained
    model.model.layers[1].gain = torch.nn.Parameter(torch.ones(()))
    assert len(planned(ready(model))) == 1


def test_what_a_configuration_says_later_holds_for_the_next_engine(monkeypatch):
    model = model_of("mistral", sliding_window=None)
    before = generated(model)
    model.config.sliding_window = 3
    found = generated(model)
    assert found != before
    own_forward(monkeypatch)
    assert generated(model) == found


def test_a_configuration_that_is_no_json_is_no_obstacle():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMALL))
    model.config.something = object()
    assert not planned(ready(model))


def test_a_cast_is_noticed(monkeypatch):
    model = model_of("llama").bfloat16()
    found = generated(model)
    own_forward(monkeypatch)
    assert generated(model) == found


def test_weights_with_gaps_go_through_the_layer(monkeypatch):
    model = model_of("llama")
    norm = model.model.layers[0].input_layernorm
    norm.weight = torch.nn.Parameter(torch.randn(2 * norm.weight.numel())[::2])
    found = generated(model)
    own_forward(monkeypatch)
    assert generated(model) == found


def test_hooks_on_every_module_are_called(monkeypatch):
    model, seen = model_of("llama"), []
    found = generated(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert generated(model) == found
    finally:
        handle.remove()
    assert seen.count(type(model.model.layers[0])) == 2 * seen.count(type(model.model.norm)) / 5 > 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_call_has_the_bits_of_its_ops(monkeypatch, family, dtype):
    if not products_run(dtype):
        pytest.skip("the packed products of this dtype are not used here")
    model, calls, one_call = model_of(family, dtype, attention_bias=True), [], decoder_run._in_one_call
    monkeypatch.setattr(decoder_run, "_in_one_call", lambda step: (calls.append(1), one_call(step))[1])
    found = generated(model)
    if not calls:
        pytest.skip("oneDNN multiplies here")
    monkeypatch.setattr(decoder_run, "_in_one_call", decoder_run._one_by_one)
    assert generated(model) == found


def test_weights_that_changed_are_the_ones_used():
    model = model_of("qwen2")
    engine = fa.Engine(model)
    params = fa.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    before = engine.generate(prompts_of(4), params)
    with engine.updating_weights(), torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    after = engine.generate(prompts_of(4), params)
    assert after[0].outputs[0].token_ids == fa.Engine(copy.deepcopy(model)).generate(prompts_of(4), params)[0].outputs[0].token_ids
    assert after[0].outputs[0].logprobs != before[0].outputs[0].logprobs


def test_another_backend_runs_the_layers_own_forward(counted):
    model = model_of("llama")
    counted.update({True: 0, False: 0})
    with use_backend("reference"):
        generated(model)
        assert not planned(model_of("llama", mlp_bias=True))
    assert counted[True] == 0
    assert planned(model_of("llama", mlp_bias=True))  # what was seen of the other backend does not stay


def test_every_family_of_the_suite_generates(counted):
    for make in FAMILIES.values():
        generated(ready(make()))
    assert counted[True] > 0
