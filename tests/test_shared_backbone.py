"""--share_backbone: adapters on one set of weights compute, learn and are saved as models of their own."""

import itertools
import json
import logging
from dataclasses import replace

import pytest
import torch
from online_runs import assert_resumes_to_the_bit, online_arguments, write_task
from preference_runs import rows_of
from safetensors.torch import load_file
from tiny_models import write_arithmetic_model
from transformers import AutoModelForSequenceClassification

from fastalign.generation import Engine, SamplingParams
from fastalign.judges import RewardModel
from fastalign.models.adapters import load_adapter, reference_disabled
from fastalign.models.attention import disable_dropout
from fastalign.models.backbone import hidden_states
from fastalign.models.load import load_causal_lm, load_tokenizer
from fastalign.models.reward import load_reward_model, score_head, scores_at
from fastalign.models.shared import attach_scores, begin_scores, same_model, weights_bytes, why_apart
from fastalign.models.switching import current_adapter, parameters_of, using_adapter
from fastalign.packing import group, pack
from fastalign.recipes import model_rewards, online, ppo, reward
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OnlineArguments,
    OptimArguments,
    PPOArguments,
    RewardArguments,
    RunArguments,
    SamplingArguments,
)
from fastalign.recipes.setup import Loaded, build_updater
from fastalign.recipes.sharing import load_policy
from fastalign.training.step import score

peft = pytest.importorskip("peft")
PACKED = pack(group([3, 5, 7, 9], [[4, 6], [8, 10, 11]]))
LORA = {"use_peft": True, "lora_r": 3}


def stir(parameters, seed):
    """Moves an adapter away from where it does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def train_reward(task, base, output):
    rows = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a)} for a in range(1, 9)]
    (task / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"model_name_or_path": str(base), "dtype": "float32", "device": "cpu", "use_peft": True, "lora_r": 2}
    reward.run(
        Arguments(
            command="reward",
            model=ModelArguments(**model),
            data=DataArguments(dataset_name=str(task / "pairs.jsonl"), max_length=32),
            optim=OptimArguments(learning_rate=3e-2, max_steps=3, lr_scheduler_type="constant"),
            batch=BatchArguments(per_device_train_batch_size=8),
            run=RunArguments(output_dir=str(output)),
            reward=RewardArguments(),
        )
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A tiny policy with prompts, a reward model and a critic that are adapters of it, and a reward model of another base."""
    root = write_task(tmp_path_factory.mktemp("shared"), "")
    train_reward(root, root / "model", root / "rm")
    policy = load_policy(arguments(root, root / "unused"))
    tokenizer = load_tokenizer(str(root / "model"))
    critic = begin_scores(policy.model, "critic", tokenizer)
    stir(critic.parameters(), 5)
    (root / "critic").mkdir()
    critic.save_pretrained(root / "critic")
    tokenizer.save_pretrained(root / "critic")
    stir(parameters_of(policy.model, "default"), 6)
    policy.model.save_pretrained(root / "sft", selected_adapters=["default"])
    tokenizer.save_pretrained(root / "sft")
    return root


def arguments(task, output, **changes) -> Arguments:
    given = OnlineArguments(num_generations=2, reward=[str(task / "rm")], share_backbone=True)
    sections = {"sampling": SamplingArguments(max_completion_length=5), "ppo": PPOArguments(critic_warmup=0)}
    changes["model"] = LORA | changes.get("model", {})
    return online_arguments(task, output, changes, command="ppo", online=given, **sections)


def together(task, **model):
    """Policy, critic and reward model on one backbone."""
    policy = load_policy(arguments(task, task / "unused", model=model)).model
    peft.set_peft_model_state_dict(policy.eval(), load_file(task / "sft" / "adapter_model.safetensors"))
    tokenizer = load_tokenizer(str(task / "model"))
    critic = attach_scores(policy, "critic", str(task / "critic"), tokenizer, trainable=True)
    return policy, critic, attach_scores(policy, "reward_0", str(task / "rm"), load_tokenizer(str(task / "rm")))


def apart(task, dtype="float32"):
    """The same from the same files, each with weights of its own."""
    base = str(task / "model")
    policy = load_adapter(load_causal_lm(base, dtype=dtype), str(task / "sft"), trainable=True).eval()
    return policy, load_causal_lm(base, dtype=dtype), *(scorer(task, task / name, dtype) for name in ("critic", "rm"))


def scorer(task, folder, dtype="float32"):
    """A reward model's adapter on a classifier of its own, not merged."""
    tokenizer = load_tokenizer(str(folder))
    model = load_reward_model(str(task / "model"), tokenizer, dtype=dtype, start=True)
    model = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    disable_dropout(model)
    score_head(model).weight.data = load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"]  # fp32 as ours
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_order_of_calls_gives_what_separate_models_give(task, dtype):
    policy, critic, judge = together(task, dtype=dtype)
    own_policy, own_reference, own_critic, own_judge = apart(task, dtype)

    def reference():
        with reference_disabled(policy):
            return score(policy, PACKED)

    rows = torch.arange(len(PACKED.input_ids))
    calls = {
        "policy": lambda: score(policy, PACKED),
        "reference": reference,
        "critic": lambda: scores_at(critic, PACKED, rows).detach(),
        "judge": lambda: scores_at(judge, PACKED, rows).detach(),
    }
    expected = {
        "policy": score(own_policy, PACKED),
        "reference": score(own_reference, PACKED),
        "critic": scores_at(own_critic, PACKED, rows).detach(),
        "judge": scores_at(own_judge, PACKED, rows).detach(),
    }
    assert min((expected["policy"] - expected["reference"]).abs().max(), (expected["critic"] - expected["judge"]).abs().max()) > 1e-2
    for order in itertools.permutations(calls):
        for name in order:
            assert torch.equal(calls[name](), expected[name]), (order, name)
            assert current_adapter(policy) == "default"
    merged = load_reward_model(str(task / "rm"), load_tokenizer(str(task / "rm")), dtype=dtype)
    torch.testing.assert_close(calls["judge"](), scores_at(merged, PACKED, rows).detach(), atol=1e-5 if dtype == "float32" else 0.2, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_separate_models_however_calls_interleave(task, checkpointing):
    policy, critic, judge = together(task, gradient_checkpointing=checkpointing)
    own_policy, _, own_critic, _ = apart(task)
    rows = torch.arange(len(PACKED.input_ids))
    wave = torch.cos(rows.float())

    def loss_of(model):
        return (hidden_states(model, PACKED) * wave[:, None]).square().sum()

    loss_of(own_policy).backward()
    (scores_at(own_critic, PACKED, rows) * wave).square().sum().backward()
    policy.train()
    trained = [id(p) for p in policy.parameters() if p.requires_grad]
    assert len(trained) == len(parameters_of(policy, "default")) + len(parameters_of(policy, "critic"))
    policy_loss = loss_of(policy)
    with reference_disabled(policy):
        score(policy, PACKED)
    values = scores_at(critic, PACKED, rows)
    scores_at(judge, PACKED, rows)
    with pytest.raises(RuntimeError, match="broken"), using_adapter(policy, "reward_0"):
        raise RuntimeError("broken")
    with using_adapter(policy, "reward_0"):  # whatever computes meanwhile, both must recompute with their own
        (values * wave).square().sum().backward()
        policy_loss.backward()
    assert [id(p) for p in policy.parameters() if p.requires_grad] == trained
    for ours, theirs in ((parameters_of(policy, "default"), own_policy), (list(critic.parameters()), own_critic)):
        expected = [p for p in theirs.parameters() if p.requires_grad]
        assert len(ours) == len(expected)
        for mine, other in zip(ours, expected, strict=True):
            assert other.grad.norm() > 0
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in judge.parameters())


def test_each_optimizer_has_its_own_adapter(task):
    """Both models require gradients; neither's step may move, decay or count the other's."""
    policy, critic, _ = together(task)
    args = arguments(task, task / "unused")
    updaters = [build_updater(Loaded(model, None, torch.device("cpu")), args, 4) for model in (policy, critic)]
    for updater, own in zip(updaters, (parameters_of(policy, "default"), list(critic.parameters())), strict=True):
        held = [p for options in updater.optimizer.param_groups for p in options["params"]]
        assert [id(p) for p in held] == [id(p) for p in updater.gradients.parameters] == [id(p) for p in own]


def test_the_base_is_in_memory_once(task):
    policy, critic, judge = together(task)
    own = apart(task)
    base = weights_bytes([load_causal_lm(str(task / "model"))])
    adapters = sum(p.numel() * 4 for each in (parameters_of(policy, "default"), critic.parameters(), judge.parameters()) for p in each)
    assert weights_bytes([policy, critic, judge]) == base + adapters
    assert weights_bytes(own) >= 4 * base
    pointers = {p.data_ptr() for p in policy.get_base_model().parameters()}
    assert {p.data_ptr() for p in (*critic.get_base_model().parameters(), *judge.get_base_model().parameters())} == pointers
    assert not any(p.requires_grad for p in judge.parameters())


def test_the_engine_samples_the_policy_between_the_others(task):
    policy, critic, judge = together(task)
    engine, params = Engine(policy), SamplingParams(n=4, max_tokens=6, seed=3, logprobs=True)
    first = engine.rollout([[3, 5, 7]], params)
    scores_at(critic, PACKED, torch.tensor([2])).sum().backward()
    stir(critic.parameters(), 9)
    scores_at(judge, PACKED, torch.tensor([2]))
    again = engine.rollout([[3, 5, 7]], params)
    assert [(s.ids, s.logprobs) for s in again.flat] == [(s.ids, s.logprobs) for s in first.flat]
    stir(parameters_of(policy, "default"), 10)
    moved = engine.rollout([[3, 5, 7]], params)
    assert [s.logprobs for s in moved.flat] != [s.logprobs for s in first.flat]
    seen = torch.tensor([x for s in moved.flat for x in s.logprobs])
    torch.testing.assert_close(score(policy, pack(moved.trees())), seen, atol=1e-5, rtol=0)


def close(ours, theirs, left_out=("memory/",)):
    """Rows of metrics, equal to 1e-5."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {n for n in one if n.startswith(left_out)}:
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), name


def test_a_run_is_that_of_separate_models(task, tmp_path, monkeypatch):
    changes = {
        "ppo": {"critic_model_name_or_path": str(task / "critic"), "critic_learning_rate": 5e-3},
        "online": {"num_iterations": 2},
        "optim": {"max_steps": 3},
    }
    ppo.run(arguments(task, tmp_path / "one", **changes))

    def own(args, loaded):
        return scorer(task, task / "critic"), load_tokenizer(str(task / "critic"))

    def judge(policy, name, adapter):
        return RewardModel(scorer(task, task / "rm"), load_tokenizer(name), policy.tokenizer)

    monkeypatch.setattr(ppo, "own_critic", own)
    monkeypatch.setattr(model_rewards, "reward_model", judge)  # not merged: AdamW's first steps make a rounding as large as a gradient
    changes["online"]["share_backbone"] = False
    ppo.run(arguments(task, tmp_path / "many", **changes))
    rows, theirs = rows_of(tmp_path / "one"), rows_of(tmp_path / "many")
    close(rows, theirs)
    assert rows[-1]["objective/kl"] != 0
    assert rows[0]["loss/value_avg"] != rows[-1]["loss/value_avg"]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-5
    assert rows[0]["memory/weights_mb"] < 0.6 * theirs[0]["memory/weights_mb"]
    for folder in (".", "critic"):
        one, many = (load_file(tmp_path / run / folder / "adapter_model.safetensors") for run in ("one", "many"))
        start = load_file(task / "critic" / "adapter_model.safetensors")
        assert one.keys() == many.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, many[name], atol=1e-5, rtol=1e-4)
        assert folder == "." or any(not torch.equal(value, start[name]) for name, value in one.items())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_fresh_critic_learns_and_loads_in_peft(task, tmp_path, method):
    model = {"gradient_checkpointing": True, "peft_method": method}
    ppo.run(arguments(task, tmp_path, optim={"max_steps": 2, "learning_rate": 1e-2}, model=model))
    assert all(row["grad_norm"] > 0 for row in rows_of(tmp_path))
    theirs = load_file(task / "rm" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "critic" / "adapter_model.safetensors")
    assert {name for name in ours if "magnitude" not in name} == theirs.keys()
    assert any(value.abs().max() > 0 for name, value in ours.items() if "lora_B" in name)
    policy = load_policy(arguments(task, tmp_path)).model
    for name, folder in (("critic", tmp_path / "critic"), ("reward_0", task / "rm")):
        plain = AutoModelForSequenceClassification.from_pretrained(task / "model", num_labels=1, pad_token_id=0)
        plain = peft.PeftModel.from_pretrained(plain, folder).eval()
        ours = attach_scores(policy, name, str(folder), load_tokenizer(str(folder)))
        with torch.no_grad():
            expected = plain(torch.tensor([[3, 5, 7, 9]])).logits.flatten()
            found = scores_at(ours, pack(group([3, 5, 7, 9], [[4]])), torch.tensor([3]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    saved = load_adapter(load_causal_lm(str(task / "model")), str(tmp_path))
    assert list(saved.peft_config) == ["default"]
    assert not (tmp_path / "reward_0").exists()


def test_resume_continues_to_the_bit(task, tmp_path):
    args = arguments(task, tmp_path, run={"save_steps": 2}, online={"algorithm": "ppo_max"}, ppo={"critic_warmup": 1})
    assert_resumes_to_the_bit(ppo.run, args, tmp_path, (".", "critic"), weights="adapter_model.safetensors")


def test_a_policy_that_is_an_adapter_goes_on_from_it_and_its_beginning_is_the_reference(task, tmp_path):
    args = arguments(task, tmp_path, model={"model_name_or_path": str(task / "sft")}, online={"beta": 0.1}, optim={"max_steps": 2})
    loaded = load_policy(args)
    own = load_adapter(load_causal_lm(str(task / "model")), str(task / "sft"))
    expected = score(own, PACKED)
    assert torch.equal(score(loaded.model, PACKED), expected)
    critic = begin_scores(loaded.model, "critic", load_tokenizer(str(task / "sft")))
    stir(parameters_of(loaded.model, "default"), 1)
    assert torch.equal(hidden_states(critic, PACKED), hidden_states(own, PACKED)), "it begins as the policy"
    assert not torch.allclose(score(loaded.model, PACKED), expected, atol=1e-2)
    with reference_disabled(loaded.model):
        assert torch.equal(score(loaded.model, PACKED), expected)
    ppo.run(args)
    rows = rows_of(tmp_path)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["objective/kl"] != 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert same_model(config["base_model_name_or_path"], str(task / "model"))


def test_grpo_shares_its_reward_model(task, tmp_path, caplog):
    args = arguments(task, tmp_path, optim={"max_steps": 2}, model={"merge_adapter": True, "gradient_checkpointing": True})
    loaded = load_policy(args)
    (named,) = model_rewards.with_reward_models([str(task / "rm")], loaded)
    judge = named.isolated.caller.function
    assert judge.model.get_base_model() is loaded.model.get_base_model()
    own = model_rewards.with_reward_models([str(task / "rm")], load_policy(arguments(task, tmp_path, online={"share_backbone": False})))
    prompts, answers = ["1+2=", "3+4="], ["3", "5"]
    assert judge(prompts, answers) == pytest.approx(own[0].isolated.caller.function(prompts, answers), abs=1e-5)
    given = replace(args.online, num_generations=4, beta=0.1)
    online.run(replace(args, command="grpo", online=given))
    assert rows_of(tmp_path)[-1]["kl"] > 0
    assert not hasattr(load_causal_lm(str(tmp_path)), "peft_config")
    assert not (tmp_path / "adapter_config.json").exists(), "merged: a plain model"
    assert "model of its own" not in caplog.text


def test_models_that_cannot_share_are_loaded_apart_with_a_word_why(task, tmp_path, caplog):
    write_arithmetic_model(tmp_path / "other", seed=3)
    train_reward(tmp_path, tmp_path / "other", tmp_path / "rm")
    load_reward_model(str(task / "rm"), tokenizer := load_tokenizer(str(task / "rm"))).save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    loaded = load_policy(arguments(task, tmp_path))
    with caplog.at_level(logging.WARNING, "fastalign"):
        found = model_rewards.with_reward_models([str(tmp_path / "rm"), str(tmp_path / "whole"), str(task / "rm")], loaded)
    assert f"{tmp_path / 'rm'} is loaded as a model of its own: its base is {tmp_path / 'other'}, and the policy's is" in caplog.text
    assert f"{tmp_path / 'whole'} is loaded as a model of its own: it is a whole model" in caplog.text
    whole, own = (each.isolated.caller.function for each in found[1:])
    assert whole(["1+2="], ["3"]) == pytest.approx(own(["1+2="], ["3"]), abs=1e-5)
    assert list(loaded.model.peft_config) == ["default", "reward_2"]
    args = arguments(task, tmp_path, ppo={"critic_model_name_or_path": str(tmp_path / "whole")})
    critic, _ = ppo.load_critic(args, loaded, 2, ppo.algorithm_of(args))
    assert "--critic_model_name_or_path" in caplog.text
    assert weights_bytes([critic.updater.model]) > weights_bytes([load_causal_lm(str(task / "model"))]) / 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"use_peft": False}, "--share_backbone: models that share weights are LoRA adapters, and the policy has none; give --use_peft"),
        ({"peft_method": "ia3"}, "--peft_method ia3 is none of them"),
    ],
)
def test_a_policy_without_lora_cannot_share(task, tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        ppo.run(arguments(task, tmp_path, model=model))


def test_a_policy_that_is_another_kind_of_adapter_is_refused(task, tmp_path):
    for config, message in (({"peft_type": "IA3", "base_model_name_or_path": "b"}, "is an adapter of IA3"), ({}, "names no base model")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load_policy(arguments(task, tmp_path, model={"model_name_or_path": str(tmp_path)}))


def test_an_adapter_that_does_not_fit_is_refused(task, tmp_path):
    write_arithmetic_model(tmp_path / "wide", hidden_size=64)
    policy = load_policy(arguments(task, tmp_path, model={"model_name_or_path": str(tmp_path / "wide")})).model
    assert "its base is" in why_apart(policy, str(task / "rm"))
    config = json.loads((task / "rm" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    assert "its adapter was begun by pissa, which changes the base's weights" in why_apart(policy, str(tmp_path))
    with pytest.raises(ValueError, match="the adapter does not fit"):
        attach_scores(policy, "reward_0", str(task / "rm"), load_tokenizer(str(task / "rm")))
    with pytest.raises(ValueError, match=r"has no base_model\.model\.score\.weight"):
        attach_scores(policy, "reward_1", str(task / "sft"), load_tokenizer(str(task / "sft")))
    with pytest.raises(ValueError, match="the model has no adapter 'critic'"), using_adapter(policy, "critic"):
        pass
