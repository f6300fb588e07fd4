"""Requests that come, go, wait, branch and survive an update of the weights: each must give what it would give alone."""

from dataclasses import replace

import pytest
import torch
from tiny_models import llama, prompts_of, ready

from fastalign.generation import Engine, SamplingParams
from fastalign.generation.params import RequestFailedError
from fastalign.ops.backend import native


@pytest.fixture(scope="module")
def model():
    return ready(llama())


def drain(engine, limit=2000):
    """Steps until nothing is left; the touched requests of every step."""
    steps = []
    while engine.has_work:
        steps.append(engine.step())
        assert len(steps) < limit, "no progress"
    assert engine.num_used_blocks == 0
    return steps


def alone(model, prompt, params, key):
    return Engine(model, prefix_caching=False).generate([prompt], params, request_ids=[key])[0]


def same(output, other):
    """Bitwise where one native attention serves every batch; the reference's dense attention sums in another order."""
    for ours, theirs in zip(output.outputs, other.outputs, strict=True):
        for name in ("token_ids", "kept_mass", "finish_reason", "stop_reason", "top_logprobs"):
            assert getattr(ours, name) == getattr(theirs, name)
        for name in ("logprobs", "raw_logprobs"):
            wanted = getattr(theirs, name)
            assert getattr(ours, name) == (wanted if native() is not None else pytest.approx(wanted, abs=1e-5))


# --- as they come --------------------------------------------------------------------------------------------------------


def test_requests_added_between_steps_are_what_they_are_alone(model):
    engine = Engine(model, block_size=4, max_num_seqs=5, max_num_batched_tokens=16)
    prompts = prompts_of(3, 30, 9, 17, 5)
    each = [SamplingParams(n=1 + i % 3, temperature=0.5 + 0.3 * i, max_tokens=6 + 3 * i, seed=i) for i in range(5)]
    requests = []
    for prompt, params in zip(prompts, each, strict=True):
        requests.append(engine.add_request(prompt, params))
        engine.step()
        engine.step()
    drain(engine)
    for request, prompt, params in zip(requests, prompts, each, strict=True):
        assert request.finished
        assert request.prompt_token_ids == prompt
        same(request.output(), alone(model, prompt, params, request.id))


def test_step_tells_who_drew_and_streams_each_token_once(model):
    engine = Engine(model)
    long, short = (
        engine.add_request(p, SamplingParams(n=2, max_tokens=m, ignore_eos=True)) for p, m in zip(prompts_of(4, 6), (9, 3), strict=True)
    )
    got = {long.id: [[], []], short.id: [[], []]}
    while engine.has_work:
        for request in engine.step():
            for sample, fresh in zip(got[request.id], request.new_tokens(), strict=True):
                sample += fresh
            assert request.finished or request.output().outputs[0].finish_reason == ""
    assert got[long.id] == [out.token_ids for out in long.output().outputs]
    assert [len(ids) for ids in got[short.id]] == [3, 3]
    assert engine.step() == []


def test_generate_among_live_requests(model):
    engine = Engine(model)
    prompts = prompts_of(7, 12)
    live = engine.add_request(prompts[0], SamplingParams(max_tokens=40, seed=1, ignore_eos=True), request_id=5)
    engine.step()
    batch = engine.generate([prompts[1]], SamplingParams(n=3, max_tokens=5, seed=2))
    same(batch[0], alone(model, prompts[1], SamplingParams(n=3, max_tokens=5, seed=2), 0))
    assert not live.finished
    drain(engine)
    same(live.output(), alone(model, prompts[0], live.params, 5))
    short = engine.add_request(prompts[0], SamplingParams(max_tokens=2))
    engine.generate([prompts[1]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert short.finished
    assert engine.step() == [short], "what a batch's steps did to it is told by the next step"
    assert not engine.has_work


def test_engine_that_is_working_refuses_a_second_call(model):
    engine = Engine(model)

    def meddle(ids, scores):
        engine.add_request([1, 2])
        return scores

    with pytest.raises(RuntimeError, match="one call at a time"):
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, logits_processors=[meddle]))
    assert engine.num_used_blocks == 0


# --- priorities, deadlines, aborts ---------------------------------------------------------------------------------------


def test_urgent_requests_take_the_place_of_others(model):
    engine = Engine(model, max_num_seqs=2)
    prompts = prompts_of(5, 6, 7)
    params = SamplingParams(max_tokens=20, seed=0, ignore_eos=True)
    slow = [engine.add_request(prompt, params, priority=1) for prompt in prompts[:2]]
    for _ in range(3):
        engine.step()
    urgent = engine.add_request(prompts[2], params, priority=0)
    while not urgent.finished:
        engine.step()
    assert engine.stats.preemptions == 1
    assert not slow[1].finished
    drain(engine)
    for request, prompt in zip([*slow, urgent], prompts, strict=True):
        same(request.output(), alone(model, prompt, params, request.id))


def test_priorities_of_a_batch(model):
    order = []
    engine = Engine(model, max_num_seqs=1)
    params = SamplingParams(max_tokens=2, ignore_eos=True, seed=0)
    outs = engine.generate(prompts_of(3, 4, 5), params, priorities=[2, 0, 1], progress=lambda count: order.append(engine.stats.steps))
    assert len(order) == 3
    assert [o.outputs[0].token_ids for o in outs] == [o.outputs[0].token_ids for o in Engine(model).generate(prompts_of(3, 4, 5), params)]
    with pytest.raises(ValueError, match="one priority a prompt"):
        engine.generate(prompts_of(3, 4), params, priorities=[1])


@pytest.mark.parametrize("keep", [True, False])
def test_abort_frees_at_once_and_keeps_what_was_drawn(model, keep):
    engine = Engine(model, block_size=4)
    params = SamplingParams(n=3, max_tokens=30, seed=3, ignore_eos=True)
    other = engine.add_request(prompts_of(6)[0], params)
    request = engine.add_request(prompts_of(9)[0], params)
    for _ in range(5):
        engine.step()
    held = engine.num_used_blocks
    engine.abort(request, keep_partial=keep)
    assert engine.num_used_blocks < held
    assert request.finished
    whole = alone(model, prompts_of(9)[0], params, request.id)
    for out, full in zip(request.output().outputs, whole.outputs, strict=True):
        assert out.finish_reason == "abort"
        assert out.token_ids == (full.token_ids[: len(out.token_ids)] if keep else [])
        assert len(out.token_ids) == (5 if keep else 0)
    engine.abort(request)  # again: nothing
    drain(engine)
    assert other.output().outputs[0].finish_reason == "length"


def test_abort_before_the_prompt_is_computed(model):
    engine = Engine(model, max_num_batched_tokens=8, max_num_seqs=2)
    first, second = (engine.add_request(prompts_of(30)[0], SamplingParams(n=4, max_tokens=4)) for _ in range(2))
    engine.step()
    engine.abort(first)
    engine.abort(second)
    assert not engine.has_work
    assert engine.num_used_blocks == 0
    assert [out.finish_reason for out in first.output().outputs] == ["abort"] * 4


def test_a_request_ends_when_its_time_is_over(model, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("fastalign.generation.deadlines.time.monotonic", lambda: clock[0])
    engine = Engine(model)
    params = SamplingParams(n=2, max_tokens=400, timeout=5.0, ignore_eos=True)
    request = engine.add_request(prompts_of(5)[0], params)
    for _ in range(3):
        engine.step()
    clock[0] = 5.1
    assert engine.step() == [request]
    assert [(out.finish_reason, out.stop_reason) for out in request.output().outputs] == [("abort", "timeout")] * 2
    assert len(request.output().outputs[0].token_ids) == 3
    assert engine.num_used_blocks == 0

    def wait(ids, scores):
        clock[0] += 1.0
        return scores

    late = SamplingParams(max_tokens=400, timeout=5.0, ignore_eos=True, logits_processors=[wait])
    batch = engine.generate(prompts_of(4, 5), [SamplingParams(max_tokens=12, ignore_eos=True), late])
    assert [out.outputs[0].finish_reason for out in batch] == ["length", "abort"]
    assert len(batch[1].outputs[0].token_ids) == 5


# --- going on ------------------------------------------------------------------------------------------------------------


def test_extend_goes_on_without_forwarding_what_is_known(model):
    engine = Engine(model, block_size=4)
    params = SamplingParams(max_tokens=12, seed=4, ignore_eos=True)
    first = engine.add_request(prompts_of(21)[0], params)
    with pytest.raises(ValueError, match="still running"):
        engine.extend(first, [1])
    drain(engine)
    engine.stats.reset()
    branches = [engine.extend(first, ids) for ids in ([7, 8, 9], [10])]
    drain(engine)
    known = [*first.prompt_token_ids, *first.output().outputs[0].token_ids]
    assert engine.stats.cached_tokens == 2 * (len(known) - 1) // 4 * 4
    for branch, ids in zip(branches, ([7, 8, 9], [10]), strict=True):
        assert branch.prompt_token_ids == [*known, *ids]
        same(branch.output(), alone(model, [*known, *ids], params, first.id))
    several = engine.add_request(prompts_of(3)[0], SamplingParams(n=2, max_tokens=1))
    drain(engine)
    with pytest.raises(ValueError, match="n=2"):
        engine.extend(several, [1])
    with pytest.raises(ValueError, match="must be below, got 2"):
        engine.extend(several, [1], sample=2)


def test_extend_goes_on_with_one_sample_while_its_siblings_run(model):
    engine = Engine(model, block_size=4)
    params = SamplingParams(n=4, max_tokens=40, seed=2, stop_token_ids=range(3, 20))
    request, branches = engine.add_request(prompts_of(9)[0], params, request_id=7), []
    while engine.has_work:
        engine.step()
        for out in request.new_ends():
            if not request.finished:
                branches.append((engine.extend(request, [5], replace(params, n=1), sample=out.index), out))
    assert branches, "some sample must end before the last one"
    assert request.new_ends() == []
    for branch, out in branches:
        known = [*request.prompt_token_ids, *out.token_ids, 5]
        assert branch.prompt_token_ids == known
        fresh = Engine(model)
        again = fresh.add_request(known, replace(params, n=1), request_id=7, sample=out.index)
        drain(fresh)
        assert again.output().outputs[0].token_ids == branch.output().outputs[0].token_ids
    assert engine.num_used_blocks == 0


def test_prefixes_are_found_again_until_the_room_is_needed(model):
    engine = Engine(model, block_size=4, kv_cache_tokens=64)
    params = SamplingParams(max_tokens=4, seed=0, ignore_eos=True)
    prompts = [prompts_of(40)[0], [*prompts_of(40)[0][:30], 5, 6, 7]]
    for prompt in (*prompts, prompts_of(45, 50)[1][5:], prompts[0]):
        same(engine.generate([prompt], params)[0], alone(model, prompt, params, 0))
        assert engine.num_used_blocks == 0
    assert engine.stats.cached_tokens >= 28
    cold = Engine(model, prefix_caching=False)
    for _ in range(2):
        cold.generate([prompts[0]], params)
    assert cold.stats.cached_tokens == 0
    assert cold.stats.prompt_tokens == 80


# --- weights -------------------------------------------------------------------------------------------------------------


def test_live_requests_go_on_with_new_weights():
    built = ready(llama())
    engine = Engine(built, block_size=4)
    prompts, params = prompts_of(6, 11), SamplingParams(n=2, max_tokens=12, seed=1, ignore_eos=True)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    for _ in range(5):
        engine.step()
    with engine.updating_weights(), torch.no_grad():
        for p in built.parameters():
            p.mul_(1.1)
    drain(engine)
    for request, prompt in zip(requests, prompts, strict=True):
        for out in request.output().outputs:
            assert out.weight_versions == [0] * 5 + [1] * 7
            rest = Engine(built).generate(
                [[*prompt, *out.token_ids[:5]]], SamplingParams(n=2, max_tokens=7, seed=1, ignore_eos=True), request_ids=[request.id]
            )[0]
            assert out.token_ids[5:] == rest.outputs[out.index].token_ids
            assert out.raw_logprobs[5:] == rest.outputs[out.index].raw_logprobs


@pytest.mark.parametrize("change", [lambda p: p.data.mul_(1.3), lambda p: p.mul_(1.3)], ids=["data", "in place"])
def test_weights_changed_without_a_word_are_noticed(change):
    built = ready(llama())
    engine = Engine(built, block_size=4)
    prompt, params = prompts_of(33)[0], SamplingParams(max_tokens=4, seed=0)
    engine.generate([prompt], params)
    with torch.no_grad():
        for p in built.parameters():
            change(p)
    same(engine.generate([prompt], params)[0], alone(built, prompt, params, 0))
    assert engine.stats.cached_tokens == 0


def test_a_change_of_some_columns_is_noticed():
    built = ready(llama())
    engine = Engine(built, block_size=4)
    prompt, params = prompts_of(33)[0], SamplingParams(max_tokens=4, seed=0)
    engine.generate([prompt], params)
    for p in built.parameters():
        p.data[..., 1:] *= 1.3
    same(engine.generate([prompt], params)[0], alone(built, prompt, params, 0))
    assert engine.stats.cached_tokens == 0


# --- processors and alternatives -----------------------------------------------------------------------------------------


def ban_even(ids, scores):
    scores[:, ::2] = -torch.inf
    return scores


def test_logits_processors_as_transformers_calls_them(model):
    seen = []

    def watch(ids, scores):
        seen.append((tuple(ids.shape), scores.dtype))
        return scores

    prompt = prompts_of(5)[0]
    mixed = [
        SamplingParams(n=2, max_tokens=6, seed=1, ignore_eos=True, logits_processors=[watch, ban_even]),
        SamplingParams(max_tokens=6, seed=2),
    ]
    outs = Engine(model).generate([prompt, prompt], mixed)
    for out in outs[0].outputs:
        assert all(token % 2 for token in out.token_ids)
        assert all(a > b for a, b in zip(out.logprobs, out.raw_logprobs, strict=True)), "the mass of the banned half went to the others"
    assert {shape for shape, _ in seen} == {(1, n) for n in range(5, 11)}
    assert {dtype for _, dtype in seen} == {torch.float32}
    same(outs[1], alone(model, prompt, mixed[1], 1))


def test_a_logits_processor_that_raises_ends_its_request_alone(model):
    def broken(ids, scores):
        if ids.shape[1] == 8:
            raise KeyError("no such grammar")
        return scores

    engine = Engine(model)
    prompt, fine = prompts_of(5)[0], SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    bad = engine.add_request(prompt, SamplingParams(n=2, max_tokens=9, logits_processors=[broken], seed=2, ignore_eos=True))
    good = engine.add_request(prompt, fine)
    drain(engine)
    out = bad.output().outputs[0]
    assert out.finish_reason == "error"
    assert "no such grammar" in out.error
    assert len(out.token_ids) == 3
    same(good.output(), alone(model, prompt, fine, good.id))
    with pytest.raises(RequestFailedError, match=r"request 1: a logits processor raised KeyError"):
        engine.generate([prompt, prompt], [fine, SamplingParams(max_tokens=9, logits_processors=[broken], seed=1, ignore_eos=True)])
    with pytest.raises(RequestFailedError, match="must return logits of shape"):
        engine.generate([prompt], SamplingParams(logits_processors=[lambda ids, scores: scores[0]]))
    assert engine.num_used_blocks == 0
    same(engine.generate([prompt], fine, request_ids=[good.id])[0], good.output())


def test_top_logprobs_are_the_most_probable(model):
    params = SamplingParams(n=2, max_tokens=5, seed=1, top_logprobs=4, temperature=0.7)
    for out in Engine(model).generate(prompts_of(6), params)[0].outputs:
        assert len(out.top_logprobs) == len(out.token_ids)
        for token, raw, alternatives in zip(out.token_ids, out.raw_logprobs, out.top_logprobs, strict=True):
            values = [value for _, value in alternatives]
            assert values == sorted(values, reverse=True)
            assert len(values) == 4
            assert dict(alternatives).get(token, raw) == pytest.approx(raw, abs=1e-6)
            assert values[0] >= raw
            assert torch.tensor(values).exp().sum() < 1
