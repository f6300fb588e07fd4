"""The arguments of search, torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Method = Literal["greedy", "best_of_n", "majority", "weighted", "beam", "mcts"]


@dataclass
class SearchArguments:
    """The search.

    Args:
        output_dir: gets results.jsonl (one object a method and prompt) and summary.json; a broken-off search goes on there.
        overwrite_output_dir: replace a search that output_dir already holds.
        method: greedy, best_of_n, majority, weighted, beam, mcts; several make one table; empty: greedy and majority.
        scorer: what the search is guided by: a reward model's folder (beam: one of steps), a built-in reward or path.py:function.
        score_aggregation: how a scorer of steps makes one score: product, min, last or sum; empty: as the model's configuration says.
        num_samples: solutions a prompt that best_of_n, majority and weighted choose from.
        num_beams: paths that beam keeps.
        num_expansions: next steps drawn behind each path (beam), or behind each node that is reached (mcts).
        num_simulations: times mcts goes down a prompt's tree.
        step_separator: text that ends a step; empty: none does.
        max_step_tokens: tokens after which a step ends; 0: any number.
        tree_rule: how mcts goes down: puct, uct, or rmax (seeks what is new, arXiv:2408.08152).
        tree_prior: the policy's part in puct: token_probability (of a mean token), step_probability (of the step) or draw_share.
        tree_value: what goes up mcts's tree: scorer (of steps), rollouts (scores of whole solutions), or auto (scorer where it can).
        enough: mcts ends a prompt's search with the first solution of this score; unset: never early.
        vote: what majority and weighted vote on: answer (the final one in the text, equal numbers are one) or text (all of it).
        reward: says how right the chosen completion is, for the table: math, gsm8k, path.py:function, … (repeatable); empty: no accuracy.
        reward_weights: one weight a reward; empty: 1 each.
        reward_timeout: seconds one sample's reward may take.
        min_reward: a completion is right from this reward on.
        save_sft: a .jsonl of prompt and completion: each method's choice, only right ones where there is a reward.
        save_pairs: a .jsonl of prompt, chosen and rejected: the best and the worst solution that was found.
        save_steps: a .jsonl of prompt, steps and labels for fastalign reward --loss process, from mcts's rollouts (arXiv:2312.08935).
        step_labels: of save_steps: hard (1 where any rollout from the step was right) or soft (the share that was).
        block_size: tokens of a KV-cache block; what branches share is found in whole blocks.
        seed: sampling seed.
    """

    output_dir: str = "runs/search"
    overwrite_output_dir: bool = False
    method: list[Method] = field(default_factory=list)
    scorer: str = ""
    score_aggregation: Literal["", "product", "min", "last", "sum"] = ""
    num_samples: int = 16
    num_beams: int = 4
    num_expansions: int = 4
    num_simulations: int = 16
    step_separator: str = "\\n"
    max_step_tokens: int = 0
    tree_rule: Literal["puct", "uct", "rmax"] = "puct"
    tree_prior: Literal["token_probability", "step_probability", "draw_share"] = "token_probability"
    tree_value: Literal["auto", "scorer", "rollouts"] = "auto"
    enough: float | None = None
    vote: Literal["answer", "text"] = "answer"
    reward: list[str] = field(default_factory=list)
    reward_weights: list[float] = field(default_factory=list)
    reward_timeout: float = 10.0
    min_reward: float = 1.0
    save_sft: str = ""
    save_pairs: str = ""
    save_steps: str = ""
    step_labels: Literal["hard", "soft"] = "hard"
    block_size: int = 16
    seed: int = 0

    @property
    def methods(self) -> list[str]:
        """What runs, in the order of the table."""
        return list(dict.fromkeys(self.method)) or ["greedy", "majority"]
