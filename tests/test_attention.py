"""Attention over trees and paged caches: against the fp64 reference, and against itself to the bit."""

import pytest
import torch

from fastalign.ops import attention_reference as reference
from fastalign.ops.attention import PagedLayout, TreeLayout, paged_attention, tree_attention
from fastalign.ops.backend import load_native, use_backend

needs_native = pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")

TREES = {
    "one token": ([1], [-1]),
    "roots": ([5, 70, 1], [-1, -1, -1]),
    "group": ([100, 30, 64, 5], [-1, 0, 0, 0]),
    "deep": ([60, 30, 40, 0, 70, 3, 1], [-1, 0, 1, 2, 3, 3, -1]),
    "chain of single tokens": ([1] * 70, list(range(-1, 69))),
    "empty segments": ([0, 4, 0, 0], [-1, 0, 1, -1]),
}
OPTIONS = {"plain": {}, "window": {"window": 7}, "softcap": {"softcap": 2.0}, "both": {"window": 65, "softcap": 5.0}}


def layout_of(lengths, parent):
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return TreeLayout(cu_seqlens, torch.tensor(parent, dtype=torch.int32))


def inputs(rows, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32):
    return tuple(torch.randn(rows, h, head_dim).to(dtype) for h in (heads, kv_heads, kv_heads))


def gradients(run, tensors, grad):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def errors(got, exact):
    """Relative to the value, or to the output where the exact value is (nearly) zero: dq of a token that sees only itself."""
    floor = exact[0].norm()
    return [((a.double() - b).norm() / torch.maximum(b.norm(), floor)).item() for a, b in zip(got, exact, strict=True)]


def plain_torch(layout, dtype, **options):
    """A dense-mask eager attention in the inputs' own dtype, as a model without a kernel would run it."""
    (rows, visible), *rest = reference.tree_masks(layout.cu_seqlens, layout.parent, options.get("window"))
    for more, block in rest:
        rows, visible = torch.cat([rows, more]), torch.block_diag(visible, block).bool()

    def run(q, k, v):
        group = q.shape[1] // k.shape[1]
        qh, kh, vh = q[rows].transpose(0, 1), *(x[rows].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        scores = qh @ kh.transpose(1, 2) * q.shape[2] ** -0.5
        if cap := options.get("softcap"):
            scores = torch.tanh(scores / cap) * cap
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1, dtype=torch.float32).to(dtype)
        return torch.zeros_like(q).index_copy(0, rows, (weights @ vh).transpose(0, 1))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_tree_attention_is_as_exact_as_plain_torch(tree, options, dtype):
    layout, rows = layout_of(*tree), sum(tree[0])
    q, k, v = inputs(rows, dtype=dtype)
    grad = torch.randn(q.shape).to(dtype)
    scale = q.shape[2] ** -0.5
    exact = gradients(lambda *x: tree_attention(*x, layout, scale=scale, **options), [x.double() for x in (q, k, v)], grad)
    got = gradients(lambda *x: tree_attention(*x, layout, scale=scale, **options), (q, k, v), grad)
    plain = gradients(plain_torch(layout, dtype, **options), (q, k, v), grad)
    for ours, theirs in zip(errors(got, exact), errors(plain, exact), strict=True):
        assert ours <= theirs + (1e-6 if dtype == torch.float32 else 2e-3)


@needs_native
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(1, 1, 8), (3, 3, 17), (6, 1, 80), (9, 3, 1), (130, 1, 8), (2, 1, 256)])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "amx"])
def test_tree_attention_any_shape(heads, kv_heads, head_dim, isa):
    native = load_native()[0]
    widest = native.isa()
    if isa not in native.isas():
        pytest.skip(f"this machine has no {isa}")
    layout = layout_of(*TREES["deep"])
    q, k, v = inputs(204, heads, kv_heads, head_dim)
    grad = torch.randn(q.shape)
    exact = gradients(lambda *x: tree_attention(*x, layout, scale=0.2, window=50), [x.double() for x in (q, k, v)], grad)
    native.set_isa(isa)
    try:
        got = gradients(lambda *x: tree_attention(*x, layout, scale=0.2, window=50), (q, k, v), grad)
    finally:
        native.set_isa(widest)
    assert max(errors(got, exact)) < 2e-6


def test_tree_attention_reference_gradcheck_and_extreme_scores(backend):
    deep = layout_of([2, 1, 2, 0, 2, 1], [-1, 0, 1, 2, 3, 1])
    tensors = [x.double().requires_grad_() for x in inputs(8, 2, 1, 3)]
    assert torch.autograd.gradcheck(lambda *x: tree_attention(*x, deep, scale=0.5, window=3, softcap=1.5), tensors)
    layout = layout_of([3, 2, 2], [-1, 0, 0])
    tensors = [x.double().requires_grad_() for x in inputs(7, 2, 1, 3)]
    assert torch.autograd.gradcheck(lambda *x: tree_attention(*x, layout, scale=0.5, window=3, softcap=1.5), tensors)
    q, k, v = inputs(7, 2, 1, 3)
    got = gradients(lambda *x: tree_attention(*x, layout, scale=1e4), (q, k, v), torch.ones(7, 2, 3))
    assert all(x.isfinite().all() for x in got)


def test_tree_attention_ignores_padding_rows(backend):
    layout = layout_of([40, 9], [-1, 0])
    clean = inputs(49)
    poisoned = [torch.cat([x, torch.full((15, *x.shape[1:]), float("nan"))]) for x in clean]
    grad = torch.randn(64, 4, 16)
    expected = gradients(lambda *x: tree_attention(*x, layout, scale=0.25), clean, grad[:49])
    got = gradients(lambda *x: tree_attention(*x, layout, scale=0.25), poisoned, grad)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a[:49], b)
        if backend == "native":
            assert not a[49:].any()


@needs_native
def test_tree_attention_reads_strided_heads():
    layout = layout_of([20], [-1])
    fused = torch.randn(20, 8 * 16)  # one projection for q, k and v
    views = fused[:, :64].view(20, 4, 16), fused[:, 64:96].view(20, 2, 16), fused[:, 96:].view(20, 2, 16)
    assert torch.equal(tree_attention(*views, layout, scale=0.25), tree_attention(*(x.contiguous() for x in views), layout, scale=0.25))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    assert torch.equal(tree_attention(*views, layout, scale=0.25), tree_attention(*turned, layout, scale=0.25))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tree_attention_row_does_not_depend_on_its_neighbours(dtype):
    lengths, parent = [150, 40, 33, 7], [-1, 0, 0, 2]
    q, k, v = inputs(230, dtype=dtype)
    together = tree_attention(q, k, v, layout_of(lengths, parent), scale=0.25, window=90)
    paths = [torch.arange(190), torch.cat([torch.arange(150), torch.arange(190, 230)])]
    for path in paths:
        alone = tree_attention(q[path], k[path], v[path], layout_of([len(path)], [-1]), scale=0.25, window=90)
        assert torch.equal(alone, together[path])


@needs_native
def test_tree_attention_is_deterministic_for_any_number_of_threads():
    layout = layout_of([70, 20, 50, 90], [-1, 0, 0, -1])
    q, k, v = inputs(230)
    grad = torch.randn(q.shape)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(lambda *x: tree_attention(*x, layout, scale=0.25), (q, k, v), grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_tree_attention_compiles_whole():
    layout = layout_of([20, 5, 6], [-1, 0, 0])
    q, k, v = inputs(31)
    grad = torch.randn(q.shape)

    def run(*x):
        return tree_attention(*x, layout, scale=0.25) * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, (q, k, v), grad), gradients(run, (q, k, v), grad), strict=True):
        assert torch.equal(a, b)


@needs_native
def test_tree_attention_refuses_a_second_derivative():
    q, k, v = (x.requires_grad_() for x in inputs(5))
    out = tree_attention(q, k, v, layout_of([5], [-1]), scale=1.0)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="tree_attention: a second derivative was asked for"):
        grad.sum().backward()


def test_attention_errors_name_expected_and_got():
    q, k, v = inputs(5)
    layout = layout_of([5], [-1])
    with pytest.raises(ValueError, match=r"multiple of the key heads, got 3 and 2"):
        tree_attention(q[:, :3], k, v, layout, scale=1.0)
    with pytest.raises(ValueError, match=r"the layout holds 5 tokens, q has only 4 rows"):
        tree_attention(q[:4], k[:4], v[:4], layout, scale=1.0)
    with pytest.raises(ValueError, match="share a dtype"):
        tree_attention(q, k.bfloat16(), v, layout, scale=1.0)
    with pytest.raises(ValueError, match="window must be >= 1"):
        tree_attention(q, k, v, layout, scale=1.0, window=0)
    with pytest.raises(ValueError, match=r"parent must be torch.int32 \[1\] on the CPU"):
        TreeLayout(layout.cu_seqlens, layout.parent.long())


@needs_native
def test_tree_attention_refuses_a_broken_tree():
    q, k, v = inputs(5)
    with pytest.raises(ValueError, match="segment 0 must continue an earlier one or -1, got 1"):
        tree_attention(q, k, v, layout_of([2, 3], [1, -1]), scale=1.0)


class Cache:
    """Sequences that grow in a poisoned paged cache, each in blocks of its own but for a shared prefix."""

    def __init__(self, block_size, max_blocks, k, v):
        self.block_size, self.kv = block_size, (k, v)
        shape = (max_blocks, k.shape[1], block_size, k.shape[2])
        self.k, self.v = (torch.full(shape, float("nan"), dtype=k.dtype) for _ in range(2))
        self.free = torch.randperm(max_blocks).tolist()

    def step(self, q, tables, spans, **options):
        """spans: (path [context] of token rows, how many of them are new) for each sequence."""
        new = torch.cat([path[len(path) - fresh :] for path, fresh in spans])
        slots = []
        for (path, fresh), table in zip(spans, tables, strict=True):
            while len(table) * self.block_size < len(path):
                table.append(self.free.pop())
            slots += [table[i // self.block_size] * self.block_size + i % self.block_size for i in range(len(path) - fresh, len(path))]
        width = max(len(t) for t in tables)
        layout = PagedLayout(
            cu_seqlens=torch.tensor([0, *torch.tensor([f for _, f in spans]).cumsum(0).tolist()], dtype=torch.int32),
            context_lens=torch.tensor([len(path) for path, _ in spans], dtype=torch.int32),
            block_tables=torch.tensor([t + [-1] * (width - len(t)) for t in tables], dtype=torch.int32),
            slots=torch.tensor(slots),
            k_cache=[self.k],
            v_cache=[self.v],
        )
        rows = torch.cat([new, torch.zeros(3, dtype=torch.long)])  # padding rows
        out = paged_attention(q[rows], self.kv[0][rows], self.kv[1][rows], layout, 0, scale=0.25, **options)
        assert not out[len(new) :].any()
        return out[: len(new)]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("block_size", [1, 16, 48])
def test_paged_attention_equals_tree_attention_to_the_bit(block_size, options, dtype):
    assert torch.equal(*paged_and_tree(block_size, options, dtype, (61, 4)))


def test_paged_attention_reference_equals_tree_attention():
    with use_backend("reference"):
        torch.testing.assert_close(*paged_and_tree(16, OPTIONS["both"], torch.float32, (5, 4)), atol=1e-5, rtol=0)


def paged_and_tree(block_size, options, dtype, completions):
    """A prompt in three chunks, then its completions token by token, against the whole tree at once."""
    prompt = 70
    layout = layout_of([prompt, *completions], [-1, 0, 0])
    q, k, v = inputs(prompt + sum(completions), dtype=dtype)
    expected = tree_attention(q, k, v, layout, scale=0.25, **options)
    cache, root, out = Cache(block_size, 300, k, v), [], torch.empty_like(q)
    for begin, end in ((0, 33), (33, 34), (34, 70)):  # chunked prefill
        out[begin:end] = cache.step(q, [root], [(torch.arange(end), end - begin)], **options)
    full = prompt // block_size  # whole blocks are shared, the partial one is copied on write
    tables = []
    for _ in completions:
        table = root[:full]
        if prompt % block_size:
            table = [*table, cache.free.pop()]
            cache.k[table[-1]], cache.v[table[-1]] = cache.k[root[-1]], cache.v[root[-1]]
        tables.append(table)
    for t in range(max(completions)):  # decode, the shorter sequence leaves first
        live = [s for s, n in enumerate(completions) if t < n]
        starts = [int(layout.cu_seqlens[s + 1]) for s in live]
        spans = [(torch.cat([torch.arange(prompt), torch.arange(b, b + t + 1)]), 1) for b in starts]
        out[[b + t for b in starts]] = cache.step(q, [tables[s] for s in live], spans, **options)
    return out, expected


@needs_native
def test_store_kv_skips_padding_and_refuses_a_slot_outside():
    native = load_native()[0]
    _, k, v = inputs(3)
    k_cache, v_cache = torch.zeros(2, 2, 4, 16), torch.zeros(2, 2, 4, 16)
    native.store_kv(k, v, k_cache, v_cache, torch.tensor([5, -1, 0]))
    assert torch.equal(k_cache[1, :, 1], k[0])
    assert torch.equal(v_cache[0, :, 0], v[2])
    assert int((k_cache.abs().sum(-1) > 0).sum()) == 2 * 2
    expected = [torch.zeros_like(k_cache), torch.zeros_like(v_cache)]
    reference.store_kv(k, v, *expected, torch.tensor([5, -1, 0]))
    assert torch.equal(k_cache, expected[0])
    with pytest.raises(ValueError, match="slots must be < 8, got 8"):
        native.store_kv(k, v, k_cache, v_cache, torch.tensor([8]))


def test_tree_attention_fp64_and_forced_reference_agree():
    layout = layout_of(*TREES["group"])
    q, k, v = inputs(199)
    exact = tree_attention(q.double(), k.double(), v.double(), layout, scale=0.25)
    with use_backend("reference"):
        torch.testing.assert_close(tree_attention(q, k, v, layout, scale=0.25).double(), exact, atol=1e-5, rtol=1e-5)
