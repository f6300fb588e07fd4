"""A reward model as a reward: the same score as transformers gives, ids reused or text encoded anew, and grpo driven by it."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fastalign.judges import RewardModel
from fastalign.judges.reward_model import same_tokenizer
from fastalign.models.load import load_tokenizer
from fastalign.models.reward import score_trees
from fastalign.packing import Segment
from fastalign.recipes import arithmetic, model_rewards, online, reward
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OnlineArguments,
    OptimArguments,
    RewardArguments,
    RunArguments,
    SamplingArguments,
)
from fastalign.rewards import load_rewards

CHATML = "{% for m in messages %}<s>{{ m['content'] }}</s>={% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same characters under other ids, and a digit pair as one token."""
    tokens = ["<pad>", "<s>", "</s>", "=", "+", "-", *"9876543210", "12"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("12|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>")


def write_reward_model(folder: Path, tokenizer, **config) -> str:
    torch.manual_seed(4)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, num_labels=1, initializer_range=0.2, **shape)
    for name, value in config.items():
        setattr(own, name, value)
    LlamaForSequenceClassification(own).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain_score(folder: str, ids: list[int], at: int = -1) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, at, 0])


def test_scores_are_those_of_transformers_and_ids_are_reused(tmp_path):
    policy = arithmetic.build_tokenizer()
    folder = write_reward_model(tmp_path / "rm", policy)
    judge = RewardModel.load(folder, load_tokenizer(folder))
    assert judge.reuses_ids
    prompts, texts = ["1+2=", "7+2=", "1+2="], ["3", "9", "45"]
    begin = [policy(prompt).input_ids for prompt in prompts]
    ids = [[*policy(text, add_special_tokens=False).input_ids, policy.eos_token_id] for text in texts]
    expected = [plain_score(folder, [*b, *i]) for b, i in zip(begin, ids, strict=True)]
    assert max(expected) - min(expected) > 0.01
    assert judge(prompts, texts, ids) == pytest.approx(expected, abs=1e-5)
    assert judge(prompts, texts) == pytest.approx(expected, abs=1e-5)
    cut = [ids[0][:-1]]  # a completion that ran out of tokens is not closed
    assert judge(prompts[:1], texts[:1], cut) == pytest.approx([plain_score(folder, [*begin[0], *cut[0]])], abs=1e-5)


def test_another_tokenizer_encodes_the_text_anew(tmp_path):
    policy, own = arithmetic.build_tokenizer(), other_tokenizer()
    assert not same_tokenizer(policy, own)
    folder = write_reward_model(tmp_path / "rm", own)
    judge = RewardModel.load(folder, policy)
    assert not judge.reuses_ids
    text = "12"
    ids = policy(text, add_special_tokens=False).input_ids
    closed, cut = judge(["9+3="] * 2, [text] * 2, [[*ids, policy.eos_token_id], ids])
    begin = own("9+3=").input_ids
    assert closed == pytest.approx(plain_score(folder, [*begin, 16, own.eos_token_id]), abs=1e-5)
    assert cut == pytest.approx(plain_score(folder, [*begin, 16]), abs=1e-5)


def test_conversations_are_read_as_the_template_closes_them(tmp_path):
    policy = arithmetic.build_tokenizer()
    policy.chat_template = CHATML
    folder = write_reward_model(tmp_path / "rm", policy)
    prompt = [{"role": "user", "content": "1+2="}]
    whole = policy("<s>1+2=</s>=<s>3</s>=", add_special_tokens=False).input_ids
    expected = pytest.approx([plain_score(folder, whole)], abs=1e-5)
    ids = [*policy("3", add_special_tokens=False).input_ids, policy.eos_token_id]
    answer = [{"role": "assistant", "content": "3"}]
    assert RewardModel.load(folder, load_tokenizer(folder))([prompt], [answer], [ids]) == expected
    assert RewardModel.load(folder)([prompt], [answer]) == expected


@pytest.mark.parametrize("aggregation", ["product", "min", "last", "sum"])
def test_a_model_of_steps_aggregates_their_probabilities(tmp_path, aggregation):
    tokenizer = arithmetic.build_tokenizer()
    folder = write_reward_model(tmp_path / "prm", tokenizer, step_separator="=", step_aggregation=aggregation)
    judge = RewardModel.load(folder, tokenizer)
    text = "1+2=3+3=6"
    whole = tokenizer("7+1=" + text + "=").input_ids
    at = [i for i, token in enumerate(whole) if token == tokenizer.convert_tokens_to_ids("=")][1:]
    p = torch.sigmoid(torch.tensor([plain_score(folder, whole, i) for i in at], dtype=torch.float64))
    expected = {"product": p.prod(), "min": p.min(), "last": p[-1], "sum": p.sum()}[aggregation]
    nothing, got = judge(["7+1="] * 2, ["=", text])
    assert nothing is None
    assert got == pytest.approx(float(expected), abs=1e-5)


def test_an_adapter_of_a_model_of_steps_is_read_as_one(tmp_path):
    pytest.importorskip("peft")
    tokenizer = arithmetic.build_tokenizer()
    arithmetic.build_model(0, len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "steps.jsonl").write_text(json.dumps({"prompt": "7+1=", "completions": ["1+2", "3"], "labels": [1, 0]}) + "\n")
    args = Arguments(
        command="reward",
        model=ModelArguments(model_name_or_path=str(tmp_path / "base"), dtype="float32", device="cpu", use_peft=True, lora_r=2),
        data=DataArguments(dataset_name=str(tmp_path / "steps.jsonl"), max_length=48),
        optim=OptimArguments(learning_rate=1e-2, max_steps=3),
        batch=BatchArguments(per_device_train_batch_size=1),
        run=RunArguments(output_dir=str(tmp_path / "out")),
        reward=RewardArguments(loss="process", step_separator="=", step_aggregation="min"),
    )
    reward.run(args)
    judge = RewardModel.load(str(tmp_path / "out"))
    assert (judge.separator, judge.aggregation) == ("=", "min")
    (score,) = judge(["7+1="], ["1+2=3="])
    ids = tokenizer("7+1=1+2=3=").input_ids
    (scores,) = score_trees(judge.model, [Segment(ids)], [[(0, len(ids) - 3), (0, len(ids) - 1)]])
    assert score == pytest.approx(float(torch.sigmoid(scores).min()), abs=1e-6)
    assert 0 < score < 1


def test_a_completion_longer_than_the_model_has_no_reward(tmp_path, caplog):
    tokenizer = arithmetic.build_tokenizer()
    judge = RewardModel.load(write_reward_model(tmp_path / "rm", tokenizer), tokenizer)
    long, short = judge(["1+2="] * 2, ["1" * 70, "1"])
    assert long is None
    assert short is not None
    assert "at most 64 tokens" in caplog.text


def test_grpo_is_driven_by_a_reward_model(tmp_path):
    tokenizer = arithmetic.build_tokenizer()
    arithmetic.build_model(0, len(tokenizer)).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    folder = write_reward_model(tmp_path / "rm", tokenizer)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(8)))
    args = Arguments(
        command="grpo",
        model=ModelArguments(model_name_or_path=str(tmp_path / "policy"), dtype="float32", device="cpu"),
        data=DataArguments(dataset_name=str(tmp_path / "train.jsonl"), max_length=48),
        optim=OptimArguments(learning_rate=1e-3, max_steps=3, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=16),
        run=RunArguments(output_dir=str(tmp_path / "out")),
        sampling=SamplingArguments(max_completion_length=6),
        online=OnlineArguments(num_generations=4, reward=[folder]),
    )
    online.run(args)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "rewards/rm/mean" in row]) == 3
    assert all(row["rewards/rm/std"] > 0 for row in rows if "rewards/rm/mean" in row)
    sample = json.loads((tmp_path / "out" / "samples.json").read_text())[0]
    judge = RewardModel.load(folder, tokenizer)
    ids = tokenizer(sample["before"], add_special_tokens=False).input_ids
    finished = len(ids) < 6
    (expected,) = judge(["0+0="], [sample["before"]], [[*ids, tokenizer.eos_token_id] if finished else ids])
    assert sample["reward before"] == pytest.approx(expected, abs=1e-4)


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path):
    tokenizer = arithmetic.build_tokenizer()
    arithmetic.build_model(0, len(tokenizer)).save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="expected the folder of a reward model"):
        model_rewards.with_reward_models([str(tmp_path / "policy")], None)
    assert model_rewards.with_reward_models(["math", "module:function", "path/file.py:function"], None) == [
        "math", "module:function", "path/file.py:function",
    ]  # fmt: skip


def test_equal_names_are_told_apart(tmp_path):
    from fastalign.rewards import Reward
    from fastalign.rewards.callers import InProcess
    from fastalign.rewards.isolation import IsolatedReward

    def three(completions):
        return [3.0 for _ in completions]

    reward = Reward("rm", IsolatedReward("rm", InProcess(three)))
    with load_rewards([reward, reward]) as rewards:
        assert rewards.names == ["rm", "rm_2"]
        assert rewards.score(["p"], ["c"]) == {"rm": [3.0], "rm_2": [3.0]}
