"""The arguments of generate and eval, torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class GenerateArguments:
    """What generate writes.

    Args:
        output_file: the .jsonl to write, one object a prompt with all its completions.
        num_samples: completions a prompt.
        logprobs: write token ids and log-probs too.
        prompt: a prompt given on the command line (repeatable) instead of a data set.
        seed: sampling seed.
    """

    output_file: str = ""
    num_samples: int = 1
    logprobs: bool = False
    prompt: list[str] = field(default_factory=list)
    seed: int = 0


@dataclass
class EvalArguments:
    """The evaluation.

    Args:
        output_dir: gets samples.jsonl (one object a problem) and summary.json; a broken-off evaluation goes on there.
        overwrite_output_dir: replace an evaluation that output_dir already holds.
        num_samples: completions a problem.
        k: of pass@k and maj@k (repeatable); empty: 1 and num_samples.
        reward: says how right a completion is: math, gsm8k, code, a reward model, judge:…, module:function, path.py:function (repeatable).
        reward_weights: one weight a reward; empty: 1 each.
        reward_timeout: seconds one sample's reward may take.
        min_reward: a completion is right from this reward on.
        ranker: a reward model that ranks the completions: best@k, and votes weighed by its probability; empty: none.
        vote: what the majority votes on: answer (the final one in the text, equal numbers are one) or text (the whole completion).
        seed: sampling seed.
    """

    output_dir: str = "runs/eval"
    overwrite_output_dir: bool = False
    num_samples: int = 1
    k: list[int] = field(default_factory=list)
    reward: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)
    reward_timeout: float = 10.0
    min_reward: float = 1.0
    ranker: str = ""
    vote: Literal["answer", "text"] = "answer"
    seed: int = 0
