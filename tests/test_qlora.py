"""QLoRA: the base is bitsandbytes' NF4, the reference is that base, the adapter trains, is saved and loads on either base."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import write_arithmetic_model

from fastalign.models.adapters import AdapterOptions, attach_adapter, merged, reference_disabled
from fastalign.models.backbone import hidden_states
from fastalign.models.copies import ModelCopy
from fastalign.models.load import load_causal_lm
from fastalign.models.shared import weights_bytes
from fastalign.packing import group, pack
from fastalign.recipes import arithmetic, online, ppo, sft
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OnlineArguments,
    OptimArguments,
    PPOArguments,
    RunArguments,
    SamplingArguments,
)
from fastalign.recipes.setup import load

pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")
PACKED = pack(group([3, 5, 7, 9], [[4, 6], [8, 10, 11]]))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("qlora")
    write_arithmetic_model(root / "model", hidden_size=64, initializer_range=0.15)
    demonstrations, train = arithmetic.problems(0, demonstrations=24)
    arithmetic.write_jsonl(root / "sft.jsonl", demonstrations, ("prompt", "completion"))
    arithmetic.write_jsonl(root / "grpo.jsonl", train[:24], ("prompt", "answer"))
    (root / "reward.py").write_text("def parity(completions, **k):\n    return [float(len(c) % 2) for c in completions]\n")
    return root


def arguments(task, output, command, **model) -> Arguments:
    given = {"dtype": "float32", "device": "cpu", "peft_method": "qlora", "lora_r": 4} | model
    return Arguments(
        command=command,
        model=ModelArguments(model_name_or_path=str(task / "model"), **given),
        data=DataArguments(dataset_name=str(task / f"{command}.jsonl"), max_length=48),
        optim=OptimArguments(learning_rate=1e-2, max_steps=4, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=8),
        run=RunArguments(output_dir=str(output)),
        sampling=SamplingArguments(max_completion_length=5),
        online=OnlineArguments(num_generations=4, reward=[f"{task / 'reward.py'}:parity"], beta=0.04),
    )


def rows_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_base_is_the_quantized_weights_and_the_head_is_whole(task):
    model = load_causal_lm(str(task / "model"), dtype="float32", load_in_4bit=True)
    whole = load_causal_lm(str(task / "model"), dtype="float32")
    assert type(model.model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear4bit
    assert type(model.lm_head.weight) is torch.nn.Parameter
    with torch.no_grad():
        for layer, own in zip(whole.model.layers, model.model.layers, strict=True):
            for name, linear in layer.named_modules():
                if isinstance(linear, torch.nn.Linear):
                    held = own.get_submodule(name).weight
                    unpacked = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
                    assert 1e-3 < (unpacked - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()
                    linear.weight.copy_(unpacked)
    torch.testing.assert_close(hidden_states(model, PACKED).detach(), hidden_states(whole, PACKED).detach(), atol=1e-4, rtol=1e-4)


def test_a_forward_without_gradient_leaves_the_weights_as_they_are(task):
    """What training computes is the same before and after the model has sampled; on some CPUs bitsandbytes would pack its weights anew."""
    found = []
    for sampled in (False, True):
        model = load_causal_lm(str(task / "model"), dtype="float32", load_in_4bit=True)
        torch.manual_seed(0)
        adapted = attach_adapter(model, "qlora", AdapterOptions(r=3))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            if sampled:
                hidden_states(adapted.eval(), PACKED)
        hidden = hidden_states(adapted.train(), PACKED)
        hidden.sum().backward()
        found.append((hidden.detach(), torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None])))
    (hidden, gradient), (hidden_, gradient_) = found
    assert torch.equal(hidden, hidden_)
    assert torch.equal(gradient, gradient_)


def test_the_reference_is_the_quantized_base_and_only_the_adapter_trains(task):
    model = load_causal_lm(str(task / "model"), dtype="float32", load_in_4bit=True)
    base = hidden_states(model, PACKED).detach()
    adapted = attach_adapter(model, "qlora", AdapterOptions(r=3))
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name, _ in trained)
    with torch.no_grad():
        for _, parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    hidden = hidden_states(adapted, PACKED)
    hidden.sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for _, p in trained)
    assert (hidden - base).abs().max() > 1e-2
    with reference_disabled(adapted):
        assert torch.equal(hidden_states(adapted, PACKED).detach(), base)
    with pytest.raises(ValueError, match="4-bit weights would round the sum"):
        merged(adapted)


def test_a_run_trains_resumes_and_its_adapter_loads_on_the_whole_base(task, tmp_path):
    args = arguments(task, tmp_path / "whole", "sft")
    sft.run(replace(args, run=replace(args.run, save_steps=2)))
    rows = [row for row in rows_of(tmp_path / "whole") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    part = replace(args, run=replace(args.run, output_dir=str(tmp_path / "part"), save_steps=2), optim=replace(args.optim, max_steps=4))
    sft.run(replace(part, optim=replace(args.optim, max_steps=2)))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    sft.run(replace(part, run=replace(part.run, overwrite_output_dir=True, resume_from_checkpoint=checkpoint)))
    assert rows_of(tmp_path / "part")[-1]["loss"] == rows[-1]["loss"]
    plain = load_causal_lm(str(tmp_path / "whole"), dtype="float32")  # merged into the base's own weights
    assert type(plain.model.layers[0].mlp.up_proj.weight) is torch.nn.Parameter
    with pytest.raises(ValueError, match="is an adapter; merge it into its base"):
        load_causal_lm(str(tmp_path / "whole"), load_in_4bit=True)


@pytest.mark.parametrize("given", [{}, {"peft_method": "dora", "load_in_4bit": True}])
def test_grpo_samples_from_the_model_that_it_trains(task, tmp_path, given):
    args = arguments(task, tmp_path, "grpo", **given)
    online.run(replace(args, optim=replace(args.optim, max_steps=2)))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 0


def test_a_copy_that_samples_ahead_shares_the_quantized_base(task, tmp_path):
    args = arguments(task, tmp_path, "grpo")
    online.run(replace(args, optim=replace(args.optim, max_steps=2), online=replace(args.online, max_staleness=1)))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert [row["sampling/staleness"] for row in rows] == [0.0, 1.0]
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4, "the copy computes what the policy does"
    adapted = attach_adapter(load_causal_lm(str(task / "model"), dtype="float32", load_in_4bit=True), "qlora", AdapterOptions(r=3))
    copied = ModelCopy(adapted)
    pairs = list(zip(copied.model.parameters(), adapted.parameters(), strict=True))
    assert any(type(theirs) is bitsandbytes.nn.Params4bit for _, theirs in pairs)
    assert all((own is theirs) != theirs.requires_grad for own, theirs in pairs)


def test_a_critic_shares_the_quantized_base(task, tmp_path):
    args = arguments(task, tmp_path, "grpo")
    args = replace(args, command="ppo", online=replace(args.online, share_backbone=True), ppo=PPOArguments(critic_warmup=0))
    ppo.run(replace(args, optim=replace(args.optim, max_steps=2)))
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert all(row["grad_norm"] > 0 and row["loss/value_avg"] > 0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["memory/weights_mb"] < 2 * weights_bytes([load(args.model).model]) / 2**20
    assert (tmp_path / "critic" / "adapter_model.safetensors").is_file()
