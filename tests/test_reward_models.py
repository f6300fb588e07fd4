"""Reward models: packed scores are transformers' own, training does not depend on the cut, files load anywhere."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fastalign.cli import main
from fastalign.data import Record, ranking_examples
from fastalign.data.places import read_place
from fastalign.judges import RewardModel
from fastalign.losses.reward import REWARD
from fastalign.models.adapters import save_adapter
from fastalign.models.attention import UnsupportedModelError
from fastalign.models.load import load_causal_lm, load_tokenizer
from fastalign.models.reward import load_reward_model, score_head, score_trees, settle_padding
from fastalign.ops.gemm import AVAILABLE
from fastalign.ops.gemm_native import native_products
from fastalign.recipes import arithmetic, reward
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OptimArguments,
    RewardArguments,
    RunArguments,
)
from fastalign.recipes.reward_task import RewardObjective
from fastalign.recipes.setup import build_updater
from fastalign.training.step import LogitOptions

VOLATILE = ("timing_s/", "tokens_per_second", "step_time", "peak_memory_mb")


def records(kind: str, n: int, seed: int = 0) -> list[dict]:
    """Single digits: an answer is better the larger it is, right when it is over 4."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        prompt, digits = f"{rng.randrange(100)}+{rng.randrange(10)}=", rng.sample(range(10), 4)
        ordered = [str(d) for d in sorted(digits, reverse=True)]
        if kind == "pairs":
            found.append(
                {"prompt": prompt, "chosen": ordered[0], "rejected": ordered[-1], "subset": "even" if digits[0] % 2 == 0 else "odd"}
            )
        elif kind == "rankings":
            found.append({"prompt": prompt, "completions": ordered[: rng.randint(2, 4)]})
        elif kind == "grades":
            grades = {"size": digits[0] / 3, "oddness": digits[0] % 2 if rng.random() < 0.7 else None}
            found.append({"prompt": prompt, "completion": str(digits[0]), **grades})
        elif kind == "outcomes":
            found.append({"prompt": prompt, "completion": str(digits[0]), "label": digits[0] > 4})
        else:
            steps = digits[: rng.randint(1, 3)]
            found.append({"prompt": prompt, "completions": [str(d) for d in steps], "labels": [d > 4 for d in steps]})
    return found


DATA = {"bradley_terry": "pairs", "plackett_luce": "rankings", "outcome": "outcomes", "process": "steps", "attributes": "grades"}
GRADES = {"attributes": ["size=0.5", "oddness=-2"]}  # of the flags that --loss attributes needs


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny causal language model, its tokenizer, and data of every kind."""
    root = tmp_path_factory.mktemp("reward")
    tokenizer = arithmetic.build_tokenizer()
    torch.manual_seed(0)
    model = arithmetic.build_model(0, len(tokenizer))
    small = type(model)(type(model.config)(**(model.config.to_dict() | {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16})))
    small.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    for kind in set(DATA.values()):
        write(root / f"{kind}.jsonl", records(kind, 24))
        write(root / f"{kind}_held.jsonl", records(kind, 12, seed=1))
    return root


def arguments(folder: Path, output: Path, loss: str = "bradley_terry", **changes) -> Arguments:
    kind = DATA[loss]
    args = Arguments(
        command="reward",
        model=ModelArguments(model_name_or_path=str(folder / "model"), dtype="float32", device="cpu"),
        data=DataArguments(dataset_name=str(folder / f"{kind}.jsonl"), eval_dataset_name=str(folder / f"{kind}_held.jsonl"), max_length=48),
        optim=OptimArguments(learning_rate=2e-3, max_steps=4, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=8),
        run=RunArguments(output_dir=str(output)),
        reward=RewardArguments(loss=loss, step_separator="=", **(GRADES if loss == "attributes" else {})),
    )
    return replace(args, **{name: replace(getattr(args, name), **values) for name, values in changes.items()})


def rows_of(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def examples_of(model, tokenizer, kind: str = "rankings", n: int = 9):
    rows = [Record(row, "data", i + 1) for i, row in enumerate(records(kind, n))]
    return ranking_examples(rows, tokenizer, max_length=64, pad_token_id=model.config.pad_token_id)


def sequences_of(example) -> list[list[int]]:
    return [[*example.tree.ids, *child.ids] for child in example.tree.children]


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_scores_are_those_of_plain_transformers(folder, tmp_path, side):
    tokenizer = load_tokenizer(str(folder / "model"))
    torch.manual_seed(3)
    model = load_reward_model(str(folder / "model"), tokenizer, start=True)
    examples = examples_of(model, tokenizer)
    got = torch.cat(score_trees(model, [e.tree for e in examples], [e.places for e in examples], max_tokens=40))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "fastalign" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = [path for example in examples for path in sequences_of(example)]
    padded = load_tokenizer(str(tmp_path)).pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        together = plain(**padded).logits[:, 0]
        alone = torch.cat([plain(torch.tensor([path])).logits[:, 0] for path in ids])
    assert together.std() > 0.01
    assert (got - together).abs().max() < 1e-5
    assert (got - alone).abs().max() < 1e-5


def test_padding_never_hides_the_end_of_a_text(folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    tokenizer.pad_token = tokenizer.eos_token  # as many tokenizers have it
    model = load_reward_model(str(folder / "model"), tokenizer, start=True)
    assert model.config.pad_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id
    model.config.architectures, model.config.pad_token_id = ["LlamaForSequenceClassification"], tokenizer.eos_token_id
    assert settle_padding(model, tokenizer) == tokenizer.eos_token_id  # one that is trained already keeps its own
    assert read_place([1, 5, 6, 2], tokenizer.eos_token_id) == 2
    assert read_place([1, 5, 6, 2], 0) == 3
    example = examples_of(model, tokenizer)[0]
    for path, (segment, offset) in zip(sequences_of(example), example.places, strict=True):
        at = (len(example.tree.ids) if segment else 0) + offset
        assert path[at + 1] == tokenizer.eos_token_id
        (read,) = score_trees(model, [example.tree], [example.places])
        k = segment - 1
        with torch.no_grad():
            assert abs(float(read[k]) - float(model(torch.tensor([path])).logits)) < 1e-5


@pytest.mark.skipif(not AVAILABLE and native_products(torch.float32) is None, reason="products are torch's own")
def test_scores_do_not_depend_on_where_their_weight_lies(folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    model = load_reward_model(str(folder / "model"), tokenizer, start=True)
    examples = examples_of(model, tokenizer)
    places, head, found = [e.places for e in examples], score_head(model), []
    weight = head.weight.detach().clone()
    for offset in range(4):
        moved = torch.empty(weight.numel() + offset)[offset:].view_as(weight)
        head.weight.data = moved.copy_(weight)
        found.append(torch.cat(score_trees(model, [e.tree for e in examples], places)))
    assert all(torch.equal(found[0], each) for each in found[1:])


@pytest.mark.parametrize("loss", list(REWARD))
def test_loss_and_gradients_do_not_depend_on_micro_batches(folder, tmp_path, loss):
    args = arguments(folder, tmp_path, loss, reward={"center_rewards_coefficient": 0.1 if loss == "bradley_terry" else 0.0})
    objective = reward.objective_of(args)
    loaded = reward.load(args, objective)
    found = reward.examples(args, loaded, objective, args.data.dataset_name, 0)[:10]
    if loss == "bradley_terry":
        found = [replace(example, margin=0.1 * i, probability=1 - 0.03 * i) for i, example in enumerate(found)]
    updater = build_updater(loaded, args, 4)
    results = []
    for budget in (10_000, 30, 1):
        batches = objective.batches(found, budget)
        total = updater.accumulate([batch for _, batch in batches]).loss
        results.append((len(batches), total, torch.cat([b.flatten().double() for b in updater.gradients.buffers])))
    (one, whole, expected), *others = results
    assert one == 1
    assert expected.norm() > 1e-3
    for count, value, gradient in others:
        assert count > 2
        assert abs(value - whole) < 1e-6 * abs(whole)
        assert (gradient - expected).norm() < 1e-6 * expected.norm()


def test_gradients_are_those_of_separate_sequences(folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    model = load_reward_model(str(folder / "model"), tokenizer, start=True).double()
    examples = examples_of(model, tokenizer, "pairs", 5)
    ((_, batch),) = RewardObjective(REWARD["bradley_terry"]).batches(examples, 10_000)
    model.zero_grad()
    loss = batch.forward_backward(model, LogitOptions())[0]
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    terms = []
    for example in examples:
        win, lose = (model(torch.tensor([path]), use_cache=False).logits[0, 0] for path in sequences_of(example))
        terms.append(torch.log1p(torch.exp(lose - win)))
    expected = torch.stack(terms).mean()
    expected.backward()
    assert abs(loss - float(expected)) < 1e-10
    reference = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (got - reference).norm() < 1e-6 * reference.norm()  # the family's norms compute in fp32


@pytest.mark.parametrize("loss", list(REWARD))
def test_every_row_trains_and_its_model_loads_anywhere(folder, tmp_path, loss):
    data = str(folder / f"{DATA[loss]}.jsonl")  # evaluated on what it trains on: a few steps are enough to see the loss fall
    summary = reward.run(arguments(folder, tmp_path, loss, data={"eval_dataset_name": data}, optim={"max_steps": 8}))
    rows = rows_of(tmp_path)
    keys = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "min_reward", "mean_reward", "max_reward"}
    measured = {"mse", "correlation", "mse/size", "mse/oddness"} if loss == "attributes" else {"accuracy", "margin"}
    assert keys | measured <= set(rows[1])
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert {f"eval/{name}" for name in measured} <= set(summary)
    assert (tmp_path / "report.html").exists()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == (2 if loss == "attributes" else 1)
    if loss == "process":
        assert (plain.config.step_separator, plain.config.step_aggregation) == ("=", "product")
    if loss == "bradley_terry":
        assert {"eval/accuracy/even", "eval/accuracy/odd"} <= set(summary)


@pytest.mark.parametrize("adapter", [False, True])
def test_graded_attributes_are_one_weighted_reward_wherever_the_model_is_used(folder, tmp_path, adapter):
    args = arguments(folder, tmp_path / "rm", "attributes", model={"use_peft": adapter, "lora_r": 2})
    reward.run(args)
    tokenizer = load_tokenizer(str(tmp_path / "rm"))
    model = load_reward_model(str(tmp_path / "rm"), tokenizer)
    assert (model.config.attribute_names, model.config.attribute_weights) == (["size", "oddness"], [0.5, -2.0])
    assert model.config.id2label == {0: "size", 1: "oddness"}
    ids = [*tokenizer("3+4=7").input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        size, oddness = model(torch.tensor([ids]), use_cache=False).logits[0].tolist()
    (judged,) = RewardModel.load(str(tmp_path / "rm"))(["3+4="], ["7"])
    assert judged == pytest.approx(0.5 * size - 2 * oddness, abs=1e-5)
    if not adapter:  # as a reward it is compared on pairs like any other; graded again, its attributes must be the ones given
        on = {"model": {"model_name_or_path": str(tmp_path / "rm")}}
        assert 0 <= reward.run(arguments(folder, tmp_path / "bench", **on, optim={"max_steps": 0}))["eval/accuracy"] <= 1
        with pytest.raises(ValueError, match="expected a model that grades size, got one that grades size, oddness"):
            reward.run(arguments(folder, tmp_path / "other", "attributes", **on, reward={"attributes": ["size"]}))


@pytest.mark.parametrize(
    ("loss", "attributes", "message"),
    [
        ("attributes", [], "name the columns that hold the grades"),
        ("attributes", ["size", "size=2"], "each name once"),
        ("attributes", ["size=much"], "--attributes 'size=much': expected NAME or NAME=WEIGHT"),
        ("attributes", ["=2"], "expected NAME or NAME=WEIGHT"),
        ("outcome", ["size"], "--attributes: the loss 'outcome' reads none"),
    ],
)
def test_attributes_are_checked(folder, tmp_path, loss, attributes, message):
    with pytest.raises(ValueError, match=message):
        reward.run(arguments(folder, tmp_path, loss, reward={"attributes": attributes}))


@pytest.mark.parametrize("adapter", [False, True])
def test_resume_continues_to_the_bit(folder, tmp_path, adapter):
    options = {"optim": {"max_steps": 4, "lr_scheduler_type": "cosine"}, "model": {"use_peft": adapter, "lora_r": 2}}
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    reward.run(arguments(folder, tmp_path / "whole", **options))
    part = arguments(folder, tmp_path / "part", **options, run={"save_steps": 2})
    reward.run(part)
    for name in (weights, "summary.json"):
        (tmp_path / "part" / name).unlink()
    reward.run(replace(part, run=replace(part.run, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))))
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
    assert (tmp_path / "part" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_max_steps_0_evaluates_and_changes_nothing(folder, tmp_path):
    reward.run(arguments(folder, tmp_path / "rm", optim={"max_steps": 2}))
    bench = arguments(folder, tmp_path / "bench", optim={"max_steps": 0}, model={"model_name_or_path": str(tmp_path / "rm")})
    summary = reward.run(bench)
    trained = json.loads((tmp_path / "rm" / "summary.json").read_text())
    for name in ("eval/accuracy", "eval/accuracy/even", "eval/loss"):
        assert abs(summary[name] - trained[name]) < 1e-6


def test_the_grades_of_each_subset_are_evaluated(folder, tmp_path):
    held = write(
        tmp_path / "held.jsonl", [row | {"subset": "small" if row["size"] < 2 else "large"} for row in records("grades", 12, seed=1)]
    )
    summary = reward.run(arguments(folder, tmp_path / "out", "attributes", data={"eval_dataset_name": held}, optim={"max_steps": 1}))
    assert {"eval/mse/small", "eval/mse/large", "eval/mse"} <= set(summary)


def test_dry_run_plans_and_writes_nothing(folder, tmp_path):
    found = reward.run(arguments(folder, tmp_path / "out", run={"dry_run": True}))
    assert found["records"] == 24
    assert found["optimizer steps"] == 4
    assert not (tmp_path / "out").exists()


def test_lora_trains_adapter_and_score_and_loads_merged(folder, tmp_path):
    pytest.importorskip("peft")
    args = arguments(folder, tmp_path, model={"use_peft": True, "lora_r": 2})
    loaded = reward.load(args, reward.objective_of(args))
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "score" in name for name in trained)
    assert any("score" in name for name in trained)
    before = score_head(loaded.model).weight.clone()
    summary = reward.run(args)
    tokenizer = load_tokenizer(str(tmp_path))
    merged = load_reward_model(str(tmp_path), tokenizer)
    assert not torch.equal(score_head(merged).weight, before)
    shown = json.loads((tmp_path / "samples.json").read_text())
    rows = [Record(row, "data", i + 1) for i, row in enumerate(records("pairs", 12, seed=1))]
    examples = ranking_examples(rows, tokenizer, max_length=64, pad_token_id=merged.config.pad_token_id)
    scores = score_trees(merged, [e.tree for e in examples], [e.places for e in examples])
    assert abs(float(torch.stack([s[0] - s[1] for s in scores]).mean()) - summary["eval/margin"]) < 1e-4
    assert abs(shown[0]["reward after"] - float(scores[0][0])) < 1e-4


def test_a_causal_model_is_no_reward_model_and_options_are_checked(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder / "model"))
    with pytest.raises(ValueError, match="expected a reward model"):
        load_reward_model(str(folder / "model"), tokenizer)
    with pytest.raises(ValueError, match="there is no folder"):
        load_reward_model(str(folder / "nothing"), tokenizer)
    with pytest.raises(ValueError, match="'outcome' is not centred; bradley_terry can be"):
        reward.objective_of(arguments(folder, tmp_path, "outcome", reward={"center_rewards_coefficient": 0.1}))
    for column in ("margin", "probability"):
        write(tmp_path / "more.jsonl", [{"prompt": "1+1=", "completions": ["2", "3"], column: 0.5}] * 2)
        args = arguments(folder, tmp_path / "out", "plackett_luce", data={"dataset_name": str(tmp_path / "more.jsonl")})
        with pytest.raises(ValueError, match=rf"a column '{column}', which --loss plackett_luce does not read \(bradley_terry does\)"):
            reward.run(args)


def test_a_classifier_of_several_labels_is_refused(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder / "model"))
    AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one label, got 3"):
        load_reward_model(str(tmp_path), tokenizer, start=True)


def test_a_family_with_absolute_positions_scores_as_transformers_does(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder / "model"))
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    try:
        model = load_reward_model(str(tmp_path), tokenizer, start=True)
    except UnsupportedModelError:
        pytest.skip("this family does not run as a token tree")
    example = examples_of(model, tokenizer)[0]
    (scores,) = score_trees(model, [example.tree], [example.places])
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([path])).logits[:, 0] for path in sequences_of(example)])
    assert (scores - alone).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_other_families_score_as_transformers_does(folder, tmp_path, family):
    tokenizer = load_tokenizer(str(folder / "model"))
    FAMILIES[family]().save_pretrained(tmp_path)
    model = load_reward_model(str(tmp_path), tokenizer, start=True)
    examples = examples_of(model, tokenizer, n=3)
    got = torch.cat(score_trees(model, [e.tree for e in examples], [e.places for e in examples]))
    model.save_pretrained(tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", attn_implementation="eager").eval()
    with torch.no_grad():
        alone = torch.cat([plain(torch.tensor([path])).logits[:, 0] for example in examples for path in sequences_of(example)])
    assert (got - alone).abs().max() < 1e-4 * alone.abs().max().clamp(min=1)


def test_bf16_and_checkpointing_train(folder, tmp_path):
    data = str(folder / "pairs.jsonl")
    model = {"dtype": "bfloat16", "gradient_checkpointing": True}
    args = arguments(folder, tmp_path, model=model, data={"eval_dataset_name": data}, optim={"max_steps": 8})
    summary = reward.run(args)
    assert summary["eval/loss"] < summary["eval/loss/before"]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_the_command_trains_and_tells_what_is_wrong(folder, tmp_path, capsys):
    flags = ["reward", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "steps.jsonl"), "--device", "cpu"]
    steps = ["--loss", "process", "--step_separator", "=", "--step_aggregation", "min"]
    assert main([*flags, *steps, "--max_steps", "1", "--output_dir", str(tmp_path / "prm")]) == 0
    assert json.loads((tmp_path / "prm" / "config.json").read_text())["step_aggregation"] == "min"
    assert main([*flags, "--output_dir", str(tmp_path / "other")]) == 2
    assert "completions with labels are steps: give --loss process" in capsys.readouterr().err
    assert main([*flags, "--loss", "bradley_tery", "--output_dir", str(tmp_path / "other")]) == 2
    assert "did you mean bradley_terry" in capsys.readouterr().err


def test_the_better_answer_is_learned_in_seconds(folder, tmp_path):
    write(tmp_path / "train.jsonl", records("pairs", 200, seed=5))
    args = arguments(
        folder,
        tmp_path / "out",
        data={"dataset_name": str(tmp_path / "train.jsonl")},
        optim={"max_steps": 40},
        batch={"per_device_train_batch_size": 16},
    )
    summary = reward.run(args)
    assert summary["eval/accuracy"] >= 0.95
    assert summary["eval/margin"] > 1.0


def test_adapters_stack_whoever_made_them(folder, tmp_path):
    """A causal model's adapter under a reward model's, and one reward model's under another's: none of them is lost."""
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    tokenizer, causal = load_tokenizer(str(folder / "model")), tmp_path / "causal"
    adapted = peft.get_peft_model(load_causal_lm(str(folder / "model")), peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    save_adapter(adapted, str(causal))
    tokenizer.save_pretrained(causal)
    with pytest.raises(ValueError, match="expected a reward model, got the adapter of another model; train one with fastalign reward"):
        load_reward_model(str(causal), tokenizer)
    model, ids = load_reward_model(str(causal), tokenizer, start=True), torch.tensor([[3, 4, 5, 6]])
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(model.model(ids).last_hidden_state, merged.model(ids).last_hidden_state)
    for name in ("first", "second"):
        peft_model = peft.get_peft_model(model, peft.LoraConfig(**options, task_type="SEQ_CLS", modules_to_save=["score"]))
        save_adapter(peft_model, str(tmp_path / name))
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            want = peft_model.eval()(ids).logits
            model = load_reward_model(str(tmp_path / name), tokenizer)
            torch.testing.assert_close(model.eval()(ids).logits, want)
        assert all(parameter.requires_grad for parameter in model.parameters())
