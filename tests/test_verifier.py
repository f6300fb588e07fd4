"""The generative verifier: records for supervised training, p(Yes) against plain transformers, and a lesson it learns."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastalign.judges.verifier import QUESTION, Verifier, verifier_records
from fastalign.recipes import sft
from fastalign.recipes.arguments import Arguments, BatchArguments, DataArguments, ModelArguments, OptimArguments, RunArguments

TEMPLATE = "{question}={solution}?"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("verifier")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape)
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root


def test_judgements_become_supervised_records():
    judgements = [{"question": "1+1?", "solution": "2", "verdict": True}, {"question": "1+1?", "solution": "3", "verdict": 0}]
    right, wrong = verifier_records(judgements)
    assert right == {"prompt": QUESTION.format(question="1+1?", solution="2"), "completion": " Yes"}
    assert wrong["completion"] == " No"
    (chat, _) = verifier_records(judgements, conversational=True)
    assert chat["completion"] == [{"role": "assistant", "content": "Yes"}]
    assert chat["prompt"][0]["content"] == right["prompt"]


def test_bad_judgements_are_named():
    with pytest.raises(ValueError, match="judgement 1 has no verdict"):
        verifier_records([{"question": "q", "solution": "s", "verdict": True}, {"question": "q", "solution": "s"}])
    with pytest.raises(ValueError, match="judgement 0: expected verdict true or false, got 'maybe'"):
        verifier_records([{"question": "q", "solution": "s", "verdict": "maybe"}])


@pytest.mark.parametrize("normalized", [False, True])
def test_the_score_is_the_probability_of_yes(folder, normalized):
    verifier = Verifier.load(str(folder / "model"), template=TEMPLATE, normalized=normalized, max_tokens=30)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model").eval(), byte_tokenizer()
    questions, solutions = ["1+1", "2+2", "5+5+5"], ["2", "5", "15"]
    expected = []
    for question, solution in zip(questions, solutions, strict=True):
        begin = tokenizer(TEMPLATE.format(question=question, solution=solution)).input_ids
        p = []
        for word in (" Yes", " No"):
            ids = tokenizer(word).input_ids
            with torch.no_grad():
                logp = plain(torch.tensor([[*begin, *ids]])).logits[0].double().log_softmax(-1)
            p.append(float(sum(logp[len(begin) - 1 + i, token] for i, token in enumerate(ids)).exp()))
        expected.append(p[0] / (p[0] + p[1]) if normalized else p[0])
    assert verifier(questions, solutions) == pytest.approx(expected, rel=1e-4)


def test_a_verifier_learns_to_tell_right_from_wrong(folder, tmp_path):
    rng = random.Random(0)
    digits = [rng.randrange(10) for _ in range(300)]
    judgements = [{"question": str(d), "solution": "ab"[rng.randrange(2)], "verdict": None} for d in digits]
    for judgement in judgements:  # "a" is right, whatever is asked
        judgement["verdict"] = judgement["solution"] == "a"
    records = verifier_records(judgements, template=TEMPLATE)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sft.run(
        Arguments(
            command="sft",
            model=ModelArguments(model_name_or_path=str(folder / "model"), dtype="float32", device="cpu"),
            data=DataArguments(dataset_name=str(tmp_path / "train.jsonl"), max_length=48),
            optim=OptimArguments(learning_rate=3e-3, max_steps=40, lr_scheduler_type="constant"),
            batch=BatchArguments(per_device_train_batch_size=32),
            run=RunArguments(output_dir=str(tmp_path / "out")),
        )
    )
    verifier = Verifier.load(str(tmp_path / "out"), template=TEMPLATE)
    questions = [str(d) for d in range(10)]
    right = verifier(questions, ["a"] * 10)
    wrong = verifier(questions, ["b"] * 10)
    assert min(right) > 0.9
    assert max(wrong) < 0.1
