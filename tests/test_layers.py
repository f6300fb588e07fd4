"""The layers' ops (rms_norm, swiglu, rope) against fp64, their gradients, and models whose own layers run through them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import SMALL
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastalign.models.attention import use_fastalign_attention
from fastalign.models.fused_layers import use_fused_layers
from fastalign.ops.backend import announce, load_native, use_backend
from fastalign.ops.rms_norm import rms_norm
from fastalign.ops.rope import rope
from fastalign.ops.swiglu import swiglu

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 5), (3, 7), (5, 64), (130, 100), (2, 3, 257), (0, 16), (700, 96)]


def layers(shape):
    """name → (function, inputs in fp64, which of them have a gradient)."""
    x, width = torch.randn(*shape, dtype=torch.float64), shape[-1]
    heads, length, dim = 3, max(1, len(x)), 2 * width
    angle = torch.rand(1, length, dim, dtype=torch.float64) * 6
    q = torch.randn(1, length, heads, dim, dtype=torch.float64).transpose(1, 2)
    return {
        "rms_norm": (lambda x, weight: rms_norm(x, weight, eps=1e-5), [x, torch.randn(width, dtype=torch.float64)], 2),
        "swiglu": (swiglu, [3 * x, torch.randn_like(x)], 2),
        "rope": (rope, [q, angle.cos(), angle.sin()], 1),
    }


NAMES = ["rms_norm", "swiglu", "rope"]


def tiny_model(family):
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SMALL)).eval()


def run(function, inputs, num_grads, grad):
    """The value and the gradients of the first `num_grads` inputs."""
    leaves = [t.detach().clone().requires_grad_(i < num_grads) for i, t in enumerate(inputs)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves[:num_grads], grad.to(out.dtype))]


def error(found, exact):
    pairs = [(a.double(), b) for a, b in zip(found, exact, strict=True) if b.numel()]
    return max([float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs], default=0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_are_no_worse_than_torch(isa, name, shape, dtype):
    function, inputs, num_grads = layers(shape)[name]
    inputs = [t.to(dtype) for t in inputs]
    wide = [t.double() for t in inputs]
    grad = torch.randn(function(*wide).shape, dtype=torch.float64).to(dtype)
    exact = run(function, wide, num_grads, grad)
    with use_backend("reference"):
        plain = run(function, inputs, num_grads, grad)
    ours = run(function, inputs, num_grads, grad)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    assert [t.shape for t in ours] == [t.shape for t in plain]
    assert error(ours, exact) <= 1.25 * error(plain, exact) + 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_layers_reference_passes_gradcheck(name):
    function, inputs, num_grads = layers((4, 6))[name]
    leaves = [t.detach().clone().requires_grad_(i < num_grads) for i, t in enumerate(inputs)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_rows_have_the_same_bits_in_any_batch(isa, name, dtype):
    x, gate, weight = torch.randn(301, 172).to(dtype), torch.randn(301, 172).to(dtype), torch.randn(172).to(dtype)
    angle = torch.rand(1, 301, 172)
    q, cos, sin = torch.randn(1, 2, 301, 172).to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)

    def rows(count):
        if name == "rms_norm":
            return rms_norm(x[:count], weight, eps=1e-6)
        if name == "swiglu":
            return swiglu(gate[:count], x[:count])
        return rope(q[:, :, :count], cos[:, :count], sin[:, :count])[0].transpose(0, 1)

    for count in (1, 2, 3, 64, 65, 300):
        assert torch.equal(rows(count), rows(301)[:count])


@pytest.mark.parametrize("name", NAMES)
def test_layers_write_the_whole_output(isa, monkeypatch, name):
    """Fresh buffers hold NaN: an element that the kernel leaves out shows."""
    function, inputs, num_grads = layers((67, 35))[name]
    inputs = [t.float() for t in inputs]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(float("nan")))
    grad = torch.randn(function(*inputs).shape)
    assert all(t.isfinite().all() for t in run(function, inputs, num_grads, grad))


def test_layers_weight_gradient_is_the_same_with_any_threads(isa):
    function, inputs, _ = layers((700, 96))["rms_norm"]
    inputs, grad = [t.float() for t in inputs], torch.randn(700, 96)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(function, inputs, 2, grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_gradient_is_the_same_with_a_frozen_weight(isa, name, dtype):
    function, inputs, _ = layers((130, 96))[name]
    inputs, grad = [t.to(dtype) for t in inputs], torch.randn(130, 96).to(dtype)
    assert torch.equal(run(function, inputs, 1, grad)[1], run(function, inputs, 2, grad)[1])


def test_layers_read_what_has_strides(isa):
    x, weight = torch.randn(9, 40), torch.randn(20)
    half = x[:, ::2]
    assert torch.equal(rms_norm(half, weight, eps=1e-5), rms_norm(half.contiguous(), weight, eps=1e-5))
    assert torch.equal(swiglu(half, x[:, 1::2]), swiglu(half.contiguous(), x[:, 1::2].contiguous()))
    q, angle = torch.randn(2, 5, 3, 16), torch.rand(2, 5, 16)
    turned, cos, sin = q.transpose(1, 2), angle.cos(), angle.sin()
    assert torch.equal(rope(turned, cos, sin), rope(turned.contiguous(), cos, sin))
    torch.testing.assert_close(rope(turned, cos, sin)[1:], rope(turned[1:], cos[1:], sin[1:]), rtol=0, atol=0)


def test_layers_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"rms_norm: expected .* got \[3, 4\] and \[5\]"):
        rms_norm(torch.ones(3, 4), torch.ones(5), eps=1e-5)
    with pytest.raises(ValueError, match=r"swiglu: gate and up must have one shape, got \[3\] and \[4\]"):
        swiglu(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match=r"rope: expected .* even D"):
        rope(torch.ones(1, 2, 3, 5), torch.ones(1, 3, 5), torch.ones(1, 3, 5))
    with pytest.raises(ValueError, match=r"rope: expected"):
        rope(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4))


@pytest.mark.parametrize("name", NAMES)
def test_layers_refuse_a_second_derivative(isa, name):
    function, inputs, _ = layers((4, 6))[name]
    leaves = [t.float().requires_grad_() if i == 0 else t.float() for i, t in enumerate(inputs)]
    (first,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), leaves[:1])


def test_layers_say_that_a_dtype_has_no_kernel():
    if load_native()[0] is None:
        pytest.skip("the native module is not built")
    announce.cache_clear()
    with pytest.warns(UserWarning, match="swiglu: the native kernel on cpu does not read torch.float16"):
        swiglu(torch.ones(3).half(), torch.ones(3).half())


def test_layers_swiglu_at_the_ends():
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4, float("inf"), float("nan")])
    up = torch.ones_like(gate)
    found = swiglu(gate, up)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate.double()).float(), rtol=2e-6, atol=1e-35, equal_nan=True)
    leaf = gate.clone().requires_grad_()
    swiglu(leaf, up).nan_to_num(posinf=0.0).sum().backward()
    assert leaf.grad[:6].isfinite().all()


FUSED = {
    "llama": {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"},
    "qwen2": {"Qwen2RMSNorm", "Qwen2MLP", "Qwen2Attention"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"},
    "mistral": {"MistralRMSNorm", "MistralMLP", "MistralAttention"},
    "gemma2": {"Gemma2Attention"},
    "gpt2": set(),
}


@pytest.mark.parametrize("family", FUSED)
def test_layers_of_a_model_are_the_ones_that_agree(family):
    model = tiny_model(family)
    ids = torch.randint(0, 50, (2, 9))
    before = model(ids).logits
    names = set(model.state_dict())
    use_fastalign_attention(model)
    use_fastalign_attention(model)  # again: no class upon a class
    fused = {type(m).__name__ for m in model.modules() if type(m).__name__.startswith("Fused")}
    assert fused == {f"Fused{name}" for name in FUSED[family]}
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits, rtol=0, atol=0)


class HalvedNorm(nn.Module):
    """Has the attributes of a norm that is known, and computes another."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return rms_norm(x, self.weight, eps=self.variance_epsilon) / 2


def test_layers_leave_what_computes_something_else():
    model = nn.Sequential(HalvedNorm())
    use_fused_layers(model)
    assert type(model[0]) is HalvedNorm


@pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")
def test_layers_of_a_model_run_natively(monkeypatch):
    model = tiny_model("qwen2")
    use_fastalign_attention(model)
    calls = []
    module = load_native()[0]
    for name in NAMES:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _name=name, _call=original: (calls.append(_name), _call(*a))[1])
    model(torch.randint(0, 50, (1, 5)))
    assert set(calls) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_layers_compile_as_torch(name):
    function, inputs, num_grads = layers((5, 8))[name]
    inputs = [t.float() for t in inputs]
    grad = torch.randn(function(*inputs).shape)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, expected = (run(each, inputs, num_grads, grad) for each in (compiled, function))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
