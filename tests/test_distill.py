"""Distillation: the divergence against fp64 softmaxes, its gradients, its cut into micro-batches, and `fastalign distill`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_microbatches import VOCAB, assert_same, conversations, gradients_of, updater
from test_recipes import arguments, rows_of, task  # noqa: F401
from tiny_models import gemma2, llama, ready
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from fastalign import catalogue
from fastalign.generation import SamplingParams
from fastalign.models.attention import use_fastalign_attention
from fastalign.ops.divergence import DIVERGENCES
from fastalign.recipes import arithmetic, distill
from fastalign.recipes.arguments import DistillArguments
from fastalign.recipes.distill_task import Divergence, OnPolicy, micro_batches

ROOT = Path(__file__).resolve().parent.parent
CASES = [Divergence("forward_kl"), Divergence("reverse_kl", temperature=1.7), Divergence("jsd", 0.3), Divergence("jsd", 0.5, 0.8)]


def teacher_of(hidden_size: int = 48, **changes):
    """Another width than the student's 32."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    use_fastalign_attention(model)
    return model


def in_fp64(model):
    copy = type(model)(model.config).double()
    copy.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    copy.config._attn_implementation = "eager"
    return copy


def divergence_by_hand(student, teacher, d: Divergence):
    """[N] from logits [N, V] in fp64, as the papers write it."""
    p_s, p_t = (F.softmax(x / d.temperature, -1) for x in (student, teacher))

    def kl(p, q):
        return (p * (p.log() - q.log())).sum(-1)

    m = d.jsd_beta * p_t + (1 - d.jsd_beta) * p_s
    return {
        "forward_kl": kl(p_t, p_s),
        "reverse_kl": kl(p_s, p_t),
        "jsd": d.jsd_beta * kl(p_t, m) + (1 - d.jsd_beta) * kl(p_s, m),
    }[d.name]


def expected_of(student, teacher, segments, d: Divergence):
    """The weighted mean over scored tokens and its gradients, one sequence at a time with whole logits in fp64."""
    student, teacher = in_fp64(student), in_fp64(teacher)
    total, weights = 0.0, 0.0
    for s in segments:
        ids = torch.tensor([list(s.ids)])
        scored = torch.tensor(list(s.scored)[1:])
        logits = [m(input_ids=ids, use_cache=False).logits[0, :-1][scored] for m in (student, teacher)]
        total = total + s.weight * divergence_by_hand(logits[0], logits[1].detach(), d).sum()
        weights += s.weight * int(scored.sum())
    (total / weights).backward()
    return float((total / weights).detach()), torch.cat([p.grad.flatten() for p in student.parameters() if p.requires_grad])


def test_catalogue_names_the_divergences_of_the_op():
    assert set(catalogue.DIVERGENCES) == set(DIVERGENCES)


@pytest.mark.parametrize("d", CASES, ids=str)
def test_loss_and_gradients_equal_softmaxes_in_fp64(d):
    u, teacher = updater(), teacher_of()
    loss, gradients = gradients_of(u, micro_batches(conversations(), 10_000, teacher, d))
    expected, flat = expected_of(u.model, teacher, conversations(), d)
    assert loss == pytest.approx(expected, rel=2e-5)
    assert flat.norm() > 1e-3
    assert (gradients - flat).norm() <= 2e-5 * flat.norm()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d", CASES, ids=str)
def test_distillation_is_invariant_to_micro_batches(d, tied):
    u, teacher = updater(tied), teacher_of()
    whole = gradients_of(u, micro_batches(conversations(), 10_000, teacher, d))
    cut = micro_batches(conversations(), 16, teacher, d)
    assert len(cut) > 3
    assert_same(gradients_of(u, cut), whole)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    u = updater()
    twin = type(u.model)(u.model.config)
    twin.load_state_dict(u.model.state_dict())
    use_fastalign_attention(twin)
    for d in CASES:
        loss, gradients = gradients_of(u, micro_batches(conversations(), 10_000, twin.requires_grad_(False).eval(), d))
        assert abs(loss) < 1e-6
        assert gradients.norm() < 1e-5


@pytest.mark.parametrize("scaled_side", ["student", "teacher"])
def test_a_familys_logit_scale_is_in_the_distributions(scaled_side):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    cohere = CohereForCausalLM(CohereConfig(vocab_size=VOCAB, **sizes, logit_scale=0.25, initializer_range=0.3, pad_token_id=0))
    use_fastalign_attention(cohere)
    u, teacher = updater(), teacher_of()
    if scaled_side == "teacher":
        teacher = cohere.requires_grad_(False).eval()
    else:
        u.model = cohere
        u.gradients = type(u.gradients)(cohere.parameters())
    loss, gradients = gradients_of(u, micro_batches(conversations(), 10_000, teacher, CASES[2]))
    expected, flat = expected_of(u.model, teacher, conversations(), CASES[2])
    assert loss == pytest.approx(expected, rel=2e-5)
    assert (gradients - flat).norm() <= 3e-5 * flat.norm()


def test_on_policy_steps_are_chosen_by_seed_and_step_in_about_the_share_asked_for():
    def chosen(lmbda, seed=0):
        policy = OnPolicy(lmbda, SamplingParams(), 64, seed)
        return [policy.chosen(i) for i in range(400)]

    assert chosen(0.3) == chosen(0.3)
    assert chosen(0.3) != chosen(0.3, seed=1)
    assert 80 < sum(chosen(0.3)) < 160
    assert not any(chosen(0.0))
    assert all(chosen(1.0))
    assert all(b for a, b in zip(chosen(0.3), chosen(0.6), strict=True) if a)  # a larger share adds steps


@pytest.fixture(scope="module")
def teacher_folder(task):  # noqa: F811
    """A wider teacher over the demo's vocabulary."""
    tokenizer = arithmetic.build_tokenizer()
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(task / "teacher")
    tokenizer.save_pretrained(task / "teacher")
    return task / "teacher"


def distilling(task, output, teacher, command="sft", **changes):  # noqa: F811
    own = {"teacher_model_name_or_path": str(teacher)} | changes.pop("distill", {})
    args = arguments(task, output, command, **changes)
    return replace(args, command="distill", distill=DistillArguments(**own))


def test_distill_learns_the_teachers_distribution(task, teacher_folder, tmp_path):  # noqa: F811
    optim = {"max_steps": 24, "learning_rate": 3e-3}
    distill.run(distilling(task, tmp_path, teacher_folder, optim=optim, distill={"loss": "forward_kl", "lmbda": 0.3}))
    rows = rows_of(tmp_path)
    assert rows[-1]["eval/loss"] < 0.7 * rows[0]["eval/loss"]
    assert {"eval/nll_loss", "eval/entropy"} <= set(rows[-1])
    steps = [row for row in rows if "loss" in row]
    assert {row["on_policy"] for row in steps} == {0.0, 1.0}
    for row in steps:
        assert ("completions/mean_length" in row) == (row["on_policy"] == 1.0)
        assert row["loss"] == row["loss/on_policy" if row["on_policy"] else "loss/off_policy"]
    assert (tmp_path / "report.html").exists()


def test_distill_resumes_to_the_bit(task, teacher_folder, tmp_path):  # noqa: F811
    flags = {"optim": {"max_steps": 6, "lr_scheduler_type": "cosine"}}
    distill.run(distilling(task, tmp_path / "whole", teacher_folder, **flags))
    assert {row["on_policy"] for row in rows_of(tmp_path / "whole")[4:] if "loss" in row} == {0.0, 1.0}
    saving = distilling(task, tmp_path / "part", teacher_folder, **flags, run={"save_steps": 3})
    distill.run(saving)
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "part" / name).unlink()
    distill.run(replace(saving, run=replace(saving.run, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))))
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_fully_on_policy_needs_prompts_only_and_lora_trains(task, teacher_folder, tmp_path):  # noqa: F811
    flags = {"model": {"use_peft": True, "lora_r": 4}, "optim": {"max_steps": 3, "learning_rate": 1e-2}}
    distill.run(distilling(task, tmp_path, teacher_folder, "grpo", **flags, distill={"lmbda": 1.0, "loss": "reverse_kl"}))
    steps = [row for row in rows_of(tmp_path) if "loss" in row]
    assert all(row["on_policy"] == 1.0 for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (tmp_path / "adapter_config.json").exists()


def test_dry_run_names_the_teacher_and_trains_nothing(task, teacher_folder, tmp_path):  # noqa: F811
    plan = distill.run(distilling(task, tmp_path / "none", teacher_folder, run={"dry_run": True}))
    assert plan["teacher"] == str(teacher_folder)
    assert not (tmp_path / "none").exists()


def test_another_vocabulary_or_tokenizer_is_refused(task, teacher_folder, tmp_path):  # noqa: F811
    llama(vocab_size=31).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="student's vocabulary of 15, got 31"):
        distill.run(distilling(task, tmp_path / "out", tmp_path / "wide"))
    other = arithmetic.build_tokenizer()
    other.add_tokens(["x"])
    swapped = tmp_path / "swapped"
    LlamaForCausalLM.from_pretrained(teacher_folder).save_pretrained(swapped)
    text = (teacher_folder / "tokenizer.json").read_text()
    (swapped / "tokenizer.json").write_text(text.replace('"7": 10', '"7": 11').replace('"8": 11', '"8": 10'))
    (swapped / "tokenizer_config.json").write_text((teacher_folder / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match=r"token '[78]' is 1[01] in the student's tokenizer and 1[01] in the teacher's"):
        distill.run(distilling(task, tmp_path / "out", swapped))


def test_a_soft_cap_is_refused(task, tmp_path):  # noqa: F811
    ready(gemma2(vocab_size=15)).save_pretrained(tmp_path / "capped")
    with pytest.raises(ValueError, match="--teacher_model_name_or_path: gemma2 soft-caps"):
        distill.run(distilling(task, tmp_path / "out", tmp_path / "capped"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": {"teacher_model_name_or_path": ""}}, "--teacher_model_name_or_path is required"),
        ({"distill": {"lmbda": 1.5}}, "--lmbda must be in"),
        ({"distill": {"loss": "kl"}}, "expected divergence 'forward_kl'"),
        ({"distill": {"jsd_beta": 2.0}}, "jsd_beta must be in"),
        ({"sampling": {"temperature": 0.0}}, "--temperature must be > 0"),
        ({"command": "grpo"}, "completion"),  # prompts only, but not every step is on-policy
        ({"optim": {"learning_rate": 0.0}}, "--learning_rate must be > 0"),
    ],
)
def test_bad_arguments_are_named(task, teacher_folder, tmp_path, changes, words):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        distill.run(distilling(task, tmp_path, teacher_folder, **changes))


def test_texts_without_a_prompt_cannot_be_on_policy(task, teacher_folder, tmp_path):  # noqa: F811
    (tmp_path / "text.jsonl").write_text('{"text": "1+2=3"}\n' * 8)
    data = {"dataset_name": str(tmp_path / "text.jsonl"), "eval_dataset_name": ""}
    with pytest.raises(ValueError, match="give records of prompt and completion, or --lmbda 0"):
        distill.run(distilling(task, tmp_path / "out", teacher_folder, data=data))
    distill.run(distilling(task, tmp_path / "out", teacher_folder, data=data, optim={"max_steps": 1}, distill={"lmbda": 0.0}))


@pytest.mark.slow
def test_losses_and_gradient_norms_are_those_of_trl(tmp_path):
    pytest.importorskip("trl")
    from bench.peers import gkd_in_fastalign, gkd_in_trl, trl_gkd

    if not (ROOT / trl_gkd.STORIES).is_dir():
        pytest.skip(f"{trl_gkd.STORIES} is not there")
    args = trl_gkd.parser().parse_args(["--stories", str(ROOT / trl_gkd.STORIES), "--steps", "2", "--batch_size", "4"])
    options = trl_gkd.prepare(args, tmp_path) | {"beta": 0.3}
    theirs, ours = gkd_in_trl.train(options), gkd_in_fastalign.train(options)
    assert theirs[1]["loss"] != pytest.approx(theirs[0]["loss"], abs=1e-3)
    trl_gkd.check(0.3, theirs, ours)
