"""The demo's embedded task: two-digit additions, a character tokenizer and a small Llama, made on the spot.

Torch-free at import: the reward function runs in a worker process of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

CHARACTERS = "0123456789+="
SPECIAL = ("<pad>", "<s>", "</s>")
Problem = tuple[int, int]


def correct(prompts: list[str], completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """The verifiable reward: 1 when the completion is the sum, else 0."""
    return [float(completion.strip() == expected) for completion, expected in zip(completions, answer, strict=True)]


def begun_well(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str], **columns: object
) -> list[float]:
    """The reward of a step: 1 when the sum begins with what is written so far, or is it where the completion ends; else 0."""
    end = SPECIAL.index("</s>")
    whole = (end in ids for ids in completion_ids)
    return [
        float(expected == text.strip() if ended else expected.startswith(text.strip()))
        for text, ended, expected in zip(completions, whole, answer, strict=True)
    ]


def problems(seed: int, **sizes: int) -> tuple[list[Problem], ...]:
    """Disjoint sets of problems: one of each size given, in order, and last everything that is left."""
    every = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(every)
    parts = []
    for size in sizes.values():
        parts.append(every[:size])
        every = every[size:]
    return *parts, every


def record(problem: Problem) -> dict[str, str]:
    """`47+85=` → `132`, answer included for the reward."""
    a, b = problem
    return {"prompt": f"{a:02d}+{b:02d}=", "completion": f"{a + b:03d}", "answer": f"{a + b:03d}"}


def write_jsonl(path: Path, chosen: Iterable[Problem], columns: tuple[str, ...]) -> str:
    """Writes the named columns of the problems' records and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: value for name, value in record(problem).items() if name in columns} for problem in chosen]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build_tokenizer(characters: str = CHARACTERS):
    """A tokenizer with one token a character, `<s>` in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=pad)


def build_model(seed: int, vocab_size: int):
    """A Llama of 1.2 million parameters, randomly initialized."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)
