"""A reward model of answers to learn from: sums against what the SFT model got wrong, and against sums that were spoilt."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from bench.learn_setting import Row, Setting, optimizer, write_rows
from fastalign.recipes.arguments import RewardArguments

STEPS, BATCH = 800, 192


def answer_reward_model(setting: Setting) -> Path:
    """The model's folder. Wrong samples alone leave out what a policy may turn to once it is rewarded for it: other lengths and symbols."""
    from fastalign.recipes.reward import run

    args = setting.arguments("reward", "answers", write_pairs(setting), BATCH, optim=optimizer(1e-3, STEPS))
    run(replace(args, reward=RewardArguments(loss="bradley_terry")))
    return setting.root / "answers"


def write_pairs(setting: Setting) -> str:
    """The pairs that preference methods get, each followed by one of the same sum and a spoilt one."""
    draw, rows = random.Random(setting.seed), list[Row]()
    for line in Path(setting.files["pairs"]).read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        rows += [pair, pair | {"rejected": spoilt(pair["chosen"], draw)}]
    draw.shuffle(rows)
    return write_rows(setting.root / "data" / "answers.jsonl", rows)


def spoilt(answer: str, draw: random.Random) -> str:
    """Another text than `answer`: a digit less, more or other, turned round, or a few symbols."""
    place, digit = draw.randrange(len(answer)), draw.choice("0123456789")
    found = draw.choice(
        [
            answer[:-1] or digit,
            answer + digit,
            answer[:place] + digit + answer[place + 1 :],
            answer[::-1],
            "".join(draw.choice("0123456789+=") for _ in range(draw.randint(1, 7))),
        ]
    )
    return found if found != answer else answer + digit
