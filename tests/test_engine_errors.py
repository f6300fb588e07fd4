"""What the engine refuses, and that it is whole after anything that breaks a call."""

import pytest
import torch
from tiny_models import PARAMS, PROMPTS, VOCAB, llama, prompts_of, ready, values

from fastalign.generation import Engine, SamplingParams
from fastalign.generation.run import Run


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
    [{"n": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2}, {"max_tokens": 0}, {"stop": [""]}],
    ids=str,
)
def test_engine_refuses_parameters(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_engine_refuses_what_cannot_fit(model):
    with pytest.raises(ValueError, match=r"kv_cache_tokens=32.*raise kv_cache_tokens or lower max_tokens"):
        Engine(model, kv_cache_tokens=32).generate(prompts_of(20), SamplingParams(max_tokens=30))
    with pytest.raises(ValueError, match="stop_token_ids"):
        Engine(model).generate(prompts_of(3), SamplingParams(stop_token_ids=[VOCAB]))
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
