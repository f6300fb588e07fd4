"""fastalign inside transformers and TRL: the same losses, gradients and metrics as theirs, on tiny random models."""

import copy
import math
import pickle
from types import MethodType

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

import fastalign as fa
from fastalign.models.attention import UnsupportedModelError

SMALL = tiny_models.SMALL


def granite():
    torch.manual_seed(3)
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0, residual_multiplier=0.5))


def cohere():
    torch.manual_seed(4)
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))


MODELS = {
    "untied": tiny_models.llama,
    "tied": lambda: tiny_models.llama(tie_word_embeddings=True),
    "gemma2": tiny_models.gemma2,
    "granite": granite,
    "cohere": cohere,
}


def batch(rows=3, length=17, scored=0.6):
    ids = torch.randint(3, SMALL["vocab_size"], (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length - 5 :] = 0
    labels = torch.where((torch.rand(rows, length) < scored) & (mask == 1), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, inputs, **kwargs):
    model.zero_grad()
    out = model(**inputs, **kwargs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=1e-5):
    (out, grads), (expected, expected_grads) = ours, theirs
    torch.testing.assert_close(out.loss, expected.loss, atol=tolerance, rtol=tolerance)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("count", [None, 11, torch.tensor(29)])
def test_patch_has_the_models_own_loss(backend, family, count):
    model, inputs = MODELS[family](), batch()
    kwargs = {} if count is None else {"num_items_in_batch": count}
    theirs = loss_and_gradients(model, inputs, **kwargs)
    assert fa.patch(model) is model
    ours = loss_and_gradients(model, inputs, **kwargs)
    assert_same(ours, theirs)
    assert ours[0].logits is None
    log_p = theirs[0].logits[:, :-1].float().log_softmax(-1).detach()
    mask = inputs["labels"][:, 1:] != -100
    entropy = torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0.0)
    torch.testing.assert_close(ours[0].entropy, entropy, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours[0].correct.bool(), mask & (log_p.argmax(-1) == inputs["labels"][:, 1:]))
    assert not ours[0].log_probs.requires_grad


def test_patch_leaves_everything_else_alone(tmp_path):
    """Without labels the logits are the model's own; generation, saving and other instances of the class do not notice."""
    model, inputs = tiny_models.llama().eval(), batch()
    other = copy.deepcopy(model)
    forward = type(model).forward
    ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected, generated = model(**ids).logits, model.generate(inputs["input_ids"][1:], max_new_tokens=5, do_sample=False)
    fa.patch(model)
    assert torch.equal(model(**ids).logits, expected)
    assert torch.equal(model.generate(inputs["input_ids"][1:], max_new_tokens=5, do_sample=False), generated)
    assert type(model).forward is forward
    assert other(**inputs).logits is not None
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**ids).logits, expected)


def test_patch_twice_and_back():
    model, inputs = tiny_models.llama(), batch()
    expected = loss_and_gradients(model, inputs)
    fa.patch(fa.patch(model))
    assert model(**inputs).logits is None
    fa.unpatch(model)
    assert "forward" not in model.__dict__
    assert_same(loss_and_gradients(model, inputs), expected, 0.0)
    assert model(**inputs).logits is not None
    fa.unpatch(model)
    fa.patch(model)
    assert model(**inputs).logits is None


def test_patch_below_another_librarys_wrapper():
    """accelerate wraps the forward of a prepared model; unpatching below it must not remove the wrapper."""
    model, inputs = fa.patch(tiny_models.llama()), batch()
    inner, calls = model.forward, []
    model.forward = lambda *a, **k: calls.append(1) or inner(*a, **k)
    fa.unpatch(model)
    assert model(**inputs).logits is not None
    assert len(calls) == 1
    fa.patch(model)
    calls.clear()
    assert model(**inputs).logits is None
    assert not calls  # ours lies above now


def test_patch_of_a_copy_computes_with_the_copy():
    model, inputs = fa.patch(tiny_models.llama()), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    ours, theirs = twin(**inputs), fa.unpatch(twin)(**inputs)
    assert theirs.logits is not None
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    assert model(**inputs).logits is None


@pytest.mark.parametrize("count", [None, 7])
def test_patch_of_a_batch_without_labels_to_score(count):
    model, inputs = fa.patch(tiny_models.llama()), batch(scored=0.0)
    out, grads = loss_and_gradients(model, inputs, **({} if count is None else {"num_items_in_batch": count}))
    assert float(out.loss) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in grads.values())
    assert len(grads) == len(list(model.parameters()))


def test_patch_has_no_loss_to_average_where_an_evaluation_scores_nothing():
    """A Trainer leaves NaN out of its mean; a 0 would lower it."""
    model = fa.patch(tiny_models.llama())
    with torch.no_grad():
        assert math.isnan(model(**batch(scored=0.0)).loss.item())
        assert model(**batch(scored=0.0), num_items_in_batch=7).loss.item() == 0.0


def test_patch_reads_other_ways_to_call():
    """Positional labels, shifted labels, another ignore index, a tuple."""
    model, inputs = tiny_models.llama(), batch()
    expected = float(model(**inputs).loss)
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    marked = torch.where(inputs["labels"] == -100, -1, inputs["labels"])
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    fa.patch(model)
    assert float(model(ids["input_ids"], ids["attention_mask"], None, None, None, inputs["labels"]).loss) == pytest.approx(
        expected, abs=1e-5
    )
    assert float(model(**ids, labels=inputs["labels"], shift_labels=shifted).loss) == pytest.approx(expected, abs=1e-5)
    assert float(model(**ids, labels=marked, ignore_index=-1).loss) == pytest.approx(expected, abs=1e-5)
    assert float(model(**inputs, return_dict=False)[0]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**inputs, logits_to_keep=1)


def test_patch_under_peft_and_gradient_checkpointing():
    peft = pytest.importorskip("peft")
    inputs = batch()
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny_models.llama(), peft.LoraConfig(**config))
    expected = loss_and_gradients(model, inputs)
    fa.patch(model)
    assert_same(loss_and_gradients(model, inputs), expected)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    assert_same(loss_and_gradients(model, inputs), expected)
    with model.disable_adapter():
        assert float(model(**inputs).loss) == pytest.approx(float(tiny_models.llama()(**inputs).loss), abs=1e-5)


def test_patch_reads_the_trained_copy_of_the_head():
    """PEFT's modules_to_save: the copy while the adapter is on, the original while it is off."""
    peft = pytest.importorskip("peft")
    inputs = batch()
    model = peft.get_peft_model(
        tiny_models.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    expected = loss_and_gradients(model, inputs)
    with model.disable_adapter():
        base = float(model(**inputs).loss)
    fa.patch(model)
    assert_same(loss_and_gradients(model, inputs), expected)
    with model.disable_adapter():
        assert float(model(**inputs).loss) == pytest.approx(base, abs=1e-5)
    assert abs(base - float(expected[0].loss)) > 1e-2


def test_patch_refuses_what_it_cannot_reproduce(monkeypatch):
    model = tiny_models.llama()
    monkeypatch.setattr(model, "loss_function", lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean())
    with pytest.raises(UnsupportedModelError, match="not known here"):
        fa.patch(model)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        fa.patch(torch.nn.Linear(2, 2))


def test_patch_under_autocast():
    model, inputs = tiny_models.llama(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).loss
        got = fa.patch(model)(**inputs).loss
    assert float(got) == pytest.approx(float(expected), abs=2e-2)


def test_patch_of_a_bf16_model():
    """No further from the fp32 loss than the model's own bf16 loss."""
    inputs = batch()
    exact = tiny_models.llama()(**inputs).loss.item()
    model = tiny_models.llama().bfloat16()
    theirs = model(**inputs).loss.item()
    ours = loss_and_gradients(fa.patch(model), inputs)[0].loss
    assert ours.dtype == torch.float32
    assert abs(ours.item() - exact) <= abs(theirs - exact) + 5e-3


class Steps(torch.utils.data.Dataset):
    """Records of different lengths and numbers of scored tokens: only a global normalization gets accumulation right."""

    def __init__(self):
        generator = torch.Generator().manual_seed(9)
        self.rows = []
        for i in range(24):
            ids = torch.randint(3, SMALL["vocab_size"], (12,), generator=generator)
            self.rows.append({"input_ids": ids, "labels": torch.where(torch.arange(12) < 10 - i % 9, -100, ids)})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trained_losses(tmp_path, model, **kwargs):
    from transformers import Trainer, TrainingArguments

    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 4}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-3, **options)
    trainer = Trainer(model, args, train_dataset=Steps(), eval_dataset=Steps(), **kwargs)
    trainer.train()
    found = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    return torch.tensor(found, dtype=torch.float64), trainer.evaluate()["eval_loss"]


def test_patch_under_the_trainer_with_gradient_accumulation(tmp_path):
    pytest.importorskip("accelerate")
    theirs, eval_loss = trained_losses(tmp_path, tiny_models.llama())
    ours, our_eval_loss = trained_losses(tmp_path, fa.patch(tiny_models.llama()))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert our_eval_loss == pytest.approx(eval_loss, abs=1e-5)


def test_patch_gives_compute_metrics_the_token_numbers(tmp_path):
    """There are no logits to hand over in evaluation: predictions are (log_probs, entropy, correct)."""
    pytest.importorskip("accelerate")
    seen = []

    def compute_metrics(predictions):
        seen.append([p.shape for p in predictions.predictions])
        return {}

    trained_losses(tmp_path, fa.patch(tiny_models.llama()), compute_metrics=compute_metrics)
    assert seen == [[(24, 11)] * 3]


def test_patch_of_a_model_that_was_pickled():
    """pickle finds a method by its name, the class's forward: the model is whole, and patching it works."""
    model, inputs = fa.patch(tiny_models.llama()), batch()
    loaded = pickle.loads(pickle.dumps(model))
    expected = loaded(**inputs)
    assert expected.logits is not None
    again = fa.patch(loaded)(**inputs)
    assert again.logits is None
    assert float(again.loss) == pytest.approx(float(expected.loss), abs=1e-5)
    assert fa.unpatch(loaded)(**inputs).logits is not None


def test_patch_of_a_model_that_accelerate_unwrapped():
    """Unwrapping goes down to the innermost forward: what was patched must be patchable again, above it."""
    pytest.importorskip("accelerate")
    from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

    model, inputs = fa.patch(tiny_models.llama()), batch()
    model._original_forward = model.forward  # what accelerate's prepare does in mixed precision
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    assert fa.patch(model)(**inputs).logits is None
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert model(**inputs).logits is not None
    assert fa.patch(model)(**inputs).logits is None


@pytest.mark.parametrize("shape", [(3, 18), (2, 17), (1, 17), (17,)])
def test_patch_names_labels_of_a_wrong_shape(shape):
    model, inputs = fa.patch(tiny_models.llama()), batch()
    for name in ("labels", "shift_labels"):
        with pytest.raises(ValueError, match=rf"{name}: expected \[3, 17\], .* got \[{', '.join(map(str, shape))}\]"):
            model(inputs["input_ids"], **{name: torch.ones(shape, dtype=torch.long)})


def test_patch_names_what_is_no_causal_lm():
    from transformers import LlamaModel

    with pytest.raises(UnsupportedModelError, match="LlamaModel has no head over the vocabulary; load it as AutoModelForCausalLM"):
        fa.patch(LlamaModel(tiny_models.llama().config))
    peft = pytest.importorskip("peft")
    on_the_head = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match=r"got peft\.tuners\..*Linear; keep adapters off the head"):
        fa.patch(peft.get_peft_model(tiny_models.llama(), on_the_head))
    with pytest.raises(TypeError, match="got DataParallel; give the model inside"):
        fa.patch(torch.nn.DataParallel(tiny_models.llama()))
    with pytest.raises(TypeError, match="got OptimizedModule; give the model inside"):
        fa.patch(torch.compile(tiny_models.llama(), backend="eager"))
