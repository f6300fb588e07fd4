"""Rollouts one step ahead of the update: the schedule by hand, weights that cannot tear, resumed runs, and what is refused."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from online_runs import assert_resumes_to_the_bit, built, online_arguments, write_task
from preference_runs import rows_of, without_report
from tiny_models import llama

from fastalign.generation import Engine
from fastalign.models.adapters import attach_lora
from fastalign.models.copies import ModelCopy
from fastalign.recipes import ahead, online, ppo, scored_rollouts
from fastalign.recipes.rollout_engines import check_staleness
from fastalign.recipes.saved_rollouts import packed_rollout, unpacked_rollout
from fastalign.recipes.setup import load
from fastalign.rollout import Rollout, Sample
from fastalign.training.step import score

REWARDS = """
def parity(completions, **columns):
    return [float(len(c) % 2) for c in completions]

def steps(completions, **columns):
    return [len(c) % 3 - 0.5 for c in completions]
"""
STALE = {"max_staleness": 1, "beta": 0.0}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("ahead"), REWARDS)


def arguments(task, output, *, command="grpo", **changes):
    given = STALE | {"reward": [f"{task / 'reward.py'}:parity"]} | changes.pop("online", {})
    return online_arguments(task, output, {"optim": {"learning_rate": 1e-2}, "online": given} | changes, command=command)


def steady(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("timing_s/")}


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def by_hand(args, steps):
    """The same training without threads: a second model, given what the weights were before the last update, samples each batch."""
    given = {"max_staleness": 0, "importance_correction": "none" if args.online.off_policy_objective == "plain" else "truncate"}
    job = built(replace(args, online=replace(args.online, **given, off_policy_objective="decoupled")))
    job.plain_ratio = args.online.off_policy_objective == "plain"
    model, past, found = load(args.model).model, [weights(job.updater.model)], []
    engine = Engine(model, job.engine.tokenizer)
    for step in range(steps):
        with engine.updating_weights(), torch.no_grad():
            for own, old in zip(model.parameters(), past[max(0, step - 1)], strict=True):
                own.copy_(old)
        job.timing.clear()
        chosen = job.order.next_batch(job.num_prompts)
        prompts, keys = [job.prompts[i] for i in chosen], [step * job.num_prompts + i for i in range(job.num_prompts)]
        rollout = job.sampler(engine, prompts, job.params, keys)
        scored_rollouts.score(job.rewards, prompts, rollout)
        job.epoch = job.order.progress
        chunks, told = job.judge(rollout)
        updates = [job.update(chunks, first=i == 0) for i in range(job.num_iterations)]
        found.append(steady(job.metrics(rollout, chunks, updates) | told))
        past.append(weights(job.updater.model))
    job.close()
    return found, past[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"online": {"num_iterations": 2, "off_policy_objective": "plain"}},
        {"model": {"use_peft": True, "lora_r": 4}, "online": {"algorithm": "dr_grpo"}},
        {"model": {"dtype": "bfloat16"}},
    ],
    ids=["decoupled", "plain", "lora", "bf16"],
)
def test_each_batch_is_sampled_from_the_weights_before_the_last_update(task, tmp_path, changes):
    args = arguments(task, tmp_path, **changes)
    job = built(args)
    try:
        rows = [steady(job.step(index)) for index in range(4)]
    finally:
        job.close()
    expected, trained = by_hand(args, 4)
    passes = args.online.num_iterations
    assert [row.pop("sampling/staleness") for row in rows] == [0.0, passes, passes, passes]
    assert json.dumps(rows, sort_keys=True) == json.dumps(expected, sort_keys=True)
    assert all(torch.equal(a, b) for a, b in zip(job.updater.model.parameters(), trained, strict=True))
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows[1:]) > 1e-3, "the policy has moved"


@pytest.mark.parametrize("objective", ["decoupled", "plain"])
def test_the_loss_is_the_objective_of_the_page(task, tmp_path, objective):
    """Σ w min(π_prox / μ, 2) · -A, and Σ w max(-A u, -A clip(u)) with u = π / μ: in float64, from the weights before the update."""
    job = built(arguments(task, tmp_path, online={"off_policy_objective": objective}, optim={"learning_rate": 3e-2}))
    update, found = job.update, []

    def checked(chunks, *, first):
        total, ratios = 0.0, []
        for chunk in chunks:
            logp = score(job.updater.model, chunk.packed, temperature=job.params.temperature).double()
            ratio = (logp - chunk.sampler_logp.double()).exp()
            a, w = chunk.advantages.double(), chunk.weights.double()
            loss = -a * ratio.clamp(max=2) if objective == "decoupled" else torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
            total += float((w * loss).sum())
            ratios += ratio.tolist()
        result = update(chunks, first=first)
        found.append((result.loss, total, max(ratios, default=1.0)))
        return result

    job.update = checked
    try:
        for index in range(3):
            job.step(index)
    finally:
        job.close()
    assert max(largest for *_, largest in found) > 1.2, "some ratio is cut"
    for loss, expected, _ in found:
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_copy_stands_still_while_the_policy_is_updated(task, tmp_path):
    """The thread may sample only once the update is over: it sees the weights from before, to the bit."""
    job = built(arguments(task, tmp_path))
    sampler, commit, seen = job.sampler, job.commit, []
    in_thread, updated = threading.Event(), threading.Event()

    def gated(engine, prompts, params, keys, *progress, **told):
        if keys[0] > 0:  # the second batch, which is ahead
            before = weights(engine.model)
            in_thread.set()
            assert updated.wait(60)
            seen.append((before, weights(engine.model), weights(job.updater.model)))
        return sampler(engine, prompts, params, keys, *progress, **told)

    def announced(apply):
        assert in_thread.wait(60), "the next batch is in flight before the update"
        commit(apply)
        updated.set()

    gated.weights = {}
    job.sampler, job.commit = gated, announced
    start = weights(job.updater.model)
    try:
        job.step(0)
        job.settle()
    finally:
        job.close()
    ((before, after, live),) = seen
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(before, after, start, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, live, strict=True))


def test_a_refresh_copies_in_place_and_an_adapter_shares_its_base():
    policy = attach_lora(llama(), r=2)
    copied = ModelCopy(policy)
    frozen = [own is theirs for own, theirs in zip(copied.model.parameters(), policy.parameters(), strict=True) if not theirs.requires_grad]
    assert all(frozen)
    trained = [(own, theirs) for own, theirs in zip(copied.model.parameters(), policy.parameters(), strict=True) if theirs.requires_grad]
    assert copied.num_bytes == sum(theirs.numel() * 4 for _, theirs in trained)
    places = [own.data_ptr() for own, _ in trained]
    with torch.no_grad():
        for _, theirs in trained:
            theirs.add_(1.0)
    assert not any(torch.equal(own, theirs) for own, theirs in trained)
    copied.refresh()
    assert all(torch.equal(own, theirs) for own, theirs in trained)
    assert [own.data_ptr() for own, _ in trained] == places
    assert not any(p.requires_grad for p in copied.model.parameters())
    assert all(theirs.requires_grad for _, theirs in trained)


def test_tied_weights_stay_tied_and_bf16_stays_bf16():
    policy = llama(tie_word_embeddings=True).to(torch.bfloat16)
    copied = ModelCopy(policy)
    assert copied.model.lm_head.weight is copied.model.model.embed_tokens.weight
    assert copied.num_bytes == 2 * sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("grpo", {"online": {"algorithm": "dapo"}}),
        ("grpo", {"online": {"algorithm": "online_dpo", "beta": 0.1}}),
        ("grpo", {"online": {"algorithm": "remax"}, "environment": {"environment": "calculator"}}),
        ("grpo", {"online": {"rollout_quantization": "int8"}}),
        ("ppo", {"online": {"beta": 0.05}, "ppo": {"critic_warmup": 1}}),
    ],
    ids=["dapo", "online_dpo", "remax_turns", "int8", "ppo"],
)
def test_resume_continues_to_the_bit(task, tmp_path, monkeypatch, command, changes):
    without_report(monkeypatch)
    args = arguments(task, tmp_path, command=command, run={"save_steps": 2}, **changes)
    recipe, models = (ppo, (".", "critic")) if command == "ppo" else (online, (".",))
    assert_resumes_to_the_bit(recipe.run, args, tmp_path, models)
    staleness = [row["sampling/staleness"] for row in rows_of(tmp_path / "whole")]
    assert staleness == ([0.0, 0.0, 1.0, 1.0] if command == "ppo" else [0.0, 1.0, 1.0, 1.0])
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / "training_state.json").read_text())["data"]
    assert state["ahead"]["batch"]["rollout"]["samples"]
    assert state["num_requests"] >= 3 * 2, "the batch in flight is counted"


def test_kill_9_and_resume_equals_an_undisturbed_run(task, tmp_path, monkeypatch):
    without_report(monkeypatch)
    flags = {"optim": {"max_steps": 6, "learning_rate": 1e-2}, "run": {"save_steps": 1, "save_total_limit": 2}}
    online.run(arguments(task, tmp_path / "whole", **flags))
    killed = arguments(task, tmp_path / "killed", **flags)
    command = [sys.executable, "-m", "fastalign", "grpo"]
    for name, value in killed.flat().items():
        if value not in ("", [], None) and not isinstance(value, bool):
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    process = subprocess.Popen([*command, "--shuffle", "true"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert any((tmp_path / "killed" / f"checkpoint-{n}").exists() for n in (2, 3)), errors
    online.run(replace(killed, run=replace(killed.run, resume_from_checkpoint="latest")))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_a_checkpoint_of_a_run_that_is_ahead_is_not_resumed_without(task, tmp_path, monkeypatch):
    without_report(monkeypatch)
    args = arguments(task, tmp_path, run={"save_steps": 2})
    online.run(args)
    again = replace(args, run=replace(args.run, resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    with pytest.raises(ValueError, match="resume with --max_staleness 1"):
        online.run(replace(again, online=replace(args.online, max_staleness=0)))


def test_the_schedule_does_not_depend_on_who_is_slower(task, tmp_path):
    """The thread waits for the update, or the update for the thread: the numbers are the same."""
    found = []
    for slow in ("sampling", "updating"):
        job = built(arguments(task, tmp_path))
        sampler, update = job.sampler, job.update
        sampled, updated = threading.Event(), threading.Event()

        def sampling(engine, prompts, params, keys, *progress, first=slow, own=sampler, ended=sampled, awaited=updated, **told):
            if keys[0] and first == "sampling":
                assert awaited.wait(60)
            rollout = own(engine, prompts, params, keys, *progress, **told)
            if keys[0]:
                ended.set()
            return rollout

        def updating(chunks, *, first, slower=slow, own=update, ended=updated, awaited=sampled):
            if slower == "updating":
                assert awaited.wait(60)
            result = own(chunks, first=first)
            ended.set()
            return result

        sampling.weights = {}
        job.sampler, job.update = sampling, updating
        try:
            rows = []
            for index in range(3):
                rows.append(steady(job.step(index)))
                job.settle()
                sampled.clear()
                updated.clear()
            found.append(rows)
        finally:
            sampled.set()
            updated.set()
            job.close()
    assert json.dumps(found[0]) == json.dumps(found[1])


def test_evaluation_waits_for_what_is_in_flight(task, tmp_path):
    job = built(arguments(task, tmp_path, data={"eval_dataset_name": str(task / "train.jsonl"), "eval_max_samples": 2}))
    sampler, events, go = job.sampler, [], threading.Event()

    def told(engine, prompts, params, keys=None, *progress, **given):
        if keys is not None and keys[0]:
            assert go.wait(60)
            time.sleep(0.1)
        rollout = sampler(engine, prompts, params, keys, *progress, **given)
        events.append("evaluated" if engine is job.exact_engine else "sampled")
        return rollout

    told.weights = {}
    job.sampler = told
    try:
        job.step(0)
        go.set()
        assert job.evaluate()
    finally:
        go.set()
        job.close()
    assert events == ["sampled", "sampled", "evaluated"]


def test_what_the_thread_raises_ends_the_next_step_and_closing_breaks_off(task, tmp_path):
    job = built(arguments(task, tmp_path))
    sampler, entered, leave = job.sampler, threading.Event(), threading.Event()

    def failing(engine, prompts, params, keys, *progress, **told):
        if keys[0]:
            raise RuntimeError("no more prompts")
        return sampler(engine, prompts, params, keys, *progress, **told)

    failing.weights = {}
    job.sampler = failing
    job.step(0)
    with pytest.raises(RuntimeError, match="no more prompts"):
        job.step(1)
    job.close()

    job = built(arguments(task, tmp_path))

    def waiting(engine, prompts, params, keys, *progress, **told):
        if keys[0]:
            entered.set()
            assert leave.wait(60)
        return sampler(engine, prompts, params, keys, *progress, **told)

    waiting.weights = {}
    job.sampler = waiting
    job.step(0)
    assert entered.wait(60)
    flight = job.ahead._flight
    job.ahead._closed = True
    leave.set()
    job.close()
    assert isinstance(flight.exception(), ahead.ClosedError)
    assert job.engine.num_used_blocks == 0


def test_the_last_step_begins_nothing(task, tmp_path):
    job = built(arguments(task, tmp_path))
    for index in range(4):
        job.step(index)
    assert job.ahead._flight is None
    assert job.num_requests == 4 * job.num_prompts
    job.close()


def test_a_rollout_is_saved_exactly():
    numbers = [0.1, -1e-45, -math.inf, 3.0, math.nan]
    whole = Sample(
        [1, 2**40],
        numbers,
        numbers,
        [0.5, 1.0],
        [3, 3],
        "length",
        [True, False],
        'é"\n',
        {"r": math.nan, "s": 0.1},
        2,
        None,
        0.5,
        [1],
        [0.25],
    )
    rollout = Rollout([[5, 6], []], [[whole], [Sample([], [], [])]], [{}, {}], [whole], [[whole, whole]])
    again = unpacked_rollout(json.loads(json.dumps(packed_rollout(rollout))))
    assert repr(again) == repr(rollout)
    assert again.samples[0][0].scored == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online": {"max_staleness": 2}}, "--max_staleness 2: one rollout is sampled ahead, .* give 1"),
        ({"online": {"algorithm": "xpo"}}, "xpo also samples its opponent, .* give --max_staleness 0"),
        ({"online": {"algorithm": "nash_md"}}, "nash_md also samples its opponent"),
        ({"online": {"share_backbone": True}}, "would switch adapters under the running update; leave one of them out"),
        ({"online": {"reward": ["judge:model=self"]}}, "name the model's folder instead of self"),
        ({"online": {"max_staleness": 0, "rollout_device": "cuda:1"}}, "add --max_staleness 1"),
        ({"online": {"max_staleness": 0, "off_policy_objective": "plain"}}, "it goes with --max_staleness 1"),
        ({"online": {"algorithm": "reinforce", "off_policy_objective": "plain"}}, "the loss 'reinforce' takes no ratio"),
        ({"online": {"algorithm": "online_dpo", "off_policy_objective": "plain"}}, "the preference loss takes no ratio"),
        ({"online": {"off_policy_objective": "plain", "importance_correction": "mask"}}, "leave one of them out"),
    ],
)
def test_flags_that_do_not_fit_are_named(task, tmp_path, changes, message):
    args = arguments(task, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        online.algorithm_of(args)


@pytest.mark.parametrize(
    ("name", "message"), [("tpu:0", "expected cpu or a CUDA device"), ("meta", "expected cpu or a CUDA"), ("cuda:64", "torch sees")]
)
def test_a_device_that_is_not_there_is_named(task, tmp_path, name, message):
    args = arguments(task, tmp_path, online={"rollout_device": name})
    check_staleness(args, online.algorithm_of(args))
    with pytest.raises(ValueError, match=message):
        built(args)


def test_stale_rollouts_are_corrected_unless_the_ratio_is_the_samplers(task, tmp_path):
    def correction(**changes):
        return online.algorithm_of(arguments(task, tmp_path, online=changes)).correction_options.get("correction", "none")

    assert correction() == "truncate"
    assert correction(off_policy_objective="plain") == "none"
    assert correction(importance_correction="sequence_mask") == "sequence_mask"
    assert correction(max_staleness=0) == "none"
