"""Steps that are queued before the draws of the one before have been read give what steps give that are not."""

import itertools

import numpy as np
import pytest
import torch
from test_graphs import GraphEngine
from tiny_models import FAMILIES, PARAMS, PROMPTS, llama, prompts_of, ready, values

from fastalign.generation import Engine, SamplingParams
from fastalign.generation.draws import Sampled
from fastalign.generation.params import NotFiniteError, RequestFailedError
from fastalign.generation.runner import Runner, Unread
from fastalign.generation.sampler import Sampler
from fastalign.models.linear import recording_of

TIGHT = [{}, {"block_size": 4, "kv_cache_tokens": 120}, {"max_num_seqs": 5}, {"max_num_batched_tokens": 7}]


@pytest.mark.parametrize("engine", [Engine, GraphEngine])
@pytest.mark.parametrize("options", TIGHT, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_async_engine_generates_the_same_bits(family, options, engine):
    """Forks, preemption (a cache of few blocks), chunked prompts, and sequences that end while the next step is in flight."""
    model = ready(FAMILIES[family]())
    ours, plain = engine(model, **options, async_scheduling=True), Engine(model, **options, async_scheduling=False)
    for _ in range(2):
        assert values(ours.rollout(PROMPTS, PARAMS)) == values(plain.rollout(PROMPTS, PARAMS))
    assert ours.num_used_blocks == 0


def happenings(monkeypatch, engine, prompts, params):
    """What a call does, in order: F a forward pass, R draws that are read."""
    seen = []
    forward, draw = Runner.forward, Sampler.draw

    def reading(*args):
        sampled = draw(*args)
        return Sampled(sampled.tokens, lambda: (seen.append("R"), sampled.read())[1])

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "forward", lambda *args: (seen.append("F"), forward(*args))[1])
        patch.setattr(Sampler, "draw", reading)
        engine.generate(prompts, params)
    return "".join(seen)


@pytest.mark.parametrize(
    "params, wanted",
    [
        (SamplingParams(max_tokens=5, ignore_eos=True), "FF" + "RF" * 3 + "RR"),
        (SamplingParams(max_tokens=1), "FR"),
        (SamplingParams(n=2, max_tokens=5, ignore_eos=True), "FR" + "FF" + "RF" * 2 + "RR"),  # a fork is read at once
        (SamplingParams(max_tokens=4, ignore_eos=True, top_logprobs=2), "FR" * 4),
        (SamplingParams(max_tokens=4, ignore_eos=True, logits_processors=(lambda ids, scores: scores,)), "FR" * 4),
    ],
    ids=["one", "one token", "fork", "alternatives", "processor"],
)
def test_draws_are_read_behind_the_next_forward_pass(monkeypatch, params, wanted):
    engine = Engine(ready(llama()), async_scheduling=True)
    assert happenings(monkeypatch, engine, prompts_of(3, 5), params) == wanted


def test_plain_engine_reads_every_draw_at_once(monkeypatch):
    assert happenings(monkeypatch, Engine(ready(llama())), prompts_of(3), SamplingParams(max_tokens=3, ignore_eos=True)) == "FRFRFR"


def test_sequence_that_stops_is_forwarded_once_too_often_and_nobody_sees_it():
    """Its blocks go to others, which must not read what was written there in vain."""
    model = ready(llama())
    found = {}
    for ahead in (False, True):
        engine = Engine(model, block_size=2, kv_cache_tokens=64, max_num_seqs=3, async_scheduling=ahead)
        stops = SamplingParams(max_tokens=20, seed=3, stop_token_ids=tuple(range(3, 30)), logprobs=True)
        found[ahead] = [
            (o.token_ids, o.logprobs, o.finish_reason) for out in engine.generate(prompts_of(*range(2, 14)), stops) for o in out.outputs
        ]
        assert engine.num_used_blocks == 0
        assert engine.stats.decoded_tokens == sum(len(ids) for ids, _, _ in found[ahead])
    assert found[True] == found[False]
    assert "stop" in {reason for _, _, reason in found[True]}


def test_live_requests_get_their_tokens_a_step_later_and_all_of_them():
    model = ready(llama())
    texts = {}
    for ahead in (False, True):
        engine = Engine(model, async_scheduling=ahead)
        request = engine.add_request(prompts_of(4)[0], SamplingParams(max_tokens=6, seed=1, ignore_eos=True))
        pieces = []
        while engine.has_work:
            engine.step()
            pieces.append(request.new_tokens()[0])
        texts[ahead] = pieces
    assert [len(piece) for piece in texts[False]] == [1] * 6
    assert [len(piece) for piece in texts[True]] == [0, *[1] * 6]
    assert [*itertools.chain(*texts[True])] == [*itertools.chain(*texts[False])]


def test_extended_request_reads_what_was_forwarded_behind_its_stop():
    """The stop token's keys are in the cache already when the request goes on."""
    model = ready(llama())
    ids = {}
    for ahead in (False, True):
        engine = Engine(model, block_size=1, async_scheduling=ahead)
        params = SamplingParams(max_tokens=30, seed=0, stop_token_ids=tuple(range(3, 40)))
        request = engine.add_request(prompts_of(9)[0], params)
        while engine.has_work:
            engine.step()
        following = engine.extend(request, [7, 8], SamplingParams(max_tokens=10, seed=0, ignore_eos=True))
        while engine.has_work:
            engine.step()
        ids[ahead] = [request.output().outputs[0].token_ids, following.output().outputs[0].token_ids]
        assert request.finished
        assert engine.stats.cached_tokens >= 9
    assert ids[True] == ids[False]


def test_update_of_the_weights_draws_anew_what_was_in_flight():
    model = ready(llama())
    head = model.get_output_embeddings().weight
    engine = Engine(model, async_scheduling=True)
    request = engine.add_request(prompts_of(5)[0], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=True))
    for _ in range(4):
        engine.step()
    known = request.output().outputs[0].token_ids
    assert len(known) == 3
    with engine.updating_weights(), torch.no_grad():
        head.copy_(head.flip(0))
    while engine.has_work:
        engine.step()
    out = request.output().outputs[0]
    assert out.weight_versions == [0] * 3 + [1] * 5
    fresh = Engine(model).generate([[*request.prompt_token_ids, *known]], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert out.token_ids == known + fresh[0].outputs[0].token_ids


def broken_after(model, token):
    """Makes what follows a token NaN."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    return model


def test_logits_that_are_not_finite_end_their_request_alone():
    """Another step is in flight by then, with a token for the request that does not exist."""
    prompts, params = prompts_of(4, 6, 8), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    known = [out.outputs[0].token_ids for out in Engine(ready(llama())).generate(prompts, params)]
    others = [prompts[i] + known[i] for i in (1, 2)]
    token = next(t for t in known[0][2:8] if t not in known[0][:2] and not any(t in ids for ids in others) and t not in prompts[0])
    model = broken_after(ready(llama()), token)
    for ahead in (False, True):
        engine = Engine(model, async_scheduling=ahead)
        requests = [engine.add_request(prompt, params) for prompt in prompts]
        while engine.has_work:
            engine.step()
        assert isinstance(requests[0].error, NotFiniteError)
        assert requests[0].output().outputs[0].token_ids == known[0][: known[0].index(token) + 1]
        assert [request.output().outputs[0].token_ids for request in requests[1:]] == known[1:]
        with pytest.raises(NotFiniteError, match="request 0"):
            engine.generate(prompts, params)
        assert engine.num_used_blocks == 0


def test_processor_that_raises_ends_its_request_while_others_are_in_flight():
    def breaks(ids, scores):
        if ids.shape[1] == 9:
            raise ArithmeticError("nine")
        return scores

    prompts, plain = prompts_of(4, 6), SamplingParams(max_tokens=12, seed=0, ignore_eos=True)
    special = SamplingParams(max_tokens=12, seed=0, ignore_eos=True, logits_processors=(breaks,))
    for ahead in (False, True):
        engine = Engine(ready(llama()), async_scheduling=ahead)
        broken, whole = engine.add_request(prompts[0], special), engine.add_request(prompts[1], plain)
        while engine.has_work:
            engine.step()
        assert isinstance(broken.error, RequestFailedError)
        assert len(broken.output().outputs[0].token_ids) == 5
        assert len(whole.output().outputs[0].token_ids) == 12


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_async_engine_on_the_gpu_generates_the_same(family, graphs):
    """No sequence ends early, so that both run the same batches."""
    model = ready(FAMILIES[family]()).cuda()
    params = SamplingParams(n=2, max_tokens=12, seed=0, ignore_eos=True)
    engines = [Engine(model, prefix_caching=False, cuda_graphs=graphs, async_scheduling=ahead) for ahead in (None, False)]
    found, want = (engine.rollout(prompts_of(3, 17), params) for engine in engines)
    for ours, theirs in zip(found.flat, want.flat, strict=True):
        assert ours.ids == theirs.ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.gpu
def test_async_engine_on_the_gpu_waits_for_nothing_in_a_step():
    engine = Engine(ready(llama()).cuda(), prefix_caching=False)
    requests = [engine.add_request(prompt, SamplingParams(max_tokens=20, seed=0, ignore_eos=True)) for prompt in prompts_of(3, 17)]
    for _ in range(5):  # prompts, and the recording of a graph
        engine.step()
    torch.cuda.set_sync_debug_mode("error")  # it knows of no events: the tokens of the step before may be waited for
    try:
        for _ in range(10):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while engine.has_work:
        engine.step()
    assert [len(request.output().outputs[0].token_ids) for request in requests] == [20] * 2


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1], [2], [1, 0, 3, 2]])
def test_unread_tokens_are_put_where_their_sequences_are(order):
    rows, at = np.array([4, 0, 9, 2]), np.array([5, 0, 3, 2])
    unread = Unread(torch.tensor([10, 11, 12, 13]), rows)
    ids = torch.full((6,), -1)
    unread.put(ids, rows[order], at[order])
    want = [-1] * 6
    for i in order:
        want[at[i]] = 10 + i
    assert ids.tolist() == want
    ids = torch.full((6,), -1)
    unread.put(ids, rows, np.arange(4))
    assert ids.tolist() == [10, 11, 12, 13, -1, -1]


def test_recording_reads_every_draw_at_once(monkeypatch):
    model = ready(llama())
    engine = Engine(model, async_scheduling=True)
    with engine.recording(recording_of(model, 256, 1 << 24)):
        assert happenings(monkeypatch, engine, prompts_of(3), SamplingParams(max_tokens=3, ignore_eos=True)) == "FRFRFR"
