"""The engine on real models: what it generates, the log-probs it reports, and that nothing but speed depends on the schedule."""

import dataclasses

import pytest
import torch
from test_sampler import kept_probabilities
from test_token_tree import FAMILIES as EVERY_FAMILY
from tiny_models import FAMILIES, PARAMS, PROMPTS, VOCAB, llama, prompts_of, ready, sampled_logprobs, scored, values

from fastalign.generation import Engine, SamplingParams
from fastalign.models.backbone import hidden_states
from fastalign.ops.backend import native
from fastalign.packing import conversation, pack


@pytest.fixture(scope="module")
def model():
    return ready(llama())


@pytest.fixture(scope="module")
def plain(model):
    return Engine(model).rollout(PROMPTS, PARAMS)


def assert_same(ours, theirs):
    """Bitwise where one native attention serves both; the reference's dense attention sums in another order."""
    if native() is not None:
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- what is generated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_greedy_is_model_generate(family):
    built = ready(FAMILIES[family]())
    outs = Engine(built).generate(prompts_of(3, 17, 33), SamplingParams(temperature=0.0, max_tokens=24))
    for out in outs:
        ids = torch.tensor([out.prompt_token_ids])
        wanted = built.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert out.outputs[0].token_ids == wanted.tolist()
        assert out.outputs[0].logprobs == out.outputs[0].raw_logprobs


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_engine_serves_every_family_as_model_generate_does(family):
    built = ready(EVERY_FAMILY[family]())
    prompts = [[token % 97 for token in prompt] for prompt in prompts_of(3, 17, 33)]
    engine = Engine(built, block_size=4, max_num_seqs=2, max_num_batched_tokens=20, kv_cache_tokens=76)
    params = SamplingParams(temperature=0.0, max_tokens=24)
    requests = [engine.add_request(prompt, params) for prompt in (*prompts, prompts[2])]
    while engine.has_work:
        engine.step()
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        wanted = built.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert request.output().outputs[0].token_ids == wanted.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_on_the_gpu_is_model_generate(family):
    built = ready(FAMILIES[family]()).cuda()
    outs = Engine(built).generate(prompts_of(3, 17, 33, 120), SamplingParams(n=2, temperature=0.0, max_tokens=24))
    for out in outs:
        ids = torch.tensor([out.prompt_token_ids], device="cuda")
        wanted = built.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert [sample.token_ids for sample in out.outputs] == [wanted.tolist()] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_logprobs_are_the_trainers(family, dtype):
    if dtype == torch.bfloat16 and native() is None:
        pytest.skip("the reference attention rounds bf16 in another order for each batch")
    built = ready(FAMILIES[family]()).to(dtype)
    params = SamplingParams(n=3, temperature=0.77, max_tokens=20, seed=5)
    rollout = Engine(built, block_size=4).rollout(prompts_of(1, 18, 40), params)
    assert_same(sampled_logprobs(rollout), scored(built, rollout, 0.77))
    assert_same(sampled_logprobs(rollout, raw=True), scored(built, rollout, 1.0))
    assert all(s.kept_mass is None for s in rollout.flat)


def test_engine_logprobs_of_a_truncated_distribution(model):
    params = SamplingParams(n=4, temperature=0.9, top_k=20, top_p=0.7, max_tokens=12, seed=1)
    rollout = Engine(model).rollout(prompts_of(9, 12), params)
    kept = torch.tensor([k for s in rollout.flat for k in s.kept_mass])
    assert float(kept.min()) < 0.8
    torch.testing.assert_close(sampled_logprobs(rollout), scored(model, rollout, 0.9) - kept.log(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sampled_logprobs(rollout, raw=True), scored(model, rollout, 1.0), rtol=0, atol=1e-5)


def test_engine_at_temperature_zero_reports_the_models_logprob(model):
    rollout = Engine(model).rollout(prompts_of(9), SamplingParams(n=2, temperature=0.0, max_tokens=8, top_k=4))
    assert rollout.flat[0].ids == rollout.flat[1].ids
    assert rollout.flat[0].logprobs == rollout.flat[0].raw_logprobs
    assert_same(sampled_logprobs(rollout), scored(model, rollout, 1.0))


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.08},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_engine_samples_follow_the_models_distribution(model, case):
    """χ² of many first tokens, and of the tokens after the most frequent first one, against the model's own probabilities."""
    prompt, n = prompts_of(7)[0], 12000
    engine = Engine(model, max_num_seqs=n, max_num_batched_tokens=n)
    outs = engine.generate([prompt], SamplingParams(n=n, max_tokens=2, seed=3, ignore_eos=True, logprobs=False, **case))[0].outputs
    drawn = torch.tensor([out.token_ids for out in outs])
    common = int(drawn[:, 0].mode().values)
    for ids, seen in ((prompt, drawn[:, 0]), ([*prompt, common], drawn[drawn[:, 0] == common, 1])):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        probabilities, _ = kept_probabilities(logits, **case)
        counts = torch.bincount(seen, minlength=VOCAB).double()
        assert bool((counts[probabilities == 0] == 0).all())
        expected = probabilities * len(seen)
        rare = expected < 5  # one bin
        counts, expected = (torch.cat([values[~rare], values[rare].sum()[None]]) for values in (counts, expected))
        live = expected > 0
        chi2, freedom = float(((counts - expected)[live] ** 2 / expected[live]).sum()), int(live.sum()) - 1
        assert chi2 < freedom + 4.5 * (2 * freedom) ** 0.5 + 8


def test_engine_mixes_parameters_in_one_batch(model):
    prompts = prompts_of(5, 6, 7, 8)
    each = [
        SamplingParams(temperature=0.0, max_tokens=9),
        SamplingParams(n=3, temperature=0.5, max_tokens=4, seed=1),
        SamplingParams(temperature=1.0, top_k=3, max_tokens=15, seed=2),
        SamplingParams(temperature=2.0, max_tokens=9, seed=3, logprobs=False),
    ]
    outs = Engine(model).generate(prompts, each)
    for i, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
        alone = Engine(model).rollout([prompt], params, request_ids=[i])
        assert [o.token_ids for o in outs[i].outputs] == [s.ids for s in alone.flat]
        if params.logprobs:
            assert [o.logprobs for o in outs[i].outputs] == [s.logprobs for s in alone.flat]
    assert outs[3].outputs[0].logprobs is None
    assert outs[2].outputs[0].kept_mass is not None
    assert [o.index for o in outs[1].outputs] == [0, 1, 2]


# --- what must not matter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 1},
        {"block_size": 5},
        {"block_size": 64},
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": 12},
        {"kv_cache_tokens": 64},
        {"kv_cache_tokens": 46, "block_size": 2, "max_num_batched_tokens": 13},
    ],
    ids=str,
)
def test_engine_does_not_depend_on_the_schedule(model, plain, options):
    engine = Engine(model, **options)
    assert values(engine.rollout(PROMPTS, PARAMS)) == values(plain)
    assert engine.num_used_blocks == 0
    if "kv_cache_tokens" in options:
        assert engine.stats.preemptions > 0


def test_engine_does_not_depend_on_company_or_order(model, plain):
    engine = Engine(model)
    order = [2, 0, 3, 1]
    shuffled = engine.rollout([PROMPTS[i] for i in order], PARAMS, request_ids=order)
    assert [values(shuffled)[order.index(i)] for i in range(4)] == values(plain)
    for i, prompt in enumerate(PROMPTS):
        assert values(engine.rollout([prompt], PARAMS, request_ids=[i]))[0] == values(plain)[i]


def test_engine_fork_equals_duplicates(model, plain):
    """n samples of one request are what n requests with one sample each would be, under the same keys."""
    one = dataclasses.replace(PARAMS, n=1)
    for copies in (1, 2):
        rollout = Engine(model).rollout(PROMPTS * copies, one, request_ids=list(range(4)) * copies)
        assert [group[0] for group in values(rollout)] == [group[0] for group in values(plain)] * copies


def test_engine_fewer_samples_are_the_first_ones(model, plain):
    two = Engine(model).rollout(PROMPTS, dataclasses.replace(PARAMS, n=2))
    assert values(two) == [group[:2] for group in values(plain)]


def test_engine_seeds(model):
    prompt = prompts_of(8)
    twice = Engine(model).rollout(prompt * 2, dataclasses.replace(PARAMS, n=2))
    assert len({tuple(s.ids) for s in twice.flat}) == 4  # equal prompts differ, and so do samples
    fresh = [Engine(model).rollout(prompt, dataclasses.replace(PARAMS, seed=None)) for _ in range(2)]
    assert values(fresh[0]) != values(fresh[1])


def test_engine_forwards_a_groups_prompt_once(model):
    engine = Engine(model)
    engine.rollout(prompts_of(100, 37), SamplingParams(n=8, max_tokens=5, seed=0, ignore_eos=True))
    assert engine.stats.prompt_tokens == 137
    assert engine.stats.recomputed_tokens == 0
    assert engine.stats.decoded_tokens == 80
    assert engine.stats.steps == 5
    engine.stats.reset()
    assert engine.stats.prompt_tokens == 0


# --- weights ------------------------------------------------------------------------------------------------------------


def test_engine_after_an_update_is_a_fresh_engine():
    built = ready(llama())
    engine = Engine(built)
    before = engine.rollout(PROMPTS, PARAMS)
    assert {v for s in before.flat for v in s.weight_versions} == {0}
    with engine.updating_weights(), torch.no_grad():
        for p in built.parameters():
            p.mul_(1.1)
    after = engine.rollout(PROMPTS, PARAMS)
    assert {v for s in after.flat for v in s.weight_versions} == {1}
    assert values(after) == values(Engine(built).rollout(PROMPTS, PARAMS))
    assert values(after) != values(before)


def test_engine_notices_buffers_and_hooks_that_have_changed():
    """They are no parameters, and change what a cached prompt would be."""
    built = ready(llama())
    engine = Engine(built)
    engine.rollout(PROMPTS, PARAMS)
    built.model.rotary_emb.inv_freq.mul_(0.3)
    assert values(engine.rollout(PROMPTS, PARAMS)) == values(Engine(built).rollout(PROMPTS, PARAMS))
    built.model.layers[0].register_forward_hook(lambda module, arguments, out: out * 1.5)
    assert values(engine.rollout(PROMPTS, PARAMS)) == values(Engine(built).rollout(PROMPTS, PARAMS))


def test_engine_outlives_a_callers_inference_mode(plain):
    engine = Engine(ready(llama()))
    with torch.inference_mode():
        first = engine.rollout(PROMPTS, PARAMS)
    assert values(first) == values(engine.rollout(PROMPTS, PARAMS)) == values(plain)


def test_engine_leaves_training_mode_as_it_was(model):
    built = ready(llama())
    built.train()
    built.model.layers[0].eval()
    flags = [m.training for m in built.modules()]
    Engine(built).generate(prompts_of(4), SamplingParams(max_tokens=2))
    assert [m.training for m in built.modules()] == flags
    ids = torch.tensor(prompts_of(4))
    built(input_ids=ids, labels=ids).loss.backward()  # nothing of the engine's stays in the way of autograd
    assert all(p.grad is not None for p in built.parameters())


def test_engine_release_cache_changes_nothing(model, plain):
    engine = Engine(model)
    engine.rollout(PROMPTS[:1], PARAMS)
    engine.release_cache()
    assert values(engine.rollout(PROMPTS, PARAMS)) == values(plain)


# --- ends ---------------------------------------------------------------------------------------------------------------


def test_engine_stop_tokens_and_lengths(model):
    free = Engine(model).generate(prompts_of(6), SamplingParams(max_tokens=20, seed=4, ignore_eos=True))[0].outputs[0]
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    out = Engine(model).generate(prompts_of(6), SamplingParams(max_tokens=20, seed=4, ignore_eos=True, stop_token_ids=[stop]))[0].outputs[0]
    assert out.token_ids == free.token_ids[: first + 1]
    assert out.logprobs == free.logprobs[: first + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)


def test_engine_end_of_sequence_comes_from_the_config(model):
    with torch.no_grad():
        built = ready(llama())
        built.lm_head.weight[2] = 0
        built.lm_head.weight[2] += 10 * torch.sign(hidden_states(built, pack(conversation(prompts_of(6)[0])))[-1])
    out = Engine(built).generate(prompts_of(6), SamplingParams(max_tokens=5, temperature=0.0))[0].outputs[0]
    assert (out.token_ids, out.finish_reason) == ([2], "stop")
    longer = Engine(built).generate(prompts_of(6), SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))[0].outputs[0]
    assert len(longer.token_ids) == 5
    kept = Engine(built).generate(prompts_of(6), SamplingParams(max_tokens=5, temperature=1.0, min_tokens=4, seed=0))[0].outputs[0]
    assert len(kept.token_ids) >= 4
    assert 2 not in kept.token_ids[:3]
    assert kept.kept_mass[0] < 0.01


def test_engine_stops_at_the_models_longest_sequence(model):
    out = Engine(model).generate(prompts_of(150), SamplingParams(max_tokens=50, seed=0, ignore_eos=True))[0].outputs[0]
    assert len(out.token_ids) == 10
    assert out.finish_reason == "length"
