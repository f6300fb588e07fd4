"""accelerate_trainer against TRL itself: every loss type keeps its losses, its gradients and its metrics."""

import importlib.metadata

import pytest
import tiny_models
import torch

from fastalign.integrations.trl import MARK, accelerate_trainer, restore_trainer
from fastalign.models.attention import UnsupportedModelError

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.skipif(importlib.metadata.version("trl").split(".")[:2] != ["1", "16"], reason="another TRL than 1.16"),
    pytest.mark.filterwarnings("ignore"),
]


def word_tokenizer(size):
    """One token a word, w2 to w130."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def checksum(completions, **columns):
    """A reward that depends on the text alone and differs within a group."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def words(count, seed):
    return " ".join(f"w{3 + (7 * i + 13 * seed) % 120}" for i in range(count))


PAIRS = [
    {"prompt": words(4 + i % 3, i), "chosen": " " + words(3 + i % 5, i + 50), "rejected": " " + words(2 + i % 4, i + 90)} for i in range(24)
]
DATA = {
    "SFT": [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS],
    "DPO": PAIRS,
    "KTO": [{"prompt": r["prompt"], "completion": r["chosen" if i % 2 else "rejected"], "label": bool(i % 2)} for i, r in enumerate(PAIRS)],
    "GRPO": [{"prompt": r["prompt"]} for r in PAIRS],
    "RLOO": [{"prompt": r["prompt"]} for r in PAIRS],
}
ONLINE = {"num_generations": 4, "max_completion_length": 6}
DEFAULTS = {"SFT": {}, "DPO": {}, "KTO": {}, "GRPO": ONLINE | {"beta": 0.04}, "RLOO": ONLINE | {"beta": 0.05}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models: TRL loads its reference from where the policy came from."""
    made = {}
    for family in ("llama", "gemma2"):
        made[family] = str(tmp_path_factory.mktemp(family))
        model = tiny_models.FAMILIES[family]()
        model.config.pad_token_id, model.config.eos_token_id = 0, 1
        model.save_pretrained(made[family])
    return made


def build(kind, folder, output_dir, **options):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    peft_config = options.pop("peft_config", None)
    common = {"max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "gradient_checkpointing": False}
    common |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0}
    common |= {"per_device_train_batch_size": 4, "output_dir": str(output_dir)} | DEFAULTS[kind] | options
    rewards = {"reward_funcs": checksum} if kind in ("GRPO", "RLOO") else {}
    return getattr(trl, kind + "Trainer")(
        AutoModelForCausalLM.from_pretrained(folder),
        args=getattr(trl, kind + "Config")(**common),
        train_dataset=datasets.Dataset.from_list(DATA[kind]),
        processing_class=word_tokenizer(tiny_models.VOCAB),
        peft_config=peft_config,
        **rewards,
    )


def history(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "grad_norm" in log]


def assert_same_history(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs) == 3
    for mine, log in zip(ours, theirs, strict=True):
        assert mine.keys() == log.keys()
        for key in set(log) - {"step_time", "epoch"}:
            if key == "rewards/accuracies" and abs(log["rewards/margins"]) < 1e-6:
                continue  # policy and reference are one: rounding says which reward is larger
            assert mine[key] == pytest.approx(log[key], abs=tolerance, rel=10 * tolerance), key


CASES = {
    "sft": ("SFT", {}),
    "sft, accumulated": ("SFT", {"gradient_accumulation_steps": 2}),
    "sft, dft": ("SFT", {"loss_type": "dft"}),
    "sft, all tokens": ("SFT", {"completion_only_loss": False}),
    "sft, label smoothing": ("SFT", {"label_smoothing_factor": 0.1}),
    "dpo": ("DPO", {}),
    "dpo, ipo": ("DPO", {"loss_type": "ipo"}),
    "dpo, two losses": ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    "dpo, weighted": ("DPO", {"use_weighting": True}),
    "dpo, ld_alpha": ("DPO", {"ld_alpha": 0.5}),
    "dpo, precomputed": ("DPO", {"precompute_ref_log_probs": True}),
    "kto": ("KTO", {}),
    "kto, apo": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "grpo": ("GRPO", {}),
    "grpo, dapo, hot": ("GRPO", {"loss_type": "dapo", "temperature": 0.7, "beta": 0.0}),
    "grpo, entropy bonus": ("GRPO", {"entropy_coef": 0.05, "beta": 0.0}),
    "grpo, high-entropy tokens, twice": ("GRPO", {"top_entropy_quantile": 0.5, "num_iterations": 2}),
    "grpo, sequence ratios, fp32 head": ("GRPO", {"importance_sampling_level": "sequence", "cast_lm_head_to_fp32": True}),
    "rloo": ("RLOO", {}),
}


RARE = {"sft, label smoothing", "dpo, ipo", "dpo, ld_alpha", "kto, apo", "grpo, high-entropy tokens, twice", "rloo"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if case in RARE else []) for case in CASES])
def test_trl_losses_and_metrics_are_trls(case, folders, tmp_path):
    kind, options = CASES[case]
    theirs = history(build(kind, folders["llama"], tmp_path, **options))
    for pack in (False, True):
        ours = history(accelerate_trainer(build(kind, folders["llama"], tmp_path, **options), pack=pack))
        assert_same_history(ours, theirs)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_trl_with_lora(kind, pack, folders, tmp_path):
    """A frozen head, and a reference that is the policy with its adapter off."""
    peft = pytest.importorskip("peft")
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    theirs = history(build(kind, folders["llama"], tmp_path, peft_config=peft.LoraConfig(**config)))
    ours = history(accelerate_trainer(build(kind, folders["llama"], tmp_path, peft_config=peft.LoraConfig(**config)), pack=pack))
    assert_same_history(ours, theirs)


def test_trl_with_soft_capped_logits(folders, tmp_path):
    theirs = history(build("DPO", folders["gemma2"], tmp_path, use_weighting=True))
    for pack in (False, True):
        ours = history(accelerate_trainer(build("DPO", folders["gemma2"], tmp_path, use_weighting=True), pack=pack))
        assert_same_history(ours, theirs)


def test_trl_packed_under_gradient_checkpointing_and_autocast(folders, tmp_path):
    theirs = history(build("DPO", folders["llama"], tmp_path))
    ours = history(accelerate_trainer(build("DPO", folders["llama"], tmp_path, gradient_checkpointing=True), pack=True))
    assert_same_history(ours, theirs)
    mixed = history(build("DPO", folders["llama"], tmp_path, bf16=True))
    ours = history(accelerate_trainer(build("DPO", folders["llama"], tmp_path, bf16=True), pack=True))
    assert [log["loss"] for log in ours] == pytest.approx([log["loss"] for log in mixed], abs=0.05)


def test_trl_packed_backbone_computes_each_prompt_once(folders, tmp_path, monkeypatch):
    from fastalign.integrations import forwards

    sizes = []
    original = forwards.tree_hidden_states
    monkeypatch.setattr(forwards, "tree_hidden_states", lambda m, ids, *a: sizes.append(len(ids)) or original(m, ids, *a))
    trainer = accelerate_trainer(build("DPO", folders["llama"], tmp_path), pack=True)
    inputs = next(iter(trainer.get_train_dataloader()))
    sizes.clear()
    trainer.compute_loss(trainer.model, inputs)
    pairs = len(inputs["input_ids"]) // 2
    completions = inputs["completion_mask"].sum() - 2 * pairs  # the last token of a completion predicts nothing
    prompts = (inputs["attention_mask"] - inputs["completion_mask"])[:pairs].sum()
    assert sizes == [int(completions + prompts)] * 2


def test_trl_packed_of_a_batch_without_scored_tokens(folders, tmp_path):
    """A differentiable zero, as TRL's head gives it."""
    trainer = accelerate_trainer(build("SFT", folders["llama"], tmp_path), pack=True)
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.item() == 0.0
    loss.backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in trainer.model.parameters())


def test_trl_head_computes_scored_tokens_only(folders, tmp_path, monkeypatch):
    """What reaches the head is what the loss scores, for policy and reference."""
    from fastalign.integrations import trl as module

    rows = []
    original = module.linear_scores
    monkeypatch.setattr(module, "linear_scores", lambda hidden, *a, **k: rows.append(len(hidden)) or original(hidden, *a, **k))
    trainer = accelerate_trainer(build("DPO", folders["llama"], tmp_path))
    rows.clear()
    trainer.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, inputs)
    assert len(rows) == 2 * 4
    assert rows[-2:] == [int(inputs["completion_mask"].sum())] * 2


def test_trl_evaluation_is_trls(folders, tmp_path):
    found = []
    for change in (lambda t: t, accelerate_trainer):
        trainer = change(build("SFT", folders["llama"], tmp_path))
        found.append(trainer.evaluate(trainer.train_dataset))
    assert found[0].keys() == found[1].keys()
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert found[1][key] == pytest.approx(found[0][key], abs=1e-5), key


def test_trl_twice_and_back(folders, tmp_path):
    trainer = build("DPO", folders["llama"], tmp_path)
    before = trainer.model.forward
    attention = trainer.model.config._attn_implementation
    assert accelerate_trainer(accelerate_trainer(trainer, pack=True)) is trainer
    assert trainer.model.config._attn_implementation == attention
    accelerate_trainer(trainer, pack=True)
    assert trainer.model.config._attn_implementation == "fastalign"
    assert len(trainer.model.__dict__[MARK]) == 1
    restore_trainer(trainer)
    assert trainer.model.forward == before
    assert trainer.model.config._attn_implementation == attention
    assert MARK not in trainer.model.__dict__
    assert MARK not in trainer.ref_model.__dict__


def test_trl_second_trainer_of_one_model(folders, tmp_path):
    """A model that went through SFT goes on in GRPO: its second trainer has another temperature."""
    from fastalign import patch

    first = accelerate_trainer(build("SFT", folders["llama"], tmp_path))
    options = {"max_steps": 3, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 0, "logging_steps": 1}
    options |= {"per_device_train_batch_size": 4, "temperature": 0.5, "save_strategy": "no", "output_dir": str(tmp_path)} | ONLINE
    data = datasets.Dataset.from_list(DATA["GRPO"])
    found = []
    for model in (build("SFT", folders["llama"], tmp_path).model, patch(first.model)):
        torch.manual_seed(0)
        arguments = {"reward_funcs": checksum, "train_dataset": data, "processing_class": first.processing_class}
        trainer = trl.GRPOTrainer(model, args=trl.GRPOConfig(**options), **arguments)
        found.append(history(accelerate_trainer(trainer) if model is first.model else trainer))
    assert_same_history(found[1], found[0])


def test_trl_names_what_cannot_work(folders, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="SFTTrainer, DPOTrainer"):
        accelerate_trainer(object())
    trainer = build("SFT", folders["llama"], tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", lambda name: "1.17.0")
        with pytest.raises(ImportError, match=r"tested with TRL 1\.16, found 1\.17\.0"):
            accelerate_trainer(trainer)
    trainer.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel=True"):
        accelerate_trainer(trainer)
    trainer.args.use_liger_kernel = False
    own = trainer.model.forward
    trainer.model.forward = lambda *args, fused_lm_head=False, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match="right after building the trainer"):
        accelerate_trainer(trainer)


def test_trl_numbers_that_differ_are_refused(folders, tmp_path, monkeypatch):
    """The short batch that is compared before anything is replaced."""
    from fastalign.integrations import trl as module

    trainer = build("SFT", folders["llama"], tmp_path)
    original = module.linear_scores
    monkeypatch.setattr(module, "linear_scores", lambda *a, **k: original(*a, **(k | {"temperature": 1.1})))
    with pytest.raises(UnsupportedModelError, match="off by"):
        accelerate_trainer(trainer)
    assert MARK not in trainer.model.__dict__


def test_trl_model_is_pickled_and_accelerated_again(folders, tmp_path):
    import pickle

    first = accelerate_trainer(build("SFT", folders["llama"], tmp_path))
    trainer = build("SFT", folders["llama"], tmp_path)
    loaded = pickle.loads(pickle.dumps(first.model))
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": str(tmp_path)}
    second = trl.SFTTrainer(
        loaded, args=trl.SFTConfig(**options), train_dataset=trainer.train_dataset, processing_class=trainer.processing_class
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = float(trainer.compute_loss(trainer.model, dict(inputs)))
    accelerate_trainer(second)
    assert loaded.__dict__[MARK][-1].ours == loaded.forward
    assert float(second.compute_loss(loaded, dict(inputs))) == pytest.approx(expected, abs=1e-5)
