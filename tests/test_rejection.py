"""Rejection sampling: what is kept, what is written, resume to the bit, what users break, and what it learns."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_recipes import arguments, rows_of, task  # noqa: F401

from fastalign.data import Prompt
from fastalign.recipes import arithmetic, demo, rejection, sft
from fastalign.recipes.arguments import BatchArguments, DataArguments, OptimArguments, RejectionArguments, RunArguments, SamplingArguments
from fastalign.recipes.rejection_task import RejectionTask, Selection
from fastalign.rollout import Sample


def sample(text: str, reward: float, ids=None) -> Sample:
    return Sample(ids or [ord(c) for c in text], [], [], text=text, rewards={"r": reward})


def chosen(selection: Selection, *samples: Sample) -> list[tuple[str, float]]:
    return [(s.text, reward) for s, reward in selection.best(samples, {"r": 2.0})]


def test_the_best_are_kept_in_order_without_repeated_texts_or_missing_rewards():
    samples = [sample("a", 0.5), sample("b", 1.0), sample("c", math.nan), sample("b", 1.0, [7]), sample("d", 1.0), sample("e", -1.0)]
    assert chosen(Selection(3), *samples) == [("b", 2.0), ("d", 2.0), ("a", 1.0)]
    assert chosen(Selection(1), *samples) == [("b", 2.0)]
    assert chosen(Selection(9), *samples) == [("b", 2.0), ("d", 2.0), ("a", 1.0), ("e", -2.0)]


def test_min_reward_bounds_the_weighted_reward_and_is_itself_kept():
    samples = [sample("a", 0.5), sample("b", 0.4)]
    assert chosen(Selection(2, 1.0), *samples) == [("a", 1.0)]
    assert chosen(Selection(2, 1.01), *samples) == []


def test_equal_rewards_keep_the_first_unless_a_bound_forbids_it():
    samples = [sample("a", 0.0), sample("b", 0.0)]
    assert chosen(Selection(1), *samples) == [("a", 0.0)]
    assert chosen(Selection(1, 0.5), *samples) == []
    assert chosen(Selection(1), sample("a", math.nan)) == []


def rejecting(task, output, **changes):  # noqa: F811
    own = {"num_generations": 4, "reward": [f"{task / 'reward.py'}:parity"]} | changes.pop("rejection", {})
    args = arguments(task, output, "grpo", **changes)
    return replace(args, command="rft", rejection=RejectionArguments(**own))


def kept_of(output: Path, number: int) -> list[dict]:
    return [json.loads(line) for line in (output / f"kept-round-{number}.jsonl").read_text().splitlines()]


def test_rft_rounds_share_the_steps_and_tell_what_they_kept(task, tmp_path):  # noqa: F811
    rejection.run(rejecting(task, tmp_path, optim={"max_steps": 5}, rejection={"num_rounds": 2, "num_kept": 2, "prompts_per_round": 12}))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert [row["round"] for row in rows] == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert [i for i, row in enumerate(rows) if "reward" in row] == [0, 3]
    for number, row in ((1, rows[0]), (2, rows[3])):
        kept = kept_of(tmp_path, number)
        assert row["kept/count"] == len(kept)
        assert row["kept/reward"] == pytest.approx(sum(k["reward"] for k in kept) / len(kept))
        assert row["kept/reward"] > row["reward"]
        assert len({k["prompt"] for k in kept}) == 12 * row["kept/frac_prompts"]
        assert all(k["reward"] == len(k["completion"]) % 2 for k in kept)
        assert len({(k["prompt"], k["completion"]) for k in kept}) == len(kept)
    assert not {k["prompt"] for k in kept_of(tmp_path, 1)} & {k["prompt"] for k in kept_of(tmp_path, 2)}
    assert "eval/reward" in rows_of(tmp_path)[-1]


def test_steps_follow_from_epochs_over_what_may_be_kept(task, tmp_path):  # noqa: F811
    flags = {"optim": {"max_steps": -1, "num_train_epochs": 2}, "rejection": {"num_rounds": 3, "num_kept": 2}}
    plan = rejection.run(rejecting(task, tmp_path / "none", **flags, run={"dry_run": True}))
    assert plan["steps a round"] == 2 * 40 * 2 / 8
    assert plan["optimizer steps"] == 3 * plan["steps a round"]
    assert plan["completions a round"] == 160
    assert not (tmp_path / "none").exists()


def test_what_was_kept_is_data_for_sft(task, tmp_path):  # noqa: F811
    out = rejection.run(rejecting(task, tmp_path / "best", optim={"max_steps": 0}, rejection={"min_reward": 1.0}))
    kept = kept_of(tmp_path / "best", 1)
    assert out["kept/count"] == len(kept) > 0
    assert {k["reward"] for k in kept} == {1.0}
    assert {"summary.json", "report.html", "metrics.jsonl", "config.yaml"} <= {p.name for p in (tmp_path / "best").iterdir()}
    assert not (tmp_path / "best" / "model.safetensors").exists()
    kept = [k for k in kept if k["completion"].strip()]  # an empty completion is none for sft
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(k) + "\n" for k in kept))
    data = {"dataset_name": str(tmp_path / "kept.jsonl"), "eval_dataset_name": ""}
    sft.run(arguments(task, tmp_path / "sft", "sft", data=data, optim={"max_steps": 1}))


def test_what_is_kept_of_conversations_is_a_conversation(tmp_path):
    messages = [{"role": "user", "content": "é"}]
    prompts = [Prompt([1], messages, {}, 0), Prompt([2], messages, {}, 1)]
    best = [[(sample("yes", 1.0), 1.0)], []]
    RejectionTask.write(SimpleNamespace(kept_folder=tmp_path / "new", round=3), prompts, best)
    assert kept_of(tmp_path / "new", 3) == [
        {"prompt": messages, "completion": [{"role": "assistant", "content": "yes"}], "reward": 1.0},
    ]


def test_rft_resumes_to_the_bit_within_a_round_and_between_two(task, tmp_path):  # noqa: F811
    flags = {"optim": {"max_steps": 6, "lr_scheduler_type": "cosine"}, "rejection": {"num_rounds": 2, "prompts_per_round": 20}}
    rejection.run(rejecting(task, tmp_path / "whole", **flags))
    saving = rejecting(task, tmp_path / "part", **flags, run={"save_steps": 1, "save_total_limit": 0})
    rejection.run(saving)
    for step in (3, 2):  # the later one first: resuming cuts the rows after it
        for name in ("model.safetensors", "summary.json", "kept-round-2.jsonl"):
            (tmp_path / "part" / name).unlink()
        checkpoint = str(tmp_path / "part" / f"checkpoint-{step}")
        rejection.run(replace(saving, run=replace(saving.run, resume_from_checkpoint=checkpoint)))
        assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
        for name in ("model.safetensors", "kept-round-1.jsonl", "kept-round-2.jsonl"):
            assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("loss", ["dft", "rrhf"])
def test_rft_trains_with_every_supervised_loss(task, tmp_path, loss):  # noqa: F811
    rejection.run(rejecting(task, tmp_path, optim={"max_steps": 2}, rejection={"loss": loss, "num_kept": 4}))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert len(rows) == 2
    assert all(row["grad_norm"] > 0 for row in rows)


def test_overwriting_removes_the_rounds_of_the_run_before(task, tmp_path):  # noqa: F811
    (tmp_path / "kept-round-7.jsonl").write_text("{}\n")
    rejection.run(rejecting(task, tmp_path, optim={"max_steps": 1}, data={"eval_dataset_name": ""}))
    assert not (tmp_path / "kept-round-7.jsonl").exists()
    assert kept_of(tmp_path, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rejection": {"reward": []}}, "--reward is required"),
        ({"rejection": {"reward": ["lenght"]}}, "length"),
        ({"rejection": {"num_kept": 5}}, "between 1 and --num_generations 4, got 5"),
        ({"rejection": {"loss": "rrhf"}}, "--num_kept must be 2 or more, got 1"),
        ({"rejection": {"loss": "nlll"}}, "--loss: unknown nlll"),
        ({"rejection": {"min_reward": 3.0}}, "round 1: no prompt has a completion with a reward of at least 3 .* lower --min_reward"),
        ({"rejection": {"num_rounds": 9}}, "--max_steps 4 leaves no step for some of --num_rounds 9"),
        ({"rejection": {"num_rounds": 2}, "optim": {"max_steps": 0}}, "there is one round"),
        ({"rejection": {"prompts_per_round": 41}}, "the 40 prompts of the data, got 41"),
        ({"sampling": {"temperature": 0.0}}, "--temperature must be > 0"),
        ({"rejection": {"reward": [f"{Path(arithmetic.__file__)}:correct"]}, "data": {"dataset_map": "answer=gold"}}, "column 'answer'"),
    ],
)
def test_bad_arguments_are_named(task, tmp_path, changes, words):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        rejection.run(rejecting(task, tmp_path, **changes))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rft_lifts_heldout_accuracy_by_fifteen_points(tmp_path):
    """The demo's arithmetic from its cold start: three rounds of eight samples a prompt, a correct one of each trained on."""
    files = demo.prepare(tmp_path, 0)
    start = demo.cold_start(tmp_path, files, 0, quick=False)
    sft.run(start)
    args = replace(
        start,
        command="rft",
        model=replace(start.model, model_name_or_path=str(tmp_path / "sft")),
        data=DataArguments(dataset_name=files["train"], eval_dataset_name=files["heldout"], max_length=64, max_samples=1500),
        optim=OptimArguments(learning_rate=5e-4, max_steps=90, lr_scheduler_type="linear"),
        batch=BatchArguments(per_device_train_batch_size=128),
        run=RunArguments(output_dir=str(tmp_path / "rft"), logging_steps=10, eval_steps=30),
        sampling=SamplingArguments(max_completion_length=8),
        rejection=RejectionArguments(num_generations=8, min_reward=1.0, num_rounds=3, reward=[f"{Path(arithmetic.__file__)}:correct"]),
    )
    summary = rejection.run(args)
    before, after = summary[f"{demo.ACCURACY}/before"], summary[demo.ACCURACY]
    print(f"held-out accuracy {before:.1%} before, {after:.1%} after")
    assert before < 0.6
    assert after - before >= 0.15
