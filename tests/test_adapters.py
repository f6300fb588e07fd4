"""Adapters: the papers' equations, the reference, what is saved, and the runs that train them."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_models import llama, prompts_of, qwen2, ready
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastalign import catalogue
from fastalign.models.adapters import ADAPTERS, AdapterOptions, attach_adapter, load_adapter, merged, reference_disabled
from fastalign.models.backbone import head_of, hidden_states
from fastalign.models.load import load_causal_lm
from fastalign.packing import conversation, group, pack
from fastalign.recipes import arithmetic, online, sft
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OnlineArguments,
    OptimArguments,
    RunArguments,
    SamplingArguments,
)
from fastalign.recipes.setup import load
from fastalign.recipes.sft_task import micro_batches
from fastalign.training.optimizer import build_optimizer, build_schedule, parameter_groups
from fastalign.training.step import LogitOptions, Updater

pytest.importorskip("peft")
OPTIONS = AdapterOptions(r=3, alpha=6)
WHOLE = [method for method in ADAPTERS if method != "qlora"]  # tests/test_qlora.py has that one
PEFT_METHODS = [method for method in WHOLE if method != "bitfit"]
PACKED = pack(group(prompts_of(12)[0], prompts_of(4, 5)))


def stirred(method: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model with an adapter that does something."""
    adapted = attach_adapter(model, method, OPTIONS)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return adapted


@pytest.mark.parametrize("method", WHOLE)
def test_adapter_off_is_the_base_and_on_again_is_the_adapter(method):
    model = ready(qwen2())
    base = hidden_states(model, PACKED).detach()
    adapted = stirred(method, model)
    changed = hidden_states(adapted, PACKED).detach()
    assert not torch.allclose(changed, base, atol=1e-2)
    with reference_disabled(adapted):
        assert torch.equal(hidden_states(adapted, PACKED), base)
    assert torch.equal(hidden_states(adapted, PACKED), changed)


def test_bitfit_comes_back_from_an_error_in_the_reference():
    adapted = stirred("bitfit", ready(qwen2()))
    changed = hidden_states(adapted, PACKED).detach()
    with pytest.raises(RuntimeError, match="broken"), reference_disabled(adapted):
        raise RuntimeError("broken")
    assert torch.equal(hidden_states(adapted, PACKED), changed)


def folded(method: str, layer: torch.nn.Module) -> torch.Tensor:
    """The adapted layer's weight as its paper's equation gives it, float64."""
    weight = layer.get_base_layer().weight.double()
    if method == "ia3":
        scale = layer.ia3_l["default"].double()
        return weight * scale if layer.is_feedforward else weight * scale.reshape(-1, 1)
    low = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    new = weight + low * (6 / 3**0.5 if method == "rslora" else 6 / 3)
    if method == "dora":
        return layer.lora_magnitude_vector["default"].weight.double().reshape(-1, 1) * new / new.norm(dim=1, keepdim=True)
    return new


def folded_bias(method: str, layer: torch.nn.Module) -> torch.Tensor:
    """IA3 scales what the layer gives, bias included; the others leave the bias."""
    bias = layer.get_base_layer().bias.double()
    return bias * layer.ia3_l["default"].double().reshape(-1) if method == "ia3" and not layer.is_feedforward else bias


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_adapter_computes_its_papers_equation(method):
    model = ready(qwen2())
    plain = copy.deepcopy(model).double()
    adapted = stirred(method, model)
    layers = {name.removeprefix("base_model.model."): m for name, m in adapted.named_modules() if hasattr(m, "get_base_layer")}
    assert layers
    with torch.no_grad():
        for name, layer in layers.items():
            target = plain.get_submodule(name)
            target.weight.copy_(folded(method, layer))
            if target.bias is not None:
                target.bias.copy_(folded_bias(method, layer))
    expected = hidden_states(plain, PACKED)
    torch.testing.assert_close(hidden_states(adapted, PACKED).double(), expected, atol=2e-5, rtol=1e-4)
    export = merged(adapted)
    assert list(export.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(hidden_states(export, PACKED).double(), expected, atol=2e-5, rtol=1e-4)
    assert not hasattr(export, "peft_config")
    assert hasattr(adapted, "peft_config"), "merging made a copy"


@pytest.mark.parametrize("method", WHOLE)
def test_adapter_trains_and_leaves_the_head_without_a_gradient(method):
    """The frozen head's path: 4 T V H floating-point operations instead of 6, no buffer, no gradient."""
    model = attach_adapter(ready(qwen2()), method, OPTIONS)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = build_optimizer(model, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = build_schedule(optimizer, "constant", warmup_steps=0, max_steps=2)
    updater = Updater(model, optimizer, schedule, max_grad_norm=1.0, options=LogitOptions())
    batch = micro_batches([conversation(ids) for ids in prompts_of(30, 21)], 64)
    losses = [updater.update(batch).loss for _ in range(5)]
    assert losses[-1] < losses[0]
    head = head_of(model).weight
    assert not head.requires_grad
    assert head.grad is None
    assert not hasattr(head, "main_grad")
    assert sum(b.numel() for b in updater.gradients.buffers) == sum(p.numel() for p in trained.values())
    _, metrics = batch[0].forward_backward(model, LogitOptions())
    assert float(metrics["flops_tvh"]) == 4.0
    for name, parameter in model.named_parameters():
        before = trained.get(name)
        assert torch.equal(parameter, frozen[name]) if before is None else not torch.equal(parameter, before), name


def test_full_training_has_a_head_gradient():
    """What the test above would show if the head were trained."""
    model = ready(qwen2())
    batch = micro_batches([conversation(ids) for ids in prompts_of(30)], 64)
    _, metrics = batch[0].forward_backward(model, LogitOptions())
    assert float(metrics["flops_tvh"]) == 6.0
    assert head_of(model).weight.grad is not None


def test_catalogue_names_every_adapter():
    assert list(catalogue.ADAPTERS) == list(ADAPTERS)


def test_ia3_vectors_do_not_decay():
    groups = parameter_groups(attach_adapter(ready(llama()), "ia3"), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert {group["weight_decay"] for group in parameter_groups(attach_adapter(ready(llama()), "lora"), 0.1)} == {0.1}


def test_adapter_errors_name_the_remedy():
    with pytest.raises(ValueError, match="bitfit: llama has no biases to train; give lora or ia3"):
        attach_adapter(llama(), "bitfit")
    for method in ("prefix", "prompt_tuning"):
        with pytest.raises(ValueError, match=f"--peft_method {method}: its virtual tokens would come before every sequence"):
            attach_adapter(llama(), method)
    with pytest.raises(ValueError, match="attach_qlora: expected a model of load_causal_lm"):
        attach_adapter(llama(), "qlora")
    with pytest.raises(ValueError, match="unknown dorra; did you mean dora"):
        attach_adapter(llama(), "dorra")
    with pytest.raises(ValueError, match="keep adapters off the head"):
        attach_adapter(llama(), "ia3", AdapterOptions(target_modules=["lm_head"]))
    model = llama()
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(ValueError, match="no module of LlamaForCausalLM is called k_proj"):
        attach_adapter(model, "ia3")


# runs


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A Qwen2 (it has biases) with the arithmetic task."""
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = arithmetic.build_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.1, **sizes, **special))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    demonstrations, _, train = arithmetic.problems(0, demonstrations=24, heldout=4)
    arithmetic.write_jsonl(root / "sft.jsonl", demonstrations, ("prompt", "completion"))
    arithmetic.write_jsonl(root / "grpo.jsonl", train[:24], ("prompt", "answer"))
    (root / "reward.py").write_text("def parity(completions, **k):\n    return [float(len(c) % 2) for c in completions]\n")
    return root


def arguments(task, output, command, method, **changes) -> Arguments:
    args = Arguments(
        command=command,
        model=ModelArguments(model_name_or_path=str(task / "model"), dtype="float32", device="cpu", peft_method=method, lora_r=4),
        data=DataArguments(dataset_name=str(task / f"{command}.jsonl"), max_length=48),
        optim=OptimArguments(learning_rate=1e-2, max_steps=4, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=8),
        run=RunArguments(output_dir=str(output)),
        sampling=SamplingArguments(max_completion_length=5),
        online=OnlineArguments(num_generations=4, reward=[f"{task / 'reward.py'}:parity"], beta=0.04),
    )
    return replace(args, **{name: replace(getattr(args, name), **values) for name, values in changes.items()})


def rows_of(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    volatile = ("timing_s/", "tokens_per_second", "step_time", "peak_memory_mb")
    return [{k: v for k, v in row.items() if not k.startswith(volatile)} for row in rows]


@pytest.fixture(scope="module", params=["lora", "dora", "ia3", "bitfit"])
def trained(request, task, tmp_path_factory):
    """A method, its finished run of 4 steps, and the same run continued from step 2 with the adapter merged at the end."""
    method, root = request.param, tmp_path_factory.mktemp(request.param)
    args = arguments(task, root / "whole", "sft", method, run={"save_steps": 2})
    sft.run(args)
    shutil.copytree(root / "whole", root / "resumed")
    for stale in [*(root / "resumed").glob("*.safetensors"), root / "resumed/summary.json", *(root / "resumed").glob("adapter*")]:
        stale.unlink(missing_ok=True)
    resume = replace(args.run, output_dir=str(root / "resumed"), resume_from_checkpoint=str(root / "resumed/checkpoint-2"))
    sft.run(replace(args, run=resume, model=replace(args.model, merge_adapter=True)))
    return method, root


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([prompts_of(17)[0]]) % 12).logits


def test_adapter_resumes_to_the_bit(trained):
    method, root = trained
    assert rows_of(root / "resumed") == rows_of(root / "whole")
    name = "model.safetensors" if method == "bitfit" else "adapter_model.safetensors"
    final, again = (root / run / "checkpoint-4" / name for run in ("whole", "resumed"))
    assert again.read_bytes() == final.read_bytes()


def test_merge_adapter_writes_a_plain_model(trained):
    method, root = trained
    assert not list((root / "resumed").glob("adapter_*"))
    assert "fastalign" not in (root / "resumed/config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(root / "resumed")
    torch.testing.assert_close(logits_of(plain), logits_of(load_causal_lm(str(root / "whole"))), atol=1e-5, rtol=1e-5)
    assert (root / "resumed/checkpoint-4/adapter_config.json").exists() == (method != "bitfit"), "a checkpoint keeps the adapter"


def test_adapter_loads_in_peft_with_the_same_logits(task, trained):
    import peft

    method, root = trained
    plain = AutoModelForCausalLM.from_pretrained(task / "model")
    before = logits_of(plain)
    if method == "bitfit":
        assert not torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(root / "whole")), before, atol=1e-3)
        return
    assert not (root / "whole/config.json").exists()
    expected = logits_of(peft.PeftModel.from_pretrained(plain, root / "whole"))
    ours = load_adapter(load_causal_lm(str(task / "model")), str(root / "whole"))
    torch.testing.assert_close(logits_of(ours), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-3), "the adapter learned something"


@pytest.mark.parametrize("method", ["dora", "ia3", "bitfit"])
def test_sampler_and_trainer_agree_and_the_reference_is_the_base(task, tmp_path, method):
    online.run(arguments(task, tmp_path, "grpo", method, optim={"max_steps": 2}))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-5
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bit": True}, "--load_in_4bit: 4-bit weights are not trained; give --peft_method lora, rslora or dora"),
        ({"load_in_4bit": True, "peft_method": "ia3"}, "give --peft_method lora, rslora or dora"),
        ({"peft_method": "qlora", "merge_adapter": True}, "--merge_adapter: 4-bit weights would round the sum"),
    ],
)
def test_four_bits_are_for_the_lora_kinds(task, given, message):
    with pytest.raises(ValueError, match=message):
        load(ModelArguments(model_name_or_path=str(task / "model"), **given))


def test_four_bits_without_bitsandbytes_name_the_extra(task, monkeypatch):
    monkeypatch.setattr("fastalign.models.load.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install fastalign with its qlora extra"):
        load(ModelArguments(model_name_or_path=str(task / "model"), peft_method="qlora"))


def test_merge_without_an_adapter_is_an_error(task):
    with pytest.raises(ValueError, match="--merge_adapter: there is no adapter to merge; give --use_peft"):
        load(ModelArguments(model_name_or_path=str(task / "model"), merge_adapter=True))
