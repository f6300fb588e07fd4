"""The arguments of pairs, critiques and win rates: what is made of a model's own samples by judging them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class PairArguments:
    """Rewards and pairs of what is generated.

    Args:
        save_pairs: also write OUTPUT_FILE's name with .pairs.jsonl for dpo: best_worst (by reward) or truth (the data's against samples).
        min_margin: best_worst: pairs whose rewards differ by less are left out.
        finished_only: keep completions that were cut at max_completion_length out of the pairs.
        reward: scores every completion: a built-in, a reward model, judge:model=…, module:function, path.py:function (repeatable).
        reward_weights: one weight a reward; empty: 1 each.
        reward_timeout: seconds one sample's reward may take.
    """

    save_pairs: Literal["none", "best_worst", "truth"] = "none"
    min_margin: float = 0.0
    finished_only: bool = True
    reward: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)
    reward_timeout: float = 10.0


@dataclass
class WinRateArguments:
    """The comparison with other completions.

    Args:
        judge: who compares: judge:model=FOLDER_OR_URL,template=FILE,… (docs/judges.md); with it, --reward may be left out.
        baseline: the completions to compare with: a .jsonl of fastalign generate or eval, their folder, or records with a completion.
    """

    judge: str = ""
    baseline: str = ""


@dataclass
class CritiqueArguments:
    """Critiques, revisions and AI feedback.

    Args:
        output_dir: gets transcripts.jsonl, sft.jsonl (revisions) and pairs.jsonl; a broken-off run goes on there.
        overwrite_output_dir: replace what an earlier run has left in output_dir.
        feedback: revise (answer, critique, revision) or compare (two answers, the better one chosen under a principle).
        principles: a YAML file of principles and, if wanted, of what is asked; empty: plain self-refinement.
        num_rounds: rounds of critique and revision, each under a principle drawn by the seed.
        judge: compare: who compares, judge:model=FOLDER_OR_URL,…; empty: the model itself, by the log-probs of its choice.
        min_probability: compare: pairs whose preferred side is less probable than this are left out.
        finished_only: leave out answers and revisions that were cut at max_completion_length.
        seed: seeds the samples and the drawing of principles.
    """

    output_dir: str = "runs/critique"
    overwrite_output_dir: bool = False
    feedback: Literal["revise", "compare"] = "revise"
    principles: str = ""
    num_rounds: int = 1
    judge: str = ""
    min_probability: float = 0.5
    finished_only: bool = True
    seed: int = 0
