"""What both sides of the policy comparison are given: completions, rewards, and the models on either side of it."""

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


def batch_of(options: dict[str, str], seed: int) -> Batch:
    """Completions of uneven lengths that the old policy samples, under random prompts, and random rewards, wider in later groups."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    draw = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    model = AutoModelForCausalLM.from_pretrained(options["old"], dtype=torch.float32)
    texts = inputs.random_prompts(tokenizer, [draw.randint(4, 12) for _ in range(NUM_PROMPTS)], seed)
    prompts = [tokenizer(text)["input_ids"] for text in texts]

    def completion(prompt: list[int], length: int) -> list[int]:
        ids = torch.tensor([prompt])
        given = {"attention_mask": torch.ones_like(ids), "do_sample": True, "top_k": 0, "pad_token_id": 0}
        return model.generate(ids, min_new_tokens=length, max_new_tokens=length, **given)[0, len(prompt) :].tolist()

    completions = [[completion(prompt, draw.randint(3, MAX_COMPLETION_LENGTH)) for _ in range(NUM_GENERATIONS)] for prompt in prompts]
    return Batch(prompts, completions, [[round(draw.random() * (p + 1), 4) for _ in group] for p, group in enumerate(completions)])


def prepare(folder: Path, given: str, seed: int) -> dict[str, str]:
    """Folders of the tokenizer and of three models, each as far from the given one (a random tiny one where none is) in a direction of
    its own, so that ratios lie on both sides of 1: the policy, the one that sampled, and the reference, a little farther."""
    import torch
    from transformers import AutoModelForCausalLM

    where = {"model": given, "tokenizer": given}
    if not given:
        words = [f"{a}{b}{c}" for a in "bdgkmnt" for b in "aeiou" for c in "lnrs"]
        texts = (" ".join(random.Random(i).choices(words, k=20)) for i in range(400))
        where = inputs.write_model(folder, inputs.text_tokenizer(texts, inputs.TINY["vocab_size"]), inputs.TINY, seed)
    start = where["model"]
    for index, (name, moved) in enumerate((("model", 0.02), ("old", 0.02), ("reference", 0.03))):
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        generator = torch.Generator().manual_seed(3 * seed + index)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(moved * p.std() * torch.randn(p.shape, generator=generator))
        where[name] = str(folder / name / "moved")
        model.save_pretrained(where[name])
    return where
