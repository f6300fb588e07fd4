"""Paged attention's CUDA kernels and their plan without a GPU, over the host twin of their block primitives (fixture `cuda_twin`)."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from fastalign.ops import attention_paged
from fastalign.ops import attention_reference as reference
from fastalign.ops.attention import PagedLayout, paged_attention

OPTIONS = {"plain": {}, "window": {"window": 37}, "softcap": {"softcap": 2.0}, "both": {"window": 150, "softcap": 5.0}}


def step_of(sequences, shared, block_size, heads=4, kv_heads=2, head_dim=32, dtype=torch.float32, padding=2):
    """(q, k, v, layout): sequences of (context, new tokens) whose first `shared` whole blocks are the same; a poisoned cache otherwise."""
    tables, used = [], shared
    width = max(-(-context // block_size) for context, _ in sequences)
    for context, _ in sequences:
        own = max(0, -(-context // block_size) - shared)
        tables.append([*range(shared), *range(used, used + own), *[-1] * (width - shared - own)][:width])
        used += own
    order = torch.randperm(used + 2, dtype=torch.int32)  # two blocks are nobody's
    tables = torch.tensor([[int(order[b]) if b >= 0 else -1 for b in table] for table in tables], dtype=torch.int32)
    caches = [torch.full((used + 2, kv_heads, block_size, head_dim), math.nan, dtype=dtype) for _ in "kv"]
    slots = []
    for (context, fresh), table in zip(sequences, tables.tolist(), strict=True):
        at = [table[p // block_size] * block_size + p % block_size for p in range(context)]
        slots += at[context - fresh :]
        for cache, slot in itertools.product(caches, at[: context - fresh]):
            if cache[slot // block_size, 0, slot % block_size, 0].isnan():
                cache[slot // block_size, :, slot % block_size] = torch.randn(kv_heads, head_dim).to(dtype)
    rows = len(slots) + padding
    layout = PagedLayout(
        cu_seqlens=torch.tensor([0, *itertools.accumulate(fresh for _, fresh in sequences)], dtype=torch.int32),
        context_lens=torch.tensor([context for context, _ in sequences], dtype=torch.int32),
        block_tables=tables,
        slots=torch.tensor([*slots, *[-1] * padding], dtype=torch.int64),
        k_cache=[caches[0]],
        v_cache=[caches[1]],
    )
    return *(torch.randn(rows, h, head_dim).to(dtype) for h in (heads, kv_heads, kv_heads)), layout


def copied(layout):
    return replace(layout, k_cache=[layout.k_cache[0].clone()], v_cache=[layout.v_cache[0].clone()])


def run(twin, q, k, v, layout, **options):
    options = {"window": None, "softcap": None, "scale": 0.2, **options}
    return attention_paged.paged_attention(twin, q, k, v, layout, 0, **options)


def expected(q, k, v, layout, **options):
    options = {"window": None, "softcap": None, "scale": 0.2, **options}
    reference.store_kv(k, v, layout.k_cache[0], layout.v_cache[0], layout.slots)
    caches = [x[0].double() for x in (layout.k_cache, layout.v_cache)]
    return reference.paged_attention(q.double(), *caches, layout.cu_seqlens, layout.context_lens, layout.block_tables, **options)


def check(twin, q, k, v, layout, **options):
    other = copied(layout)
    got, want = run(twin, q, k, v, layout, **options), expected(q, k, v, other, **options)
    assert torch.equal(layout.k_cache[0].nan_to_num(9.0), other.k_cache[0].nan_to_num(9.0))
    assert torch.equal(layout.v_cache[0].nan_to_num(9.0), other.v_cache[0].nan_to_num(9.0))
    rtol = 2**-8 if q.dtype == torch.bfloat16 else 1e-5
    ((_, gather),) = layout.plans.values()
    chunks = torch.zeros(len(q), dtype=torch.bool)
    if gather is not None:  # torch's SDPA, which rounds bf16 probabilities
        chunks[gather.rows] = True
        torch.testing.assert_close(got[chunks].double(), want[chunks], rtol=4 * rtol, atol=1e-2 if q.dtype == torch.bfloat16 else 2e-6)
    torch.testing.assert_close(got[~chunks].double(), want[~chunks], rtol=rtol, atol=2e-6)
    assert not got[int(layout.cu_seqlens[-1]) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cuda_paged_attention_matches_fp64_on_the_host_twin(cuda_twin, options, dtype):
    sequences = [(1, 1), (300, 1), (301, 1), (299, 1), (128, 1), (129, 3), (7, 7)]
    check(cuda_twin, *step_of(sequences, 0, 16, dtype=dtype), **options)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(1, 1, 32), (3, 3, 64), (7, 1, 80), (71, 1, 40), (10, 2, 128), (6, 3, 96), (2, 1, 256), (5, 1, 200)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cuda_paged_attention_any_heads(cuda_twin, heads, kv_heads, head_dim, dtype):
    check(cuda_twin, *step_of([(131, 1), (20, 2)], 0, 16, heads, kv_heads, head_dim, dtype), window=100)


@pytest.mark.parametrize("block_size", [8, 16, 32, 48])
def test_cuda_paged_attention_of_a_shared_prefix(cuda_twin, block_size):
    sequences = [(300, 1), (290, 1), (310, 1), (280, 2), (300, 1)]
    q, k, v, layout = step_of(sequences, 272 // block_size, block_size)
    check(cuda_twin, q, k, v, layout, window=280)
    ((kernel, gather),) = layout.plans.values()
    items = kernel.numbers.view(-1, 4)[1 + kernel.tokens :]  # behind the counts and the tokens
    assert gather is None
    together = 272 // block_size * block_size // 128  # splits that are read once for all
    assert [int((items[:, 0] == split).sum()) for split in range(3)] == [1 if split < together else 5 for split in range(3)]
    assert int(items[:, 3].sum()) == kernel.cells * 2  # rows of two heads a key head


@pytest.mark.parametrize("seed", range(8))
def test_cuda_paged_attention_of_random_steps(cuda_twin, seed):
    """Any mixture of decode, short chunks and prefill, prefixes shared or not."""
    choose = random.Random(seed)
    block_size = choose.choice([1, 8, 16, 32, 40])
    shared = choose.choice([0, 100, 260]) // block_size
    sequences = []
    for _ in range(choose.randint(1, 12)):
        fresh = choose.choice([0, 1, 1, 1, 2, 8, 9, 30])
        sequences.append((shared * block_size + fresh + choose.randint(0 if fresh else 1, 150), fresh))
    kv_heads, group = choose.choice([1, 2, 3]), choose.choice([1, 3, 4, 9])
    shape = (kv_heads * group, kv_heads, choose.choice([8, 32, 72]), choose.choice([torch.float32, torch.bfloat16]))
    options = {"window": choose.choice([None, 1, 100, 1000]), "softcap": choose.choice([None, 3.0])}
    check(cuda_twin, *step_of(sequences, shared, block_size, *shape, padding=choose.randint(0, 3)), **options)


def test_cuda_paged_attention_bits_do_not_depend_on_the_batch(cuda_twin):
    sequences = [(300, 1), (290, 1), (310, 2), (40, 12), (300, 1)]
    q, k, v, layout = step_of(sequences, 17, 16)
    together = run(cuda_twin, q, k, v, layout)
    bounds = layout.cu_seqlens.tolist()
    for s in (0, 1, 2, 4):
        rows = slice(bounds[s], bounds[s + 1])
        alone = PagedLayout(
            cu_seqlens=torch.tensor([0, bounds[s + 1] - bounds[s]], dtype=torch.int32),
            context_lens=layout.context_lens[s : s + 1],
            block_tables=layout.block_tables[s : s + 1],
            slots=layout.slots[rows],
            k_cache=layout.k_cache,
            v_cache=layout.v_cache,
        )
        assert torch.equal(run(cuda_twin, q[rows], k[rows], v[rows], alone), together[rows])
    # the same keys in other blocks of another size
    keys = [
        cache[layout.block_tables[1].clamp(min=0).long()].transpose(1, 2).flatten(0, 1)[:290]
        for cache in (layout.k_cache[0], layout.v_cache[0])
    ]
    order = torch.randperm(37)
    moved = [torch.full((37, 2, 8, 32), math.nan) for _ in "kv"]
    for cache, values in zip(moved, keys, strict=True):
        reference.store_kv(values, values, cache, cache.clone(), order.repeat_interleave(8)[:290] * 8 + torch.arange(290) % 8)
    last = slice(bounds[1], bounds[2])
    other = PagedLayout(
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        context_lens=torch.tensor([290], dtype=torch.int32),
        block_tables=order[None].int(),
        slots=torch.tensor([-1]),
        k_cache=[moved[0]],
        v_cache=[moved[1]],
    )
    assert torch.equal(run(cuda_twin, q[last], k[last], v[last], other), together[last])


def test_cuda_paged_attention_never_reads_outside_the_window(cuda_twin):
    q, k, v, layout = step_of([(300, 1)], 0, 16)
    want = expected(q, k, v, copied(layout), window=50)
    for cache in (layout.k_cache[0], layout.v_cache[0]):
        cache[layout.block_tables[0, :15].long()] = math.nan  # keys 0..239
    layout.block_tables[0, :15] = -1  # given back
    torch.testing.assert_close(run(cuda_twin, q, k, v, layout, window=50).double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("module", ["twin", "none"])
def test_paged_attention_of_chunks_gathers_their_keys(cuda_twin, module):
    """Prefill beside decode; without the kernel everything gathers."""
    twin = cuda_twin if module == "twin" else None
    for options in OPTIONS.values():
        q, k, v, layout = step_of([(60, 60), (200, 1), (90, 40), (50, 9)], 0, 16)
        check(twin, q, k, v, layout, **options)
        ((kernel, gather),) = layout.plans.values()
        assert gather.rows.shape[0] == (109 if twin else 110)
        assert (kernel is None) == (twin is None)


def test_cuda_paged_attention_reads_strided_heads_and_nothing_at_all(cuda_twin):
    q, k, v, layout = step_of([(30, 1), (5, 1)], 0, 16)
    other = copied(layout)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(run(cuda_twin, q, k, v, layout), run(cuda_twin, *turned, other))
    shifted = [torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x) for x in (k, v)]  # not on a 16-byte boundary
    assert torch.equal(run(cuda_twin, q, k, v, layout), run(cuda_twin, q, *shifted, other))
    assert torch.equal(layout.k_cache[0].nan_to_num(9.0), other.k_cache[0].nan_to_num(9.0))
    empty = step_of([(4, 0), (1, 0)], 0, 16, padding=0)
    assert run(cuda_twin, *empty).shape == (0, 4, 32)


def test_cuda_paged_attention_errors_name_expected_and_got(cuda_twin):
    q, k, v, layout = step_of([(30, 1)], 0, 16)
    with pytest.raises(ValueError, match=r"block_tables must be in \[0, 4\), got 77"):
        run(cuda_twin, q, k, v, replace(layout, block_tables=torch.full((1, 2), 77, dtype=torch.int32)))
    with pytest.raises(ValueError, match="a context of 100 keys needs more than the 2 blocks of its table"):
        run(cuda_twin, q, k, v, replace(layout, context_lens=torch.tensor([100], dtype=torch.int32)))
    with pytest.raises(ValueError, match="sequence 0 has more new tokens than its context_lens"):
        run(cuda_twin, q, k, v, replace(layout, context_lens=torch.tensor([0], dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"head_dim a multiple of 8 up to 256, got float32 \[3, 4, 12\]"):
        run(cuda_twin, *step_of([(30, 1)], 0, 16, head_dim=12))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (7, 1, 128), (3, 3, 256), (6, 3, 17), (3, 3, 168)])
def test_paged_attention_on_the_gpu(heads, kv_heads, head_dim, options, dtype):
    sequences = [(300, 1), (290, 1), (700, 1), (129, 3), (60, 60), (1, 1)]
    q, k, v, layout = step_of(sequences, 17, 16, heads, kv_heads, head_dim, dtype)
    want = expected(q, k, v, copied(layout), **options)
    there = replace(layout, slots=layout.slots.cuda(), k_cache=[layout.k_cache[0].cuda()], v_cache=[layout.v_cache[0].cuda()])
    got = paged_attention(q.cuda(), k.cuda(), v.cuda(), there, 0, scale=0.2, **options)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-2, atol=2e-3 if dtype == torch.float32 else 1e-2)
