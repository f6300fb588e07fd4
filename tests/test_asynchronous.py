"""The engine behind a thread: what clients read is what the engine gives alone, whoever comes, goes, is slow or fails."""

import asyncio
import dataclasses
import random
import threading

import pytest
import torch
from tiny_models import PARAMS, PROMPTS, prompts_of
from tiny_server import byte_model, make_engine

from fastalign.generation import AsyncEngine, EngineClosedError, EngineFailedError, EngineFullError, SamplingParams
from fastalign.ops.backend import native

LONG = SamplingParams(max_tokens=150, seed=3, ignore_eos=True)


@pytest.fixture(autouse=True)
def _one_thread():
    """The engine's thread and the event loop share two cores with whatever else runs there."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return byte_model()


@pytest.fixture(scope="module")
def plain(model):
    return make_engine(model).generate(PROMPTS, PARAMS)


def on_engine(model, scenario, *, max_waiting=None, **options):
    """Runs an asynchronous scenario on a fresh engine; in the end every block must be free."""
    inner = make_engine(model, **options)

    async def main():
        async with AsyncEngine(inner, max_waiting=max_waiting) as engine:
            return await asyncio.wait_for(scenario(engine), 60)

    result = asyncio.run(main())
    assert inner.num_used_blocks == 0
    assert not inner.has_work
    return result


async def joined(deltas, n):
    """Everything that a stream gave, put together by sample."""
    parts = [{"ids": [], "text": "", "raw": [], "own": [], "end": []} for _ in range(n)]
    async for delta in deltas:
        part = parts[delta.index]
        part["ids"] += delta.token_ids
        part["text"] += delta.text
        part["raw"] += delta.raw_logprobs or []
        part["own"] += delta.logprobs or []
        part["end"] += [(delta.finish_reason, delta.stop_reason)] if delta.finish_reason else []
    return parts


def parts_of(output):
    return [
        {
            "ids": out.token_ids,
            "text": out.text,
            "raw": out.raw_logprobs or [],
            "own": out.logprobs or [],
            "end": [(out.finish_reason, out.stop_reason)],
        }
        for out in output.outputs
    ]


async def eventually(holds):
    while not holds():
        await asyncio.sleep(0.002)


# --- what is read -------------------------------------------------------------------------------------------------------


def test_async_streams_are_what_generate_gives(model, plain):
    async def scenario(engine):
        streams = [joined(engine.stream(prompt, PARAMS, request_id=i), PARAMS.n) for i, prompt in enumerate(PROMPTS)]
        return await asyncio.gather(*streams, *(engine.complete(prompt, PARAMS, request_id=i) for i, prompt in enumerate(PROMPTS)))

    results = on_engine(model, scenario)
    assert results[:4] == [parts_of(output) for output in plain]
    assert [parts_of(output) for output in results[4:]] == results[:4]


def test_async_each_sample_ends_once(model):
    """Samples that end while others of their request go on, each told at its own end."""
    params = SamplingParams(n=6, max_tokens=40, seed=2, stop_token_ids=range(3, 40))
    wanted = make_engine(model).generate(PROMPTS[0], params)[0]
    assert len({len(out.token_ids) for out in wanted.outputs}) > 3

    async def scenario(engine):
        return await joined(engine.stream(PROMPTS[0], params, request_id=0), 6)

    assert on_engine(model, scenario) == parts_of(wanted)


def test_async_stop_strings_end_the_text(model):
    free = make_engine(model).generate(PROMPTS[1], LONG)[0].outputs[0].text
    stop = next(free[i : i + 2] for i in range(20, len(free)) if "\ufffd" not in free[i : i + 2])
    params = dataclasses.replace(LONG, stop=[stop, "never this"])

    async def scenario(engine):
        return await joined(engine.stream(PROMPTS[1], params, request_id=0), 1)

    (part,) = on_engine(model, scenario)
    assert part["text"] == free[: free.index(stop)]
    assert part["end"] == [("stop", stop)]


def test_async_top_logprobs_come_with_their_tokens(model):
    params = SamplingParams(n=2, max_tokens=12, seed=1, top_logprobs=3, logprobs=True)
    wanted = make_engine(model).generate(PROMPTS[0], params)[0].outputs

    async def scenario(engine):
        tops = [[], []]
        async for delta in engine.stream(PROMPTS[0], params, request_id=0):
            assert len(delta.top_logprobs) == len(delta.token_ids) == len(delta.logprobs)
            tops[delta.index] += delta.top_logprobs
        return tops

    assert on_engine(model, scenario) == [out.top_logprobs for out in wanted]


def test_async_event_loops_may_share_an_engine(model, plain):
    engine, results = AsyncEngine(make_engine(model)), {}

    def client(i):
        results[i] = asyncio.run(joined(engine.stream(PROMPTS[i], PARAMS, request_id=i), PARAMS.n))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(engine.aclose())
    assert [results[i] for i in range(4)] == [parts_of(output) for output in plain]


def test_async_scores_are_the_engines_and_go_together(model, monkeypatch):
    sequences = prompts_of(9, 30, 5, 17, 9)
    wanted = make_engine(model).score(sequences, top_logprobs=2)
    calls = []

    async def scenario(engine):
        score = engine.engine.score
        monkeypatch.setattr(engine.engine, "score", lambda *args, **options: calls.append(1) or score(*args, **options))
        free = threading.Event()
        held = asyncio.ensure_future(engine.run(free.wait))
        jobs = [asyncio.ensure_future(engine.score([ids], top_logprobs=2)) for ids in sequences]
        bad = asyncio.ensure_future(engine.score([[5], []], top_logprobs=3))
        await asyncio.sleep(0.05)
        free.set()
        await held
        assert [score for job in jobs for score in await job] == wanted
        with pytest.raises(ValueError, match="sequence 1 is empty"):
            await bad

    on_engine(model, scenario)
    assert len(calls) == 2


def test_async_extend_goes_on(model):
    inner = make_engine(model)
    first = inner.add_request(PROMPTS[1], LONG, request_id=0)
    while inner.has_work:
        inner.step()
    params = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    short = SamplingParams(max_tokens=40, seed=3, ignore_eos=True)

    async def scenario(engine):
        stream = await engine.submit(PROMPTS[1], short, request_id=0)
        await stream.result()
        branches = [await engine.extend(stream.request, ids, params) for ids in ([7, 8], [9])]
        return [(await branch.result()).prompt_token_ids for branch in branches]

    known = PROMPTS[1] + first.output().outputs[0].token_ids[:40]
    assert on_engine(model, scenario) == [[*known, 7, 8], [*known, 9]]


# --- clients that go, or are slow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_async_a_client_that_goes_frees_its_blocks(model, how):
    async def scenario(engine):
        seen = asyncio.Event()

        async def client():
            async for _ in engine.stream(PROMPTS[3], LONG):
                seen.set()
                if how == "close":
                    break

        task = asyncio.ensure_future(client())
        await seen.wait()
        if how == "cancel":
            assert engine.engine.num_used_blocks > 0
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: engine.engine.num_used_blocks == 0)
        assert engine.num_live == 0
        assert engine.engine.stats.decoded_tokens < LONG.max_tokens

    on_engine(model, scenario)


def test_async_cancelled_before_it_began(model):
    async def scenario(engine):
        free = threading.Event()
        held = asyncio.ensure_future(engine.run(free.wait))
        task = asyncio.ensure_future(engine.complete(PROMPTS[0], LONG))
        await asyncio.sleep(0.02)
        assert engine.num_waiting == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.num_waiting == 0
        free.set()
        await held
        await engine.run(lambda: None)
        assert engine.num_live == 0
        assert engine.engine.stats.steps == 0

    on_engine(model, scenario)


def test_async_a_slow_reader_holds_nobody_up(model):
    async def scenario(engine):
        slow = await engine.submit(PROMPTS[0], LONG, request_id=0)
        quick = await engine.complete(PROMPTS[1], LONG, request_id=1)
        await eventually(lambda: engine.num_live == 0)
        deltas = [delta async for delta in slow]
        return deltas, quick

    (delta,), quick = on_engine(model, scenario)
    alone = make_engine(model).generate(PROMPTS[:2], LONG)
    assert (delta.token_ids, delta.text) == (alone[0].outputs[0].token_ids, alone[0].outputs[0].text)
    assert quick.outputs[0].token_ids == alone[1].outputs[0].token_ids


@pytest.mark.skipif(native() is None, reason="the reference attention rounds in another order for each batch")
def test_async_many_clients_some_of_whom_go(model):
    """Waves of clients on a cache that is too small for them, a third of whom leave at random: the others lose nothing."""
    prompts = [PROMPTS[i % 4] for i in range(40)]
    params = SamplingParams(n=2, max_tokens=24, seed=7)
    alone = [parts_of(output) for output in make_engine(model).generate(prompts, params)]

    async def scenario(engine):
        generator = random.Random(0)

        async def client(i):
            await asyncio.sleep(generator.random() * 0.1)
            return await joined(engine.stream(prompts[i], params, request_id=i), 2)

        tasks = [asyncio.ensure_future(client(i)) for i in range(len(prompts))]
        for task in tasks[::3]:
            await asyncio.sleep(generator.random() * 0.02)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.engine.stats.preemptions > 0
        return results

    results = on_engine(model, scenario, kv_cache_tokens=256, max_num_seqs=16)
    for i, (got, wanted) in enumerate(zip(results, alone, strict=True)):
        assert got == wanted or (i % 3 == 0 and isinstance(got, asyncio.CancelledError)), i
    assert sum(not isinstance(got, asyncio.CancelledError) for got in results) >= 26


def test_async_refuses_when_too_many_wait(model):
    async def scenario(engine):
        free = threading.Event()
        held = asyncio.ensure_future(engine.run(free.wait))
        tasks = [asyncio.ensure_future(engine.complete(PROMPTS[0], PARAMS)) for _ in range(3)]
        await asyncio.sleep(0.02)
        with pytest.raises(EngineFullError, match="3 requests wait for their first token"):
            await engine.complete(PROMPTS[0], PARAMS)
        free.set()
        await held
        assert len(await asyncio.gather(*tasks)) == 3
        assert engine.num_waiting == 0
        assert await engine.complete(PROMPTS[0], PARAMS)

    on_engine(model, scenario, max_waiting=3)


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_async_a_bad_request_is_refused_alone(model, plain):
    async def scenario(engine):
        good = asyncio.ensure_future(joined(engine.stream(PROMPTS[0], PARAMS, request_id=0), PARAMS.n))
        with pytest.raises(ValueError, match="expected at most 191"):
            await engine.complete([3] * 500, PARAMS)
        with pytest.raises(ValueError, match="got 999 at position 1"):
            async for _ in engine.stream([3, 999], PARAMS):
                pass
        assert await good == parts_of(plain[0])
        assert engine.num_waiting == 0

    on_engine(model, scenario)


def test_async_an_error_of_one_request_ends_it_alone(model, plain):
    def failing(ids, scores):
        if ids.shape[1] > len(PROMPTS[1]) + 3:
            raise ZeroDivisionError("on purpose")
        return scores

    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True, logits_processors=[failing])

    async def scenario(engine):
        good = asyncio.ensure_future(joined(engine.stream(PROMPTS[0], PARAMS, request_id=0), PARAMS.n))
        with pytest.raises(RuntimeError, match="ZeroDivisionError: on purpose"):
            await engine.complete(PROMPTS[1], params)
        deltas = [delta async for delta in engine.stream(PROMPTS[1], params)]
        assert deltas[-1].finish_reason == "error"
        assert "on purpose" in deltas[-1].error
        assert sum(len(delta.token_ids) for delta in deltas) == 4
        assert await good == parts_of(plain[0])

    on_engine(model, scenario)


def test_async_a_failed_step_reaches_every_client_and_the_engine_goes_on(model, plain):
    async def scenario(engine):
        readers = [asyncio.ensure_future(joined(engine.stream(prompt, LONG), 1)) for prompt in PROMPTS]
        await eventually(lambda: engine.engine.stats.decoded_tokens > 20)
        forward = engine.engine._run.runner.forward
        engine.engine._run.runner.forward = lambda *args: forward(*args) + 1 / 0
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, EngineFailedError)
            assert "ZeroDivisionError" in str(result)
            assert isinstance(result.__cause__, ZeroDivisionError)
        assert engine.failure is None
        again = await joined(engine.stream(PROMPTS[0], PARAMS, request_id=0), PARAMS.n)
        assert again == parts_of(plain[0])

    on_engine(model, scenario)


def test_async_a_dead_engine_says_so(model, monkeypatch):
    inner = make_engine(model)

    def broken():
        raise OSError("the device is gone")

    async def main():
        engine = AsyncEngine(inner)
        monkeypatch.setattr(inner, "step", broken)
        monkeypatch.setattr(inner, "abort", lambda request: broken())
        with pytest.raises(EngineFailedError, match="the device is gone"):
            await engine.complete(PROMPTS[0], LONG)
        await eventually(lambda: engine.failure is not None)
        await asyncio.to_thread(engine._thread.join)
        for call in (engine.complete(PROMPTS[0]), engine.score([[3]]), engine.run(lambda: None)):
            with pytest.raises(EngineFailedError, match="the engine is dead: the device is gone"):
                await call
        await engine.aclose()

    asyncio.run(asyncio.wait_for(main(), 60))


# --- weights and the end ------------------------------------------------------------------------------------------------


def test_async_weights_change_between_two_steps():
    built = byte_model()

    async def scenario(engine):
        stream = await engine.submit(PROMPTS[0], LONG)
        await eventually(lambda: engine.engine.stats.decoded_tokens > 10)
        async with engine.updating_weights():
            steps = engine.engine.stats.steps
            await asyncio.sleep(0.05)
            assert engine.engine.stats.steps == steps
            with torch.no_grad():
                for parameter in built.parameters():
                    parameter.mul_(1.05)
        return (await stream.result()).outputs[0]

    out = on_engine(built, scenario)
    assert len(out.token_ids) == LONG.max_tokens
    assert set(out.weight_versions) == {0, 1}
    assert out.weight_versions == sorted(out.weight_versions)


def test_async_an_error_while_the_weights_change_lets_the_engine_go_on(model, plain):
    async def scenario(engine):
        with pytest.raises(ZeroDivisionError):
            async with engine.updating_weights():
                raise ZeroDivisionError
        assert await joined(engine.stream(PROMPTS[0], PARAMS, request_id=0), PARAMS.n) == parts_of(plain[0])

    on_engine(model, scenario)


def test_async_close_ends_what_runs(model):
    inner = make_engine(model)

    async def main():
        engine = AsyncEngine(inner)
        stream = await engine.submit(PROMPTS[0], LONG)
        await eventually(lambda: inner.stats.decoded_tokens > 5)
        await asyncio.gather(engine.aclose(), engine.aclose())
        parts = await joined(stream, 1)
        assert parts[0]["end"] == [("abort", None)]
        assert 5 < len(parts[0]["ids"]) < LONG.max_tokens
        assert inner.num_used_blocks == 0
        with pytest.raises(EngineClosedError):
            await engine.complete(PROMPTS[0])
        with pytest.raises(EngineClosedError):
            await engine.score([[3]])

    asyncio.run(asyncio.wait_for(main(), 60))


def test_async_close_may_wait_for_what_runs(model):
    async def main():
        engine = AsyncEngine(make_engine(model))
        stream = await engine.submit(PROMPTS[0], LONG)
        await engine.aclose(drain_seconds=60)
        return await joined(stream, 1)

    assert asyncio.run(asyncio.wait_for(main(), 90))[0]["end"] == [("length", None)]


def test_async_refuses_a_limit_of_nothing(model):
    with pytest.raises(ValueError, match="max_waiting must be >= 1"):
        AsyncEngine(make_engine(model), max_waiting=0)
