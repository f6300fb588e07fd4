"""Decode steps on fixed buffers are bitwise the plain forward on the CPU, where a stand-in runs the step again; graphs on a GPU."""

import gc
import random
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cuda_attention import step_of
from tiny_models import FAMILIES, PARAMS, PROMPTS, Floats, llama, prompts_of, ready, values

from fastalign.generation import Engine, SamplingParams, graphs
from fastalign.generation.graphs import DecodeGraphs, FixedBuffers, record_nothing, sequence_bucket
from fastalign.generation.plan import Plan
from fastalign.generation.rows import Rows
from fastalign.generation.runner import KVCache, Runner
from fastalign.ops import attention_paged
from fastalign.ops.attention import PagedLayout
from fastalign.ops.attention_paged import SPLIT, FixedStep, cells_of, refill
from fastalign.ops.backend import native

NOTHING = (np.empty(0, np.int32), np.empty(0, np.int32))


class GraphEngine(Engine):
    """An engine that runs its decode steps on fixed buffers, on the CPU too."""

    def _ready_run(self, groups, pool, cache, *others, **options):
        if cache.graphs is None:
            cache.graphs = DecodeGraphs(self.model, self.block_size, record=record_nothing)
        return super()._ready_run(groups, pool, cache, *others, **options)

    @property
    def graphs(self):
        return self._memory.cache.graphs


def same(ours, theirs):
    """Bitwise where rows do not depend on the batch; the reference's dense attention does."""
    if native() is not None:
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- buckets ------------------------------------------------------------------------------------------------------------


def test_sequence_bucket_wastes_no_more_than_half_and_then_15_rows():
    found = [sequence_bucket(n) for n in range(1, 300)]
    assert sorted(set(found[:256])) == [1, 2, 4, 8, *range(16, 257, 16)]
    for n, bucket in zip(range(1, 300), found, strict=True):
        assert n <= bucket < (2 * n if n <= 16 else n + 16)


def test_cells_of_is_what_the_plan_of_the_kernel_counts(cuda_twin):
    contexts = [1, 127, 128, 129, 1000]
    q, k, v, layout = step_of([(context, 1) for context in contexts], 0, 16)
    attention_paged.paged_attention(cuda_twin, q, k, v, layout, 0, scale=0.2, window=None, softcap=None)
    ((kernel, _),) = layout.plans.values()
    assert kernel.cells == cells_of(np.array(contexts)) == 1 + 1 + 1 + 2 + 8
    assert SPLIT * 8 >= 1000


# --- the runner ---------------------------------------------------------------------------------------------------------


def random_rows(choose, cache, block_size, num_rows, width):
    """Rows of random length over random blocks, some prefixes shared."""
    rows = Rows(num_rows, width, width, -(-width // block_size))
    free = list(range(cache.num_blocks))
    choose.shuffle(free)
    for row in range(num_rows):
        length = choose.randint(2, width)
        rows.tokens[row] = [choose.randrange(3, 131) for _ in range(width)]
        rows.length[row], rows.computed[row] = length, length - 1
        blocks = -(-length // block_size)
        shared = min(blocks - 1, int(rows.num_blocks[row - 1]) - 1) if row and choose.random() < 0.5 else 0
        rows.table[row, :shared] = rows.table[row - 1, :shared]
        rows.table[row, shared:blocks] = [free.pop() for _ in range(blocks - shared)]
        rows.num_blocks[row] = blocks
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(4))
def test_decode_graphs_of_random_schedules_are_bitwise_the_runner(seed, dtype):
    """Batches that grow and shrink over a cache of random keys: every bucket is filled with another step after another."""
    choose, block_size = random.Random(seed), random.Random(seed).choice([1, 4, 16])
    model = ready((list(FAMILIES.values()))[seed % 3]()).to(dtype)
    plain, fixed = (KVCache(model, 40 * 48 // block_size, block_size) for _ in range(2))
    plain.data.normal_()
    fixed.data.copy_(plain.data)
    rows = random_rows(choose, plain, block_size, 37, 40)
    ours = fixed.graphs = DecodeGraphs(model, block_size, record=record_nothing)
    with torch.no_grad():
        for _ in range(12):
            taken = np.array(sorted(choose.sample(range(37), choose.choice([1, 2, 3, 5, 8, 9, 16, 17, 33, 37]))))
            starts = np.array([choose.randrange(int(rows.length[row])) for row in taken])
            plan = Plan(taken, starts, np.ones_like(taken), NOTHING)
            want = Runner(model, plain, rows, block_size).forward(plan)
            got = Runner(model, fixed, rows, block_size).forward(plan)
            same(got, want)
            same(fixed.data, plain.data)  # padding rows wrote nowhere
    assert ours.replayed == 12
    assert 1 < ours.recorded < 12


def test_decode_graphs_leave_prompts_and_mixed_steps_alone():
    model = ready(llama())
    cache = KVCache(model, 8, 16)
    rows = random_rows(random.Random(0), cache, 16, 2, 40)
    ours = DecodeGraphs(model, 16, record=record_nothing)
    for counts in ([1, 2], [2, 2], []):
        taken = np.arange(len(counts))
        assert ours.forward(Plan(taken, np.zeros(len(counts), np.int64), np.array(counts, np.int64), NOTHING), rows, cache) is None
    assert ours.recorded == 0


def test_fixed_buffers_say_nothing_of_the_step_before():
    cache = KVCache(ready(llama()), 8, 4)
    buffers = FixedBuffers(cache, 4, 4, 4, 4)
    buffers.fill(np.array([5, 6, 7]), np.array([9, 2, 4]), np.array([[3, 1, 2], [4, 0, 0], [5, 6, 0]], np.int32))
    assert buffers.layout.slots.tolist() == [2 * 4 + 1, 4 * 4 + 2, 6 * 4, -1]
    assert buffers.layout.context_lens.tolist() == [10, 3, 5, 0]
    buffers.fill(np.array([8]), np.array([1]), np.array([[7]], np.int32))
    assert buffers.ids.tolist() == [8, 0, 0, 0]
    assert buffers.positions.tolist() == [1, 0, 0, 0]
    assert buffers.layout.slots.tolist() == [29, -1, -1, -1]
    assert buffers.layout.context_lens.tolist() == [2, 0, 0, 0]
    assert buffers.layout.cu_seqlens.tolist() == [0, 1, 1, 1, 1]
    assert buffers.layout.block_tables[0, 0] == 7


# --- the engine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 4, "kv_cache_tokens": 120}, {"max_num_seqs": 5}, {"max_num_batched_tokens": 7}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_with_decode_graphs_generates_the_same_bits(family, options):
    """Forks, copies on write, preemption (a cache of few blocks) and chunked prompts between the replays; a second call reuses them."""
    model = ready(FAMILIES[family]())
    ours, plain = GraphEngine(model, **options), Engine(model, **options)
    assert values(ours.rollout(PROMPTS, PARAMS)) == values(plain.rollout(PROMPTS, PARAMS))
    recorded = ours.graphs.recorded
    assert ours.graphs.replayed > recorded > 0
    assert values(ours.rollout(PROMPTS, PARAMS)) == values(plain.rollout(PROMPTS, PARAMS))
    assert ours.graphs.recorded == recorded


def test_engine_on_the_cpu_records_nothing():
    ours = Engine(ready(llama()))
    ours.rollout(PROMPTS, PARAMS)
    assert ours._memory.cache.graphs is None


def test_released_cache_takes_its_graphs_along():
    ours = GraphEngine(ready(llama()))
    ours.rollout(PROMPTS, PARAMS)
    held = weakref.ref(ours.graphs)
    ours.release_cache()
    gc.collect()
    assert held() is None


def test_engine_with_decode_graphs_serves_requests_as_they_come():
    """Requests that arrive while others run let the cache grow, which moves it; weights change in between."""
    model = ready(llama())
    found = []
    for ours in (GraphEngine(model), Engine(model)):
        torch.manual_seed(3)
        requests = [ours.add_request(prompts_of(5)[0], PARAMS)]
        for number in range(40):
            ours.step()
            if number % 6 == 3 and len(requests) < 5:
                requests.append(ours.add_request(prompts_of(9 + 20 * number % 70)[0], PARAMS))
            if number == 14:
                with ours.updating_weights(), torch.no_grad():
                    model.model.layers[0].mlp.up_proj.weight.mul_(2)
        while ours.has_work:
            ours.step()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.div_(2)
        found.append([[(o.token_ids, Floats(o.logprobs), o.finish_reason) for o in r.output().outputs] for r in requests])
        if isinstance(ours, GraphEngine):
            assert ours.graphs.replayed > 10
    assert found[0] == found[1]


# --- what makes a graph stale -------------------------------------------------------------------------------------------


def graphs_after_a_call(model):
    ours = GraphEngine(model)
    ours.rollout(PROMPTS, PARAMS)
    assert ours.graphs._graphs
    return ours


def test_graphs_survive_an_update_in_place_and_see_the_new_weights():
    model = ready(llama())
    ours = graphs_after_a_call(model)
    kept = dict(ours.graphs._graphs)
    with ours.updating_weights(), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert values(ours.rollout(PROMPTS, PARAMS)) == values(Engine(model).rollout(PROMPTS, PARAMS))
    assert all(ours.graphs._graphs[key] is kept[key] for key in kept)


@pytest.mark.parametrize("change", ["data", "parameter", "buffer"])
def test_graphs_are_forgotten_when_a_weight_moves(change):
    model = ready(llama())
    ours = graphs_after_a_call(model)
    norm = model.model.norm
    if change == "data":
        norm.weight.data = norm.weight.data * 2
    elif change == "parameter":
        norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    else:
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    ours.graphs.verify()
    assert not ours.graphs._graphs
    ours.graphs.verify()
    assert values(ours.rollout(PROMPTS, PARAMS)) == values(Engine(model).rollout(PROMPTS, PARAMS))


def test_graphs_are_forgotten_when_an_adapter_is_switched_off():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(ready(llama()), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ours = graphs_after_a_call(model)
    ours.graphs.verify()
    assert ours.graphs._graphs
    with model.disable_adapter():
        ours.graphs.verify()
        assert not ours.graphs._graphs


def test_old_graphs_make_room(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    model = ready(llama())
    ours = GraphEngine(model)
    assert values(ours.rollout(PROMPTS, PARAMS)) == values(Engine(model).rollout(PROMPTS, PARAMS))
    assert ours.graphs.recorded > 1
    assert len(ours.graphs._graphs) == 1


def test_model_that_cannot_be_recorded_runs_eagerly_and_says_so_once():
    model = ready(llama())
    ours = GraphEngine(model)
    tries = []

    def refuse(step):
        tries.append(step)
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(graphs, "record_nothing", refuse)
        patch.setitem(globals(), "record_nothing", refuse)
        for _ in range(2):
            assert values(ours.rollout(PROMPTS, PARAMS)) == values(Engine(model).rollout(PROMPTS, PARAMS))
    messages = [str(w.message) for w in said if "CUDA graphs" in str(w.message)]
    assert messages == ["fastalign: llama decodes without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"]
    assert len(tries) == 1


# --- the kernel's plan --------------------------------------------------------------------------------------------------


def fixed_twin(layout, sequences, width, cells, blocks):
    """A fixed layout with room for more, over caches of its own."""
    caches = [torch.zeros(blocks, *layout.k_cache[0].shape[1:]) for _ in "kv"]
    tables = torch.zeros(sequences, width, dtype=torch.int32)
    return PagedLayout(
        cu_seqlens=torch.zeros(sequences + 1, dtype=torch.int32),
        context_lens=torch.zeros(sequences, dtype=torch.int32),
        block_tables=tables,
        slots=torch.full((sequences,), -1),
        k_cache=caches[:1],
        v_cache=caches[1:],
        fixed=FixedStep(tables, cells),
    )


def put(fixed, layout, count):
    fixed.cu_seqlens[:] = torch.arange(len(fixed.cu_seqlens)).clamp(max=count)
    fixed.context_lens.zero_()
    fixed.context_lens[:count] = layout.context_lens
    fixed.block_tables[:count, : layout.block_tables.shape[1]] = layout.block_tables
    fixed.slots.fill_(-1)
    fixed.slots[:count] = layout.slots[:count]


@pytest.mark.parametrize("group", [1, 3, 7, 40])
@pytest.mark.parametrize("seed", range(3))
def test_cuda_kernel_with_fixed_launches_gives_the_bits_of_exact_ones(cuda_twin, seed, group):
    """One plan refilled by steps of other sizes, lengths and shared prefixes; padding rows come back as zeros."""
    choose = random.Random(100 * seed + group)
    options = {"scale": 0.2, "window": choose.choice([None, 100]), "softcap": choose.choice([None, 3.0])}
    fixed, launches = None, set()
    for _ in range(5):
        count, shared = choose.randint(1, 6), choose.choice([0, 9, 17])
        sequences = [(shared * 16 + choose.randint(1, 150), 1) for _ in range(count)]
        q, k, v, layout = step_of(sequences, shared, 16, heads=group, kv_heads=1, padding=0)
        q, k, v = (torch.cat([x, torch.randn(6 - count, *x.shape[1:])]) for x in (q, k, v))
        fixed = fixed or fixed_twin(layout, 6, 32, 24, 100)
        for mine, theirs in ((fixed.k_cache[0], layout.k_cache[0]), (fixed.v_cache[0], layout.v_cache[0])):
            mine.fill_(torch.nan)
            mine[: len(theirs)] = theirs
        put(fixed, layout, count)
        refill(fixed)
        got = attention_paged.paged_attention(cuda_twin, q, k, v, fixed, 0, **options)
        want = attention_paged.paged_attention(cuda_twin, q, k, v, replace(layout, slots=fixed.slots), 0, **options)
        assert torch.equal(got, want)
        assert not got[count:].any()
        assert torch.equal(fixed.k_cache[0][: len(layout.k_cache[0])].nan_to_num(9.0), layout.k_cache[0].nan_to_num(9.0))
        assert fixed.k_cache[0][len(layout.k_cache[0]) :].isnan().all()  # padding rows stored nothing
        ((kernel, gather),) = fixed.plans.values()
        assert gather is None
        launches.add((kernel.numbers.data_ptr(), kernel.tokens, kernel.cells, kernel.items))
    assert len(launches) == 1  # a graph keeps the addresses and the grids


def test_cuda_kernel_takes_more_items_than_its_grid_has_blocks(cuda_twin):
    """2200 items on a grid of 2048 blocks: some take a second one."""
    sequences = [(1, 1)] * 2200
    q, k, v, layout = step_of(sequences, 0, 1, heads=1, kv_heads=1, head_dim=8, padding=0)
    fixed = fixed_twin(layout, 2200, 1, 4096, 2202)
    put(fixed, layout, 2200)
    got = attention_paged.paged_attention(cuda_twin, q, k, v, fixed, 0, scale=1.0, window=None, softcap=None)
    ((kernel, _),) = fixed.plans.values()
    assert max(kernel.items) < 2200
    assert torch.equal(got, v)  # one key each: its value


def test_fixed_launches_refuse_a_step_that_does_not_fit(cuda_twin):
    q, k, v, layout = step_of([(300, 1), (300, 1)], 0, 16, padding=0)
    fixed = fixed_twin(layout, 2, 32, 4, 60)
    put(fixed, layout, 2)
    with pytest.raises(ValueError, match="2 tokens and 6 splits of keys does not fit launches for 2 and 4"):
        attention_paged.paged_attention(cuda_twin, q, k, v, fixed, 0, scale=0.2, window=None, softcap=None)
    with pytest.raises(RuntimeError, match="needs the CUDA kernel"):
        attention_paged.paged_attention(None, q, k, v, fixed, 0, scale=0.2, window=None, softcap=None)


# --- on a GPU -----------------------------------------------------------------------------------------------------------


def without_graphs(model, **options):
    return Engine(model, cuda_graphs=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_generate_what_the_plain_engine_generates(family):
    """fp32, where a step's rounding does not flip the most probable token of these models."""
    model = ready(FAMILIES[family]()).cuda()
    params = SamplingParams(n=2, temperature=0.0, max_tokens=24)
    ours = Engine(model, prefix_caching=False)  # a prompt that is forwarded in part has other row counts, and on a GPU other bits
    found = [ours.rollout(prompts_of(3, 17, 33, 120), params) for _ in range(2)]
    want = without_graphs(model).rollout(prompts_of(3, 17, 33, 120), params)
    assert not ours._memory.cache.graphs.reason
    assert ours._memory.cache.graphs.replayed > ours._memory.cache.graphs.recorded > 0
    assert values(found[0]) == values(found[1])  # replays, the first ones just recorded, have the same bits
    for ours_of, want_of in zip(found[0].flat, want.flat, strict=True):
        assert ours_of.ids == want_of.ids
        torch.testing.assert_close(torch.tensor(ours_of.logprobs), torch.tensor(want_of.logprobs), rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_cuda_graph_of_a_full_bucket_is_the_forward_of_its_shape():
    """16 sequences in the bucket of 16: the same kernels at the same shapes, so the same bits."""
    model = ready(llama()).cuda().bfloat16()
    cache = KVCache(model, 48, 16)
    cache.data.normal_()
    rows = random_rows(random.Random(0), cache, 16, 16, 40)
    ours = DecodeGraphs(model, 16)
    plan = Plan(np.arange(16), rows.computed[:16].copy(), np.ones(16, np.int64), NOTHING)
    with torch.no_grad():
        want = Runner(model, cache, rows, 16).forward(plan)
        cache.graphs = ours
        for _ in range(3):
            assert torch.equal(Runner(model, cache, rows, 16).forward(plan), want), ours.reason
    assert (ours.recorded, ours.replayed) == (1, 3)


@pytest.mark.gpu
def test_cuda_graphs_see_updated_weights_and_notice_moved_ones():
    model = ready(llama()).cuda()
    params = SamplingParams(temperature=0.0, max_tokens=12)
    ours = Engine(model)
    ours.rollout(PROMPTS, params)
    graph = ours._memory.cache.graphs
    with ours.updating_weights(), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    found = ours.rollout(PROMPTS, params)
    assert [s.ids for s in found.flat] == [s.ids for s in without_graphs(model).rollout(PROMPTS, params).flat]
    recorded = graph.recorded
    model.model.norm.weight.data = model.model.norm.weight.data * -1
    found = ours.rollout(PROMPTS, params)
    assert [s.ids for s in found.flat] == [s.ids for s in without_graphs(model).rollout(PROMPTS, params).flat]
    assert graph.recorded > recorded


@pytest.mark.gpu
def test_model_that_waits_for_the_device_decodes_without_graphs():
    model = ready(llama()).cuda()
    model.model.norm.register_forward_hook(lambda module, args, out: out * (1.0 if out.sum().item() else 0.0))
    ours, before = Engine(model), torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="llama decodes without CUDA graphs"):
        found = ours.rollout(PROMPTS, PARAMS)
    assert torch.cuda.current_stream() == before
    assert [s.ids for s in ours.rollout(PROMPTS, PARAMS).flat] == [s.ids for s in found.flat]
    assert torch.ones(4, device="cuda").sum().item() == 4  # the device is as usable as before


class FakeCuda:
    """The calls of torch.cuda that a recorder makes, in order; `ends`: a recording can be ended."""

    def __init__(self, patch, ends=True):
        self.calls, self.current, self.ends = [], "main", ends
        note = self.calls.append

        class Stream:
            device = torch.device("cuda", 0)

            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                note(f"{self.name} waits for {other.name}")

        class Graph:
            def capture_begin(graph, pool, capture_error_mode):
                note(f"begin in {pool}")

            def capture_end(graph):
                note("end")
                if not self.ends:
                    raise RuntimeError("capture was invalidated")

            def replay(graph):
                note("replay")

        @contextmanager
        def stream(side):
            before, self.current = self.current, side.name
            yield
            self.current = before

        pools = iter(range(9))
        for name, value in {
            "graph_pool_handle": lambda: f"pool {next(pools)}",
            "Stream": lambda device: Stream("side"),
            "current_stream": lambda device: Stream(self.current),
            "synchronize": lambda device: note("synchronize"),
            "stream": stream,
            "CUDAGraph": Graph,
        }.items():
            patch.setattr(torch.cuda, name, value)


def test_recorder_records_behind_a_warm_up_and_orders_the_replay_behind_both(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    record = graphs.CudaRecorder(torch.device("cuda", 0))
    replay = record(lambda: cuda.calls.append(f"step on {cuda.current}"))
    replay()
    order = [
        "side waits for main",
        "step on side",
        "synchronize",
        "begin in pool 0",
        "step on side",
        "end",
        "main waits for side",
        "replay",
    ]
    assert cuda.calls == order
    record.renew()
    record(lambda: None)
    assert "begin in pool 1" in cuda.calls


@pytest.mark.parametrize("ends", [True, False])
def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch, ends):
    cuda = FakeCuda(monkeypatch, ends)
    runs = iter([None, ValueError("the step waits for the device")])

    def step():
        if (error := next(runs)) is not None:
            raise error

    with pytest.raises(ValueError, match="the step waits"):
        graphs.CudaRecorder(torch.device("cuda", 0))(step)
    assert cuda.current == "main"
    assert cuda.calls[-1] == "end"
    if not ends:
        with pytest.raises(RuntimeError, match="capture was invalidated"):
            graphs.CudaRecorder(torch.device("cuda", 0))(lambda: None)
        assert cuda.current == "main"
