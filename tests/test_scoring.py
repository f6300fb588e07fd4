"""Log-probs of given sequences: the sampler's own, whatever they share and however they are cut."""

import random

import pytest
import torch
from tiny_models import FAMILIES, PARAMS, PROMPTS, VOCAB, llama, prompts_of, ready

from fastalign.generation import Engine, SamplingParams, scoring
from fastalign.generation.scoring import score_sequences
from fastalign.models.backbone import head_of, hidden_states
from fastalign.ops.backend import native
from fastalign.ops.linear_logp import linear_logp
from fastalign.packing import conversation, pack


@pytest.fixture(scope="module")
def model():
    return ready(llama())


def assert_same(ours, theirs):
    """Bitwise on the native attention; the reference's sums in an order that depends on the batch."""
    if native() is not None:
        assert ours == theirs
    else:
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_what_the_engine_reported(family, dtype):
    if dtype == torch.bfloat16 and native() is None:
        pytest.skip("the reference attention rounds bf16 in another order for each batch")
    engine = Engine(ready(FAMILIES[family]()).to(dtype), block_size=4)
    outs = engine.generate(PROMPTS, PARAMS)
    sampled = [(out.prompt_token_ids, sample) for out in outs for sample in out.outputs]
    for max_tokens in (8192, 40, 1):
        engine.max_num_batched_tokens = max_tokens
        scores = engine.score([prompt + sample.token_ids for prompt, sample in sampled])
        for (prompt, sample), score in zip(sampled, scores, strict=True):
            assert score.token_ids == prompt + sample.token_ids
            assert score.logprobs[0] is None
            assert_same(score.logprobs[len(prompt) :], sample.raw_logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_linear_logp_at_any_temperature(family):
    built = ready(FAMILIES[family]())
    head, (ids,) = head_of(built), prompts_of(30)
    packed = pack(conversation(ids))
    with torch.no_grad():
        hidden = hidden_states(built, packed)[packed.rows]
        options = {"temperature": head.temperature(0.7), "logit_softcap": head.logit_softcap}
        wanted = linear_logp(hidden, head.weight, packed.targets, **options).tolist()
    assert_same(score_sequences(built, [ids], temperature=0.7)[0].logprobs[1:], wanted)


def test_score_of_nested_and_repeated_sequences(model):
    """Prefixes of prefixes, branches everywhere, repetitions: each scores as if it were alone."""
    generator = random.Random(0)
    sequences = [[generator.choice([5, 6]) for _ in range(generator.randint(1, 12))] for _ in range(80)]
    alone = [score_sequences(model, [sequence])[0] for sequence in sequences]
    for max_tokens in (8192, 30):
        together = score_sequences(model, sequences, max_tokens=max_tokens)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert_same(ours.logprobs[1:], theirs.logprobs[1:])


def test_score_forwards_what_is_shared_once(model, monkeypatch):
    forwarded = []
    inner = scoring.hidden_states
    monkeypatch.setattr(scoring, "hidden_states", lambda model, packed: forwarded.append(packed.num_tokens) or inner(model, packed))
    (prompt,) = prompts_of(100)
    answers = [[*prompt, 5, 6, token] for token in range(10, 20)]
    score_sequences(model, [*answers, prompt, answers[0]])
    assert forwarded == [100 + 2 + 10]
    forwarded.clear()
    score_sequences(model, answers, max_tokens=105)
    assert len(forwarded) == 4
    assert max(forwarded) <= 105


def test_score_names_the_most_probable_tokens(model):
    (ids,) = prompts_of(6)
    score = score_sequences(model, [ids], top_logprobs=4)[0]
    assert score.top_logprobs[0] is None
    for place in range(1, len(ids)):
        every = [score.logprobs[-1] for score in score_sequences(model, [[*ids[:place], token] for token in range(VOCAB)])]
        best = sorted(every, reverse=True)[:4]
        assert_same([value for _, value in score.top_logprobs[place]], best)
        assert all(every[token] == pytest.approx(value, abs=1e-5) for token, value in score.top_logprobs[place])


def test_score_leaves_live_requests_alone(model):
    engine = Engine(model)
    plain = engine.generate(PROMPTS, PARAMS)
    requests = [engine.add_request(prompt, PARAMS, request_id=i) for i, prompt in enumerate(PROMPTS)]
    while engine.has_work:
        engine.step()
        engine.score(prompts_of(7, 9), top_logprobs=2)
        with pytest.raises(ValueError, match="sequence 0 is empty"):
            engine.score([[]])
    assert [[o.token_ids for o in request.output().outputs] for request in requests] == [[o.token_ids for o in p.outputs] for p in plain]
    assert engine.num_used_blocks == 0


@pytest.mark.parametrize(
    "sequences, options, message",
    [
        ([[3], []], {}, "sequence 1 is empty"),
        ([[3, VOCAB]], {}, rf"vocabulary size {VOCAB}\), got {VOCAB} at position 1"),
        ([[3, -1]], {}, "got -1 at position 1"),
        ([[3] * 161], {}, "has 161 tokens, expected at most 160"),
        ([[3]], {"temperature": 0}, "temperature must be finite and > 0, got 0"),
        ([[3]], {"top_logprobs": VOCAB + 1}, "top_logprobs must be in"),
    ],
)
def test_score_refuses(model, sequences, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model).score(sequences, **options)


def test_score_of_nothing_and_of_one_token(model):
    assert Engine(model).score([]) == []
    assert Engine(model).score([[5]], top_logprobs=2)[0] == scoring.SequenceScores([5], [None], [None])
    assert Engine(model).score([[5, 6]], temperature=2.0)[0].top_logprobs is None


def test_score_in_training_mode_is_without_dropout(model):
    built = ready(llama(attention_dropout=0.5))
    wanted = Engine(built).score(prompts_of(9))
    built.train()
    assert Engine(built).score(prompts_of(9)) == wanted
    assert built.training
    assert Engine(built).generate([3], SamplingParams(max_tokens=1))


def test_score_follows_the_weights():
    built = ready(llama())
    engine = Engine(built)
    before = engine.score(prompts_of(9))
    with torch.no_grad():
        for parameter in built.parameters():  # announced to nobody
            parameter.mul_(1.1)
    assert engine.score(prompts_of(9)) == Engine(built).score(prompts_of(9)) != before
