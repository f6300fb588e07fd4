"""What both sides of the policy comparison are given: completions, rewards, and the models that sampled them and that they are held to."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

from . import inputs

NUM_PROMPTS, NUM_GENERATIONS, MAX_COMPLETION_LENGTH = 3, 4, 40


class Batch(NamedTuple):
    """Groups of completions as token ids, and a reward each."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    rewards: list[list[float]]


class Found(NamedTuple):
    """One side's numbers; gradients by parameter name."""

    loss: float
    metrics: dict[str, float]
    advantages: list[float]
    gradients: dict[str, Any]


def batch_of(tokenizer_folder: str, seed: int, *, constant_group: bool = False) -> Batch:
    """Random words of uneven lengths; rewards differ in a group, except in the first one where `constant_group`."""
    from transformers import AutoTokenizer

    draw = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def ids(count: int, low: int, high: int) -> list[list[int]]:
        texts = inputs.random_prompts(tokenizer, [draw.randint(low, high) for _ in range(count)], draw.randrange(1 << 30))
        return [tokenizer(text)["input_ids"][:high] for text in texts]

    completions = [ids(NUM_GENERATIONS, 3, MAX_COMPLETION_LENGTH) for _ in range(NUM_PROMPTS)]
    rewards = [[round(draw.random() * (p + 1), 2) for _ in group] for p, group in enumerate(completions)]
    if constant_group:
        rewards[0] = [1.0] * NUM_GENERATIONS
    return Batch(ids(NUM_PROMPTS, 4, 16), completions, rewards)


def prepare(folder: Path, given: str, seed: int) -> dict[str, str]:
    """Folders of the policy (a random tiny one where none is given), its tokenizer, the policy that sampled, and the reference."""
    import torch
    from transformers import AutoModelForCausalLM

    where = {"model": given, "tokenizer": given}
    if not given:
        words = [f"{a}{b}{c}" for a in "bdgkmnt" for b in "aeiou" for c in "lnrs"]
        texts = (" ".join(random.Random(i).choices(words, k=20)) for i in range(400))
        where = inputs.write_model(folder, inputs.text_tokenizer(texts, inputs.TINY["vocab_size"]), inputs.TINY, seed)
    for name, moved in (("old", 0.03), ("reference", 0.04)):
        model = AutoModelForCausalLM.from_pretrained(where["model"], dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed + len(where))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(moved * p.std() * torch.randn(p.shape, generator=generator))
        where[name] = str(folder / name)
        model.save_pretrained(where[name])
    return where
