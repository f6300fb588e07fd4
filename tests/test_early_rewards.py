"""Rewards are scored while other completions are still written: the same numbers, in a provable order, and the promises kept."""

import json
import logging
import math
import random
import threading
from dataclasses import replace

import pytest
from fake_chat_server import chat_server
from online_runs import built, online_arguments, write_task
from preference_runs import rows_of, without_report
from tiny_models import PROMPTS, llama, ready

from fastalign.environments import load_environment
from fastalign.generation import Engine, SamplingParams
from fastalign.recipes import arithmetic, online, rejection
from fastalign.rewards import EarlyScoring, RewardSet, load_rewards
from fastalign.rewards.isolation import MAX_HUNG

REWARDS = '''
def whole(completions, **columns):
    """May look at its batch: the rank of each completion's length in it."""
    order = sorted(range(len(completions)), key=lambda i: (len(completions[i]), i))
    return [order.index(i) / len(order) for i in range(len(order))]

def alone(completions, answer, **columns):
    return [None if len(c) % 5 == 3 else len(c) / 10 + (a in c) for c, a in zip(completions, answer)]

alone.per_sample = True
'''


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("early"), REWARDS)


def batch(groups: int, size: int) -> tuple[list[str], list[str], list[list[int]], dict[str, list[str]]]:
    """Completions with every kind of fault that the built-in rewards know."""
    draw = random.Random(3)
    texts = ["#### 7", "<think>a</think> \\boxed{7}", '{"a": 1}', "(B)", "", "seven", "the answer is 7.0", "x x x x"]
    completions = [draw.choice(texts) for _ in range(groups * size)]
    prompts = [f"prompt {p}" for p in range(groups) for _ in range(size)]
    answers = [draw.choice(["7", "8", "B"]) for _ in range(groups) for _ in range(size)]
    return prompts, completions, [[ord(c) for c in text] for text in completions], {"answer": answers}


def begun(rewards, prompts, completions, ids, columns, order, size):
    """The rewards of a batch whose groups end in that order; those that are not named end with the batch."""
    with rewards.begin() as early:
        for p in order:
            at = slice(p * size, (p + 1) * size)
            early.add(range(at.start, at.stop), prompts[at], completions[at], ids[at], {k: v[at] for k, v in columns.items()})
        return rewards.score(prompts, completions, ids, columns, early=early)


@pytest.mark.parametrize("order", [[4, 0, 3, 1, 2], [2, 4], []], ids=["shuffled", "some", "none"])
def test_groups_scored_as_they_end_score_as_one_batch(task, order):
    specifications = ["math", "gsm8k", "format", "regex:pattern=.*7.*", "length", "choice", "json", "repetition"]
    given = batch(5, 3)
    with load_rewards([*specifications, f"{task / 'reward.py'}:alone", f"{task / 'reward.py'}:whole"]) as rewards:
        whole, parts = rewards.score(*given), begun(rewards, *given, order, 3)
    assert list(parts) == list(whole)
    assert json.dumps(parts) == json.dumps(whole), "NaN where it was, and every other number to the bit"
    assert any(map(math.isnan, whole["alone"]))
    assert len(set(whole["whole"])) == 15


def test_a_function_is_called_once_with_the_whole_batch_unless_it_says_that_it_judges_samples_alone():
    calls = {"batch": [], "alone": []}

    def of_batch(completions, **columns):
        calls["batch"].append(list(completions))
        return [0.0] * len(completions)

    def alone(completions, **columns):
        calls["alone"].append(list(completions))
        return [0.0] * len(completions)

    alone.per_sample = True
    prompts, completions, ids, columns = batch(4, 2)
    with load_rewards([of_batch, alone]) as rewards:
        begun(rewards, prompts, completions, ids, columns, [1, 0], 2)
    assert calls["batch"] == [completions]
    assert sorted(text for call in calls["alone"] for text in call) == sorted(completions)


def test_generation_goes_on_while_the_first_group_is_judged():
    """The reward of the first group that ends waits for the end of the last: it must have begun before, and be waited for."""
    started, written, events = threading.Event(), threading.Event(), []

    def slow(prompts, completions, **columns):
        events.append(f"begins {len(completions)}")
        started.set()
        assert written.wait(60)
        events.append("judged")
        return [float(len(ids)) for ids in columns["completion_ids"]]

    slow.per_sample = True
    engine, prompts = Engine(ready(llama())), PROMPTS[:3]
    params = [SamplingParams(n=2, max_tokens=limit, ignore_eos=True, seed=0) for limit in (9, 3, 6)]
    with load_rewards([slow], timeout=120) as rewards, rewards.begin() as early:

        def take(place, samples):
            events.append(f"group {place}")
            count = len(samples)
            early.add(range(place * 2, place * 2 + count), [f"{place}"] * count, [s.text for s in samples], [s.ids for s in samples])
            assert started.wait(60)

        rollout = engine.rollout(prompts, params, on_group=take)
        events.append("written")
        written.set()
        ids = [s.ids for s in rollout.flat]
        scores = rewards.score([f"{p}" for p in range(3) for _ in range(2)], [""] * 6, ids, early=early)
    assert events == ["group 1", "begins 2", "group 2", "group 0", "written", "judged", "begins 4", "judged"]
    assert scores == {"slow": [9.0, 9.0, 3.0, 3.0, 6.0, 6.0]}


def test_the_engine_tells_each_group_once_with_the_samples_that_it_returns():
    engine, told = Engine(ready(llama()), max_num_seqs=3, kv_cache_tokens=160), []
    params = SamplingParams(n=3, max_tokens=12, seed=5)
    rollout = engine.rollout(PROMPTS, params, on_group=lambda place, samples: told.append((place, samples)))
    assert sorted(place for place, _ in told) == list(range(len(PROMPTS)))
    assert all(rollout.samples[place] is samples for place, samples in told)
    assert rollout == engine.rollout(PROMPTS, params)


@pytest.mark.parametrize("command", ["grpo", "rft"])
def test_a_run_with_early_rewards_has_the_metrics_of_one_without(task, tmp_path, monkeypatch, command):
    without_report(monkeypatch)
    recipe = online if command == "grpo" else rejection
    rewards = ["gsm8k", f"{task / 'reward.py'}:alone", f"{task / 'reward.py'}:whole"]
    given = {"online": {"reward": rewards, "reward_combination": "normalize"}}
    if command == "rft":
        given = {"rejection": {"reward": rewards, "num_generations": 4}}
    recipe.run(online_arguments(task, tmp_path / "early", given, command=command))
    monkeypatch.setattr(RewardSet, "begin", lambda self: EarlyScoring(self, [], 1.0))
    recipe.run(online_arguments(task, tmp_path / "late", given, command=command))
    assert rows_of(tmp_path / "early") == rows_of(tmp_path / "late")
    rows = [json.loads(line) for line in (tmp_path / "early" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["timing_s/reward_overlapped"] > 0 for row in rows if "timing_s/reward" in row)


def test_conversations_with_an_environment_are_judged_as_they_end(task, tmp_path):
    args = online_arguments(task, tmp_path, {"online": {"reward": ["gsm8k"]}, "environment": {"environment": "calculator"}})
    job = built(args)
    told = []
    try:
        prompts = job.prompts[:3]
        rollout = job.sampler(job.engine, prompts, job.params, [0, 1, 2], on_group=lambda place, samples: told.append((place, samples)))
    finally:
        job.close()
    assert load_environment("calculator").name == job.sampler.kind.name
    assert sorted(place for place, _ in told) == [0, 1, 2]
    for place, samples in told:
        assert [id(s) for s in samples] == [id(s) for s in rollout.samples[place]]
        assert all(s.text and s.turns for s in samples)


def test_samples_that_hang_or_raise_are_named_and_cost_themselves(caplog):
    release = threading.Event()

    def moody(completions, **columns):
        if "hang" in completions:
            release.wait(30)
        if "raise" in completions:
            raise RuntimeError("no mood")
        return [1.0] * len(completions)

    moody.per_sample = True
    completions = ["a", "raise", "b", "c", "hang", "d"]
    prompts = [f"prompt {i}" for i in range(6)]
    with caplog.at_level(logging.WARNING), load_rewards([moody], timeout=0.2) as rewards:
        (values,) = begun(rewards, prompts, completions, [[1]] * 6, {}, [2, 0, 1], 2).values()
        release.set()
    assert [math.isnan(v) for v in values] == [text in ("hang", "raise") for text in completions]
    lost = [record.getMessage() for record in caplog.records]
    assert any("sample 1 has no reward: RuntimeError: no mood" in m and m.endswith("prompt: 'prompt 1'") for m in lost)
    assert any("sample 4 has no reward: no answer within 0.2 s" in m and m.endswith("prompt: 'prompt 4'") for m in lost)


@pytest.mark.parametrize("size", [1, 2])
def test_a_function_that_always_hangs_is_given_up_once_for_all_groups(caplog, size):
    release, calls = threading.Event(), []

    def hangs(completions, **columns):
        calls.append(len(completions))
        release.wait(60)
        return [1.0] * len(completions)

    hangs.per_sample = True
    prompts, completions, ids, _ = batch(20, size)
    with load_rewards([hangs], timeout=0.05) as rewards:
        (values,) = begun(rewards, prompts, completions, ids, {}, range(20), size).values()
        release.set()
    assert all(map(math.isnan, values))
    assert calls.count(1) <= MAX_HUNG
    assert len(calls) <= 2 * MAX_HUNG
    assert "not called: 8 samples of its batch ran past 0.05 s before it" in caplog.text
    assert "none of the" in caplog.text


def test_what_breaks_the_generation_off_leaves_no_reward_waiting(task, tmp_path):
    job = built(online_arguments(task, tmp_path, {"online": {"reward": ["gsm8k"]}}))
    before = {thread.name for thread in threading.enumerate() if thread.name.startswith("fastalign-reward")}

    def broken(engine, prompts, params, request_ids, progress, on_group):
        on_group(0, engine.rollout([prompts[0].ids], params).samples[0])
        raise FloatingPointError("the weights are gone")

    broken.weights = {}
    job.sampler = broken
    try:
        with pytest.raises(FloatingPointError, match="gone"):
            job.step(0)
    finally:
        job.close()
    for thread in threading.enumerate():
        if thread.name.startswith("fastalign-reward") and thread.name not in before:
            thread.join(10)
            assert not thread.is_alive()


def test_only_a_judge_behind_a_server_begins_early(task, tmp_path):
    with chat_server(lambda body: "7") as server:
        args = online_arguments(task, tmp_path, {"online": {"reward": [f"judge:model={server.url}", f"judge:model={task / 'model'}"]}})
        job = built(args)
        try:
            assert [reward.per_sample for reward in job.rewards._rewards] == [True, False]
        finally:
            job.close()


def test_missing_columns_are_named_before_anything_is_generated(task, tmp_path):
    arithmetic.write_jsonl(tmp_path / "bare.jsonl", arithmetic.problems(0)[0][:8], ("prompt",))
    args = online_arguments(task, tmp_path, {"online": {"reward": [f"{task / 'reward.py'}:alone"]}})
    with pytest.raises(ValueError, match="expected a column 'answer'"):
        online.run(replace(args, data=replace(args.data, dataset_name=str(tmp_path / "bare.jsonl"))))
