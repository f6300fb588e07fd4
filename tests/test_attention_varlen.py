"""Tree attention as variable-length attention: each route against the reference, with stand-ins for the functions a GPU would run."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from fastalign import environment
from fastalign.ops import attention_reference as reference
from fastalign.ops import attention_routes as routes
from fastalign.ops import attention_varlen
from fastalign.ops.attention import TreeLayout, tree_attention

TREES = {
    "one token": ([1], [-1]),
    "roots": ([5, 17, 1], [-1, -1, -1]),
    "group": ([9, 3, 6, 5], [-1, 0, 0, 0]),
    "depth 3": ([6, 3, 4, 0, 7, 3, 1, 2], [-1, 0, 1, 2, 3, 3, 5, -1]),
    "only children": ([4, 3, 2, 5], [-1, 0, 1, -1]),
    "child far from its parent": ([4, 3, 2], [-1, -1, 0]),
    "empty segments": ([0, 4, 0, 0], [-1, 0, 1, -1]),
    "nothing": ([0], [-1]),
}
OPTIONS = {"plain": {}, "window": {"window": 4}, "softcap": {"softcap": 2.0}, "both": {"window": 7, "softcap": 1.5}}


def tree_of(lengths, parent):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return cu_seqlens, torch.tensor(parent, dtype=torch.int32)


def inputs(rows, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64):
    return tuple(torch.randn(rows, h, head_dim, dtype=torch.float64).to(dtype) for h in (heads, kv_heads, kv_heads))


def gradients(run, tensors, grad):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def expected_varlen(q, k, v, cu_q, cu_k, scale, left, softcap):
    """The contract of the fused functions, written from their documentation."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    group, out = q.shape[1] // k.shape[1], []
    for i in range(len(cu_q) - 1):
        part, keys, values = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        at = torch.arange(len(part))[:, None] + len(keys) - len(part)
        distance = at - torch.arange(len(keys))
        scores = torch.einsum("qhd,khd->hqk", part, keys.repeat_interleave(group, 1)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill((distance < 0) | ((left >= 0) & (distance > left)), -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1)))
    return torch.cat(out)


def fake_flash(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    num_splits=0,
):
    assert causal
    assert num_splits == 1
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert window_size[1] == (-1 if window_size[0] < 0 else 0)
    return expected_varlen(q, k, v, cu_q, cu_k, softmax_scale, window_size[0], softcap)


def fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """With the signature of the installed torch."""
    inspect.signature(varlen_attn).bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert query.shape[1] == key.shape[1] or options["enable_gqa"]
    assert options["window_size"][1] == 0
    assert options["num_splits"] == 1
    return expected_varlen(query, key, value, cu_seq_q, cu_seq_k, options["scale"], options["window_size"][0], 0.0)


fake_varlen.__signature__ = inspect.signature(varlen_attn)


def fake_varlen_of_torch_210(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return expected_varlen(query, key, value, cu_seq_q, cu_seq_k, query.shape[2] ** -0.5, -1, 0.0)


def fake_varlen_of_torch_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert query.shape[1] == key.shape[1]
    return expected_varlen(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0], 0.0)


FUNCTIONS = {
    "flash-attn": ("flash-attn", fake_flash),
    "torch varlen": ("torch varlen", fake_varlen),
    "torch 2.11": ("torch varlen", fake_varlen_of_torch_211),
    "torch 2.10": ("torch varlen", fake_varlen_of_torch_210),
    "sdpa by segment": ("sdpa by segment", None),
}


@pytest.fixture(params=FUNCTIONS)
def route(request, monkeypatch):
    name, function = FUNCTIONS[request.param]
    monkeypatch.setattr(attention_varlen, "route_of", lambda *_: name)
    monkeypatch.setattr(routes, "_flash_function" if name == "flash-attn" else "_varlen_function", lambda: function)
    return request.param


CASES = [  # what route_of sends where
    pytest.param(route, options, id=f"{route}-{name}")
    for route in FUNCTIONS
    for name, options in OPTIONS.items()
    if not ("softcap" in options and "torch" in route) and not ("window" in options and route == "torch 2.10")
]


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("route, options", CASES, indirect=["route"])
def test_tree_attention_varlen_equals_the_reference(route, options, tree):
    layout, rows = tree_of(*tree), sum(tree[0]) + 3  # padding
    options = {"window": None, "softcap": None, "scale": 0.3, **options}
    tensors, grad = inputs(rows), torch.randn(rows, 4, 8, dtype=torch.float64)
    got = gradients(lambda *x: attention_varlen.tree_attention(*x, *layout, **options), tensors, grad)
    want = gradients(lambda *x: reference.tree_attention(*x, *layout, **options) + 0 * sum(t.sum() for t in x), tensors, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
        assert not a[rows - 3 :].any()


def test_tree_attention_varlen_gradcheck_of_a_deep_tree(route):
    layout = tree_of([2, 1, 2, 2, 1], [-1, 0, 1, 2, 1])
    tensors = [x.requires_grad_() for x in inputs(8, 2, 1, 8)]
    options = {"scale": 0.5, "window": None if route == "torch 2.10" else 3, "softcap": None if "torch" in route else 1.5}
    assert torch.autograd.gradcheck(lambda *x: attention_varlen.tree_attention(*x, *layout, **options), tensors)


def test_tree_attention_varlen_keeps_nan_in_padding_rows_out(route):
    layout = tree_of(*TREES["group"])
    clean = inputs(23)
    poisoned = [torch.cat([x, torch.full((5, *x.shape[1:]), torch.nan, dtype=x.dtype)]) for x in clean]
    grad = torch.randn(28, 4, 8, dtype=torch.float64)
    options = {"scale": 0.3, "window": None, "softcap": None} | ({} if route != "torch 2.10" else {"scale": 8**-0.5})
    want = gradients(lambda *x: attention_varlen.tree_attention(*x, *layout, **options), clean, grad[:23])
    got = gradients(lambda *x: attention_varlen.tree_attention(*x, *layout, **options), poisoned, grad)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[:23], b)
        assert not a[23:].any()


def test_tree_attention_varlen_refuses_a_second_derivative(route):
    q, k, v = (x.requires_grad_() for x in inputs(5))
    out = attention_varlen.tree_attention(q, k, v, *tree_of([3, 2], [-1, 0]), scale=1.0, window=None, softcap=None)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="tree_attention: a second derivative was asked for"):
        grad.sum().backward()


@pytest.mark.parametrize("route, options", CASES, indirect=["route"])
def test_tree_attention_varlen_compiles_whole(route, options):
    layout = tree_of(*TREES["depth 3"])
    options = {"window": None, "softcap": None, "scale": 0.3, **options}
    tensors, grad = inputs(28), torch.randn(28, 4, 8, dtype=torch.float64)

    def run(*x):
        return attention_varlen.tree_attention(*x, *layout, **options) * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, tensors, grad), gradients(run, tensors, grad), strict=True):
        assert torch.equal(a, b)


def test_tree_segments_join_only_children_and_skip_empty_segments():
    assert attention_varlen.tree_segments(*tree_of(*TREES["only children"])) == [(0, 9, -1), (9, 14, -1)]
    assert attention_varlen.tree_segments(*tree_of(*TREES["child far from its parent"])) == [(0, 4, -1), (4, 7, -1), (7, 9, 0)]
    assert attention_varlen.tree_segments(*tree_of(*TREES["empty segments"])) == [(0, 4, -1)]
    with pytest.raises(ValueError, match="segment 0 must continue an earlier one or -1, got 1"):
        attention_varlen.tree_segments(*tree_of([1, 1], [1, -1]))
    with pytest.raises(ValueError, match=r"offsets that start at 0 and do not fall, got \[0, 3, 1\]"):
        attention_varlen.tree_segments(*tree_of([3, -2], [-1, -1]))


def test_a_prefix_gradient_is_summed_in_fp32():
    x = torch.randn(3, 1, 4).bfloat16().requires_grad_()
    index = torch.tensor([0, 1, 2] * 500)
    grad = torch.rand(1500, 1, 4).bfloat16()
    (got,) = torch.autograd.grad(attention_varlen._Gather.apply(x, index), x, grad)
    exact = grad.double().view(500, 3, 1, 4).sum(0)
    torch.testing.assert_close(got.double(), exact, atol=0, rtol=2**-8)


def test_the_route_is_the_fastest_that_can_run_the_call(monkeypatch):
    def call(dtype=torch.bfloat16, head_dim=64, device="cuda"):
        return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(5, 2, head_dim))

    monkeypatch.setattr(routes, "_is_ampere", lambda _: True)
    monkeypatch.setattr(routes, "_flash_function", lambda: fake_flash)
    monkeypatch.setattr(routes, "_varlen_function", lambda: fake_varlen)
    assert routes.route_of(call(), 8, 2.0) == "flash-attn"
    assert routes.available_routes() == "flash-attn, torch varlen, sdpa by segment"
    monkeypatch.setattr(routes, "_flash_function", lambda: None)
    assert routes.route_of(call(), 8, None) == "torch varlen"
    monkeypatch.setattr(routes, "_varlen_function", lambda: fake_varlen_of_torch_210)
    assert routes.route_of(call(), None, None) == "torch varlen"
    routes._announce_slow.cache_clear()
    with pytest.warns(UserWarning, match=r"one SDPA a segment on cuda \(bfloat16, head size 64\)"):
        assert routes.route_of(call(), 8, None) == "sdpa by segment"
    with pytest.warns(UserWarning, match="soft-cap.; install flash-attn"):
        assert routes.route_of(call(), None, 2.0) == "sdpa by segment"
    with pytest.warns(UserWarning, match="float32"):
        assert routes.route_of(call(torch.float32), None, None) == "sdpa by segment"
    with pytest.warns(UserWarning, match="head size 36"):
        assert routes.route_of(call(head_dim=36), None, None) == "sdpa by segment"
    monkeypatch.setattr(routes, "_is_ampere", lambda _: False)
    assert routes.route_of(call(torch.float16), None, None) == "sdpa by segment"


def test_varlen_attn_that_refuses_one_split_is_called_without(monkeypatch):
    def refuses(*arguments, num_splits=None, **options):
        if num_splits is not None:
            raise RuntimeError("num_splits is not supported here")
        return fake_varlen(*arguments, num_splits=1, **options)

    refuses.__signature__ = inspect.signature(varlen_attn)
    monkeypatch.setattr(attention_varlen, "route_of", lambda *_: "torch varlen")
    layout, tensors, options = tree_of([5, 4], [-1, -1]), inputs(9), {"scale": 0.3, "window": None, "softcap": None}
    monkeypatch.setattr(routes, "_varlen_function", lambda: fake_varlen)
    want = attention_varlen.tree_attention(*tensors, *layout, **options)
    monkeypatch.setattr(routes, "_varlen_function", lambda: refuses)
    with pytest.warns(UserWarning, match=r"refuses num_splits=1 \(num_splits is not supported here\)"):
        got = attention_varlen.tree_attention(*tensors, *layout, **options)
    assert torch.equal(got, want)


def test_env_names_the_routes_of_a_gpu(monkeypatch):
    monkeypatch.setattr(environment, "_devices", lambda: {"cpu": "a processor", "cuda:0": "a GPU"})
    monkeypatch.setattr(routes, "_flash_function", lambda: None)
    assert environment.env()["attention on cuda"].startswith("trees and prefill: torch varlen, sdpa by segment (the first")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_tree_attention_on_the_gpu_is_as_exact_as_plain_torch(tree, options, dtype):
    layout, rows = TreeLayout(*tree_of(*tree)), sum(tree[0]) + 3
    tensors = [x.cuda() for x in inputs(rows, head_dim=64, dtype=dtype)]
    grad = torch.randn(rows, 4, 64, device="cuda").to(dtype)
    plain_options = {"window": None, "softcap": None, "scale": 0.125, **options}

    def plain(*x):
        return reference.tree_attention(*x, layout.cu_seqlens, layout.parent, **plain_options) + 0 * sum(t.sum() for t in x)

    exact = gradients(plain, [x.double() for x in tensors], grad.double())
    got = gradients(lambda *x: tree_attention(*x, layout, scale=0.125, **options), tensors, grad)
    floor = exact[0].norm() + 1e-30
    for ours, want in zip(got, exact, strict=True):
        error = (ours.double() - want).norm() / torch.maximum(want.norm(), floor)
        assert error < (2e-3 if dtype == torch.float32 else 1.5e-2)  # products of a GPU: TF32 may be on; bf16 probabilities


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 100}], ids=["plain", "window"])
def test_tree_attention_on_the_gpu_gives_a_sequence_the_same_bits_in_any_batch(options):
    """On the two fused routes; short and long neighbours, and single queries, whose keys a kernel might split."""
    lengths = [300, 1, 64, 2000, 129]
    layout = TreeLayout(*tree_of(lengths, [-1] * 5))
    q, k, v = (x.cuda() for x in inputs(sum(lengths), 14, 2, 64, torch.bfloat16))
    if routes.route_of(q, options.get("window"), None) == "sdpa by segment":
        pytest.skip("no fused route here")
    together = tree_attention(q, k, v, layout, scale=0.125, **options)
    bounds = layout.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        alone = (x[begin:end] for x in (q, k, v))
        assert torch.equal(tree_attention(*alone, TreeLayout(*tree_of([end - begin], [-1])), scale=0.125, **options), together[begin:end])
