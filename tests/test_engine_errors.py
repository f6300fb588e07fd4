"""What the engine refuses, and that it is whole after anything that breaks a call."""

import pytest
import torch
from tiny_models import PARAMS, PROMPTS, VOCAB, llama, prompts_of, ready, values

from fastalign.generation import Engine, SamplingParams
from fastalign.generation.run import Run
from fastalign.models.attention import UnsupportedModelError
from fastalign.models.probe import probe


@pytest.fixture(scope="module")
def model():
    return ready(llama())


@pytest.fixture(scope="module")
def plain(model):
    return Engine(model).rollout(PROMPTS, PARAMS)


@pytest.mark.parametrize(
    "prompts, match",
    [
        ([[]], "prompt 0 is empty"),
        ([[5], [5, VOCAB]], rf"prompt 1 .*{VOCAB}.* at position 1"),
        ([[-1]], "got -1"),
        ([[5] * 160], "160 tokens, expected at most 159"),
        (["text"], "need a tokenizer"),
    ],
)
def test_engine_refuses_prompts(model, prompts, match):
    with pytest.raises(ValueError, match=match):
        Engine(model).generate(prompts, SamplingParams())


@pytest.mark.parametrize(
    "wrong",
    [
        *({"n": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2}, {"max_tokens": 0}, {"stop": [""]}),
        *(
            {"temperature": 1e-6},
            {"top_k": 2**63},
            {"top_k": 2.5},
            {"seed": 1.5},
            {"max_tokens": 2**40},
            {"n": 2.0},
            {"top_logprobs": 2**63},
        ),
    ],
    ids=str,
)
def test_engine_refuses_parameters(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("wrong", [{"request_id": 2**63}, {"request_id": -(2**63) - 1}, {"sample": 2**63}, {"priority": 2**63}], ids=str)
def test_numbers_that_do_not_fit_are_refused_before_they_end_others(model, plain, wrong):
    engine = Engine(model)
    live = engine.add_request(PROMPTS[0], PARAMS, request_id=0)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be in"):
        engine.add_request(PROMPTS[1], PARAMS, **wrong)
    while engine.has_work:
        engine.step()
    assert [out.token_ids for out in live.output().outputs] == [sample.ids for sample in plain.samples[0]]


def test_a_sequence_ends_where_its_rotary_embedding_would_change_for_all():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    engine = Engine(ready(llama(rope_parameters=rope, max_position_embeddings=32)))
    long, short = prompts_of(24, 4)
    outputs = engine.generate([long, short], SamplingParams(max_tokens=20, seed=0, ignore_eos=True))
    assert [(len(out.outputs[0].token_ids), out.outputs[0].finish_reason) for out in outputs] == [(8, "length"), (20, "length")]


def test_a_family_that_attends_twice_a_layer_is_refused():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.DiffLlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=64)
    with pytest.raises(UnsupportedModelError, match="a layer that attends twice has one place for keys and values"):
        probe(ready(transformers.DiffLlamaForCausalLM(config)))


def test_a_model_that_was_cast_gets_a_cache_of_its_dtype():
    built = ready(llama())
    engine = Engine(built)
    engine.generate(PROMPTS, PARAMS)
    with engine.updating_weights():
        built.bfloat16()
    again = engine.generate(PROMPTS, PARAMS, request_ids=range(len(PROMPTS)))
    fresh = Engine(built).generate(PROMPTS, PARAMS, request_ids=range(len(PROMPTS)))
    assert [out.token_ids for one in again for out in one.outputs] == [out.token_ids for one in fresh for out in one.outputs]


def test_engine_refuses_what_cannot_fit(model):
    with pytest.raises(ValueError, match=r"kv_cache_tokens=32.*raise kv_cache_tokens or lower max_tokens"):
        Engine(model, kv_cache_tokens=32).generate(prompts_of(20), SamplingParams(max_tokens=30))
    with pytest.raises(ValueError, match="stop_token_ids"):
        Engine(model).generate(prompts_of(3), SamplingParams(stop_token_ids=[VOCAB]))
    with pytest.raises(ValueError, match="min_tokens 2: every token of the vocabulary ends the completion"):
        Engine(model).generate(prompts_of(3), SamplingParams(stop_token_ids=list(range(VOCAB)), min_tokens=2, max_tokens=4))
    with pytest.raises(ValueError, match="expected one SamplingParams a prompt"):
        Engine(model).generate(prompts_of(3, 4), [SamplingParams()])
    assert Engine(model).generate([], SamplingParams()) == []


def test_engine_names_the_request_whose_logits_are_not_finite():
    built = ready(llama())
    engine = Engine(built)
    with torch.no_grad():
        built.model.embed_tokens.weight[77] = torch.nan
    with pytest.raises(FloatingPointError, match="request 1, sample 0, position 3"):
        engine.generate([[5, 6, 7], [5, 77, 9]], SamplingParams(max_tokens=4))
    assert engine.num_used_blocks == 0
    assert len(engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True, seed=0))[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["forward", "commit"])
def test_engine_is_usable_after_an_interrupt(model, plain, monkeypatch, error, place):
    engine = Engine(model, kv_cache_tokens=256)
    calls = []

    def breaking(original):
        def call(self, *args):
            calls.append(1)
            if len(calls) == 5:
                raise error
            return original(self, *args)

        return call

    with monkeypatch.context() as patch:
        if place == "commit":
            patch.setattr(Run, "_commit", breaking(Run._commit))
        else:
            patch.setattr(Run, "step", breaking(Run.step))
        with pytest.raises(error):
            engine.rollout(PROMPTS, PARAMS)
    assert engine.num_used_blocks == 0
    assert not model.training
    assert values(engine.rollout(PROMPTS, PARAMS)) == values(plain)


def test_engine_refuses_an_update_while_it_generates(model, monkeypatch):
    engine = Engine(model)

    def meddle(self):
        with engine.updating_weights():
            pass

    monkeypatch.setattr(Run, "step", meddle)
    with pytest.raises(RuntimeError, match="generating"):
        engine.generate(prompts_of(3), SamplingParams())
    assert engine.weight_version == 0


# --- live requests -------------------------------------------------------------------------------------------------------


def alone(model, prompt, params, key):
    return Engine(model, prefix_caching=False).generate([prompt], params, request_ids=[key])[0].outputs


def drain(engine):
    while engine.has_work:
        engine.step()
    assert engine.num_used_blocks == 0


@pytest.mark.parametrize(
    "prompt, params, error, match",
    [
        ([], {}, ValueError, "is empty"),
        ([5, VOCAB], {}, ValueError, rf"{VOCAB} at position 1"),
        ([5, -1], {}, ValueError, "got -1"),
        ([5] * 160, {}, ValueError, "160 tokens, expected at most 159"),
        ([5] * 60, {"max_tokens": 5}, ValueError, "kv_cache_tokens=64"),
        ("text", {}, ValueError, "tokenizer"),
        ([5], {"stop": "x"}, ValueError, "tokenizer"),
        ([5], {"stop_token_ids": [VOCAB]}, ValueError, "stop_token_ids"),
        ([5.5, 6.0], {}, TypeError, "token ids"),
        (["a", "b"], {}, TypeError, "token ids"),
        ([[5, 6], [7, 8]], {}, TypeError, "one list of token ids"),
    ],
    ids=str,
)
def test_add_request_refuses_before_anything_is_queued(model, prompt, params, error, match):
    engine = Engine(model, kv_cache_tokens=64)
    with pytest.raises(error, match=match):
        engine.add_request(prompt, SamplingParams(**params))
    assert not engine.has_work
    fine = SamplingParams(max_tokens=8, seed=0, ignore_eos=True)
    live = engine.add_request(PROMPTS[0], fine, request_id=3)
    engine.step()
    with pytest.raises(error, match=match):
        engine.add_request(prompt, SamplingParams(**params))
    drain(engine)
    assert live.output().outputs == alone(model, PROMPTS[0], fine, 3)


def test_extend_refuses_what_grew_too_long(model):
    engine = Engine(model)
    first = engine.add_request(prompts_of(120)[0], SamplingParams(max_tokens=30, ignore_eos=True))
    drain(engine)
    with pytest.raises(ValueError, match="160 tokens, expected at most 159"):
        engine.extend(first, [5] * 10)
    with pytest.raises(ValueError, match=str(VOCAB)):
        engine.extend(first, [VOCAB])
    assert not engine.has_work
    last = engine.extend(first, [5] * 9, SamplingParams(max_tokens=10, ignore_eos=True))
    drain(engine)
    assert len(last.output().outputs[0].token_ids) == 1


def test_logits_that_are_not_finite_end_their_request_alone():
    built = ready(llama())
    with torch.no_grad():
        built.model.embed_tokens.weight[77] = torch.nan
    engine = Engine(built, block_size=4)
    params = SamplingParams(n=3, max_tokens=6, seed=0, ignore_eos=True)
    fine, bad = engine.add_request([5, 6, 7], params), engine.add_request([5, 77, 9], params)
    touched = engine.step()
    assert bad in touched
    assert bad.finished
    for out in bad.output().outputs:
        assert (out.finish_reason, out.token_ids) == ("error", [])
        assert "hold NaN or +inf" in out.error
    drain(engine)
    assert fine.output().outputs == alone(built, [5, 6, 7], params, fine.id)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_live_requests_end_with_what_they_have_when_a_step_breaks_off(model, plain, error):
    def interrupted(ids, scores):
        if ids.shape[1] == 12:
            raise error
        return scores

    engine = Engine(model, kv_cache_tokens=256, max_num_seqs=3)
    params = SamplingParams(n=2, max_tokens=20, seed=1, ignore_eos=True)
    others = [engine.add_request(prompt, params) for prompt in PROMPTS[:2]]
    cause = engine.add_request(PROMPTS[2], SamplingParams(max_tokens=20, logits_processors=[interrupted], ignore_eos=True), priority=-1)
    with pytest.raises(error):
        drain(engine)
    assert not engine.has_work
    assert engine.num_used_blocks == 0
    assert [out.finish_reason for request in (*others, cause) for out in request.output().outputs] == ["error"] * 5
    for request in others:
        for out, whole in zip(request.output().outputs, alone(model, request.prompt_token_ids, params, request.id), strict=True):
            assert out.token_ids == whole.token_ids[: len(out.token_ids)]
            assert out.logprobs == whole.logprobs[: len(out.token_ids)]
    assert others[0].output().outputs[0].token_ids
    engine.abort(cause)  # without effect
    assert values(engine.rollout(PROMPTS, PARAMS)) == values(plain)


def test_a_batch_whose_time_is_over_before_it_began(model):
    engine = Engine(model)
    late = SamplingParams(n=2, max_tokens=5, timeout=1e-9)
    assert [(o.token_ids, o.finish_reason, o.stop_reason) for o in engine.generate(prompts_of(5), late)[0].outputs] == [
        ([], "abort", "timeout")
    ] * 2
    request = engine.add_request(prompts_of(5)[0], late)
    engine.generate(prompts_of(4), SamplingParams(max_tokens=2))
    engine.release_cache()
    assert engine.step() == [request], "what ended during a batch is told by the next step"
    assert not engine.has_work


def test_a_batch_that_fails_leaves_its_callback_behind(model):
    def broken(ids, scores):
        raise ValueError("never")

    engine, counts = Engine(model), []
    live = engine.add_request(prompts_of(5)[0], SamplingParams(max_tokens=3, ignore_eos=True))
    with pytest.raises(RuntimeError, match="never"):
        engine.generate(prompts_of(4), SamplingParams(logits_processors=[broken]), progress=counts.append)
    assert not live.finished
    before = list(counts)
    drain(engine)
    assert live.finished
    assert counts == before
