"""Supervised losses against their equations in fp64, their gradients, their cut into micro-batches, and `fastalign sft` with each."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from test_microbatches import VOCAB, assert_same, conversations, gradients_of, updater
from test_recipes import arguments, rows_of, task  # noqa: F401

from fastalign import catalogue
from fastalign.data import BadRecord, Record
from fastalign.data.ranked import Ranked, ranked_examples
from fastalign.losses.sft import SUPERVISED, dft, rrhf, supervised_loss
from fastalign.packing import group
from fastalign.recipes import arithmetic, sft
from fastalign.recipes.arguments import SupervisedArguments
from fastalign.recipes.sft_task import cut_of, micro_batches, ranked_micro_batches


def test_catalogue_and_table_name_the_same_rows():
    assert list(catalogue.SUPERVISED_LOSSES) == list(SUPERVISED)
    for name, entry in catalogue.SUPERVISED_LOSSES.items():
        assert set(entry.options) == set(SUPERVISED[name].options), name


def test_dft_is_the_probability_times_the_nll():
    logp = -torch.rand(50, dtype=torch.float64) * 6
    expected = [-math.exp(x) * x for x in logp.tolist()]
    assert dft(logp).tolist() == pytest.approx(expected, rel=1e-12)
    assert dft(logp).max() <= 1 / math.e


def test_dft_gradient_holds_the_probability_still():
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (7,))
    dft(logits.log_softmax(1)[torch.arange(7), targets]).sum().backward()
    p = logits.detach().softmax(1)
    onehot = torch.nn.functional.one_hot(targets, 11)
    expected = p[torch.arange(7), targets][:, None] * (p - onehot)  # p · d(-log p)/d(logits)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-14)


def rrhf_by_hand(logps: list[list[float]], scores: list[float], length_penalty: float, sft_coef: float) -> float:
    p = [sum(l) / max(len(l), 1) ** length_penalty for l in logps]
    total = 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            if scores[i] < scores[j]:
                total += max(0.0, p[i] - p[j])
    best = max(range(len(p)), key=lambda k: scores[k])
    return total - sft_coef * sum(logps[best])


@pytest.mark.parametrize("options", [{}, {"length_penalty": 0.5}, {"length_penalty": 0.0, "sft_coef": 0.1}])
def test_rrhf_is_the_papers_sum_over_pairs_and_the_nll_of_the_best(options):
    draw = random.Random(3)
    groups = [[[-5 * draw.random() for _ in range(draw.randint(1, 6))] for _ in range(draw.randint(2, 5))] for _ in range(6)]
    scores = [[draw.choice([0.0, 0.5, 1.0, 2.0]) for _ in group_] for group_ in groups]
    flat = [logps for group_ in groups for logps in group_]
    cu_targets = torch.tensor([0, *(len(x) for x in flat)]).cumsum(0).int()
    cu_groups = torch.tensor([0, *(len(g) for g in groups)]).cumsum(0).int()
    logp = torch.tensor([x for logps in flat for x in logps], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([s for group_ in scores for s in group_], dtype=torch.float64)
    found = rrhf(logp, cu_targets, cu_groups, r, **options)
    full = {"length_penalty": 1.0, "sft_coef": 1.0} | options
    expected = [rrhf_by_hand(g, s, **full) for g, s in zip(groups, scores, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: rrhf(x, cu_targets, cu_groups, r, **options), (logp,))


def test_rrhf_of_well_ranked_or_equal_completions_is_the_nll_of_the_best_alone():
    cu, groups = torch.tensor([0, 1, 2]), torch.tensor([0, 2])
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    assert rrhf(logp, cu, groups, torch.tensor([1.0, 0.0])).tolist() == [1.0]
    assert rrhf(logp, cu, groups, torch.tensor([0.0, 0.0])).tolist() == [1.0]
    assert rrhf(logp, cu, groups, torch.tensor([0.0, 1.0])).tolist() == [2.0 + 1.0]


def ranked_groups(n: int = 7) -> list[Ranked]:
    draw = random.Random(5)
    found = []
    for _ in range(n):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 6))]
        completions = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 7))] for _ in range(draw.randint(2, 5))]
        found.append(Ranked(group(prompt, completions), tuple(draw.random() for _ in completions)))
    return found


def test_dft_is_invariant_to_micro_batches():
    u, row = updater(), supervised_loss("dft")
    whole = gradients_of(u, micro_batches(conversations(), 10_000, row))
    cut = micro_batches(conversations(), 16, row)
    assert len(cut) > 3
    assert_same(gradients_of(u, cut), whole)


def test_rrhf_is_invariant_to_micro_batches_and_to_chunks():
    u, row = updater(), supervised_loss("rrhf")
    whole = gradients_of(u, ranked_micro_batches(ranked_groups(), 10_000, row))
    cut = ranked_micro_batches(ranked_groups(), 40, row)
    assert len(cut) > 3
    assert_same(gradients_of(u, cut), whole)
    u.options = replace(u.options, max_chunk_bytes=4 * VOCAB * 12)  # about twelve rows of logits: a group or two at a time
    assert_same(gradients_of(u, ranked_micro_batches(ranked_groups(), 10_000, row)), whole)


@pytest.mark.parametrize("name", list(SUPERVISED))
def test_steps_equal_padded_fp64_autograd(name):
    """Loss and gradient through the packed, fused path against one sequence at a time with the whole logits in fp64."""
    u, row = updater(), supervised_loss(name)
    examples = ranked_groups() if row.ranks else conversations()
    loss, gradients = gradients_of(u, cut_of(row)(examples, 10_000))
    model = type(u.model)(u.model.config).double()
    model.load_state_dict({k: v.double() for k, v in u.model.state_dict().items()})
    model.config._attn_implementation = "eager"

    def logps(ids, first):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        return logits[torch.arange(first - 1, len(ids) - 1), torch.tensor(ids[first:])]

    if row.ranks:
        terms = []
        for example in examples:
            prompt, completions = list(example.segment.ids), [list(c.ids) for c in example.segment.children]
            found = [logps(prompt + c, len(prompt)) for c in completions]
            p = [x.mean() for x in found]
            s = example.scores
            pairs = [(p[i] - p[j]).clamp(min=0) for i in range(len(p)) for j in range(len(p)) if s[i] < s[j]]
            terms.append(sum(pairs) - found[s.index(max(s))].sum())
        expected = sum(terms) / len(terms)
    else:
        total, weights = 0.0, 0.0
        for c in examples:
            scored = torch.tensor(list(c.scored)[1:])
            logp = logps(list(c.ids), 1)[scored]
            total = total + c.weight * (-(logp.detach().exp() if name == "dft" else 1.0) * logp).sum()
            weights += c.weight * int(scored.sum())
        expected = total / weights
    expected.backward()
    named = dict(model.named_parameters())
    flat = torch.cat([named[n].grad.flatten() for n, p in u.model.named_parameters() if p.requires_grad])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert gradients.shape == flat.shape
    assert (gradients - flat).norm() <= 2e-5 * flat.norm()


def test_unknown_rows_and_options_are_named():
    with pytest.raises(ValueError, match="did you mean"):
        supervised_loss("dtf")
    with pytest.raises(ValueError, match="nll has no arguments"):
        supervised_loss("nll", {"beta": 1})
    with pytest.raises(ValueError, match=r"--loss\.length_penalty"):
        supervised_loss("rrhf", {"lenght_penalty": 1})
    with pytest.raises(ValueError, match="finite number >= 0, got nan"):
        supervised_loss("rrhf", {"sft_coef": math.nan})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"completions": ["3"], "scores": [1.0]}, "two or more"),
        ({"completions": "34"}, "two or more"),
        ({"scores": [1.0]}, "a score a completion, got 1 for 2"),
        ({"scores": [1.0, math.nan]}, "finite numbers"),
        ({"scores": None}, "expected a value in column 'scores'"),
        ({"completions": ["3", ""]}, "expected text in column 'completion'"),
        ({"weight": 2.0}, "no 'weight'"),
        ({"completions": ["3", "4" * 99]}, "at most 32 tokens"),
    ],
)
def test_bad_rankings_are_named_with_their_line(change, words):
    record = Record({"prompt": "1+2=", "completions": ["3", "4"], "scores": [1.0, 0.0]} | change, "data.jsonl", 7)
    with pytest.raises(BadRecord, match="data.jsonl:7.*" + words):
        ranked_examples([record], arithmetic.build_tokenizer(), max_length=32)


def test_a_token_over_the_vocabulary_is_found_in_every_completion():
    record = Record({"prompt": "1+2=", "completions": ["3000000", "+"], "scores": [1, 0]}, "data.jsonl", 1)
    with pytest.raises(BadRecord, match="over the vocabulary of 13"):
        ranked_examples([record], arithmetic.build_tokenizer(), max_length=32, vocab_size=13)


def write_rankings(path):
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(32):
            a, b = draw.randrange(100), draw.randrange(100)
            answers = [f"{a + b:03d}", f"{draw.randrange(200):03d}", f"{draw.randrange(200):03d}"]
            print(json.dumps({"prompt": f"{a:02d}+{b:02d}=", "completions": answers, "scores": [1.0, 0.2, 0.1]}), file=file)
    return str(path)


@pytest.mark.parametrize("name", ["dft", "rrhf"])
def test_sft_with_each_loss_trains_and_resumes_to_the_bit(task, tmp_path, name):  # noqa: F811
    changes = {"optim": {"max_steps": 4}, "data": {}}
    if SUPERVISED[name].ranks:
        data = write_rankings(tmp_path / "rankings.jsonl")
        changes["data"] = {"dataset_name": data, "eval_dataset_name": data}

    def args(folder, **run):
        return replace(arguments(task, tmp_path / folder, "sft", **changes, run=run), supervised=SupervisedArguments(loss=name))

    sft.run(args("whole"))
    rows = rows_of(tmp_path / "whole")
    assert rows[-1]["eval/nll_loss"] < rows[0]["eval/nll_loss"]
    sft.run(args("part", save_steps=2))
    for left in ("model.safetensors", "summary.json"):
        (tmp_path / "part" / left).unlink()
    sft.run(args("part", resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2")))
    assert rows_of(tmp_path / "part") == rows
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
