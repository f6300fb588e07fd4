"""The methods that `fastalign search` compares: what each needs, and how it runs over a chunk of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from ..data import Prompt
from ..search import Policy, SearchResult, TreeOptions, beam_search, mcts, sample, voted
from ..search.paths import score_paths
from ..search.sampled import best_index, chosen, weigh
from .search_arguments import SearchArguments
from .search_scorers import Guide

Results = dict[str, list[SearchResult]]  # method → a result a prompt


@dataclass(frozen=True)
class Searching:
    """What the methods share.

    Attributes:
        policy: draws.
        guide: the scorer; None where no method needs one.
        own: the command's arguments.
        vote: a solution's text → what it votes for.
    """

    policy: Policy
    guide: Guide | None
    own: SearchArguments
    vote: Callable[[str], Hashable | None]

    @property
    def needed_guide(self) -> Guide:
        assert self.guide is not None, "checked before anything is drawn"
        return self.guide


@dataclass(frozen=True)
class Pass:
    """Methods that one pass over the prompts serves.

    Attributes:
        methods: their names.
        run: (what is shared, prompts, the methods that are asked for) → their results.
        width: sequences of one prompt that run at once.
    """

    methods: tuple[str, ...]
    run: Callable[[Searching, Sequence[Prompt], Sequence[str]], Results]
    width: Callable[[SearchArguments], int]


def greedy(searching: Searching, prompts: Sequence[Prompt], methods: Sequence[str]) -> Results:
    """The most probable token, one after the other."""
    policy = searching.policy
    params = replace(policy.params, temperature=0.0)
    still = Policy(policy.engine, params, separator=policy.separator, max_step_tokens=policy.max_step_tokens)
    return {method: [chosen(paths, [math.nan], 0, 0) for paths in sample(still, prompts, 1)] for method in methods}


def by_samples(searching: Searching, prompts: Sequence[Prompt], methods: Sequence[str]) -> Results:
    """The methods that choose from n whole solutions, from the same ones, drawn and scored once."""
    paths = sample(searching.policy, prompts, searching.own.num_samples)
    answers = [[searching.vote(path.text) for path in own] for own in paths]
    found: Results = {}
    if "majority" in methods:
        found["majority"] = [voted(own, votes, [1.0] * len(own)) for own, votes in zip(paths, answers, strict=True)]
    if {"best_of_n", "weighted"} & set(methods):
        guide = searching.needed_guide
        scores, judged = score_paths(guide.scorer, prompts, paths)
        each = list(zip(paths, answers, scores, judged, strict=True))
        found["best_of_n"] = [chosen(own, given, best_index(given), count) for own, _, given, count in each]
        found["weighted"] = [voted(own, votes, [weigh(guide.weight, s) for s in given], count) for own, votes, given, count in each]
    return {method: found[method] for method in methods}


def by_beams(searching: Searching, prompts: Sequence[Prompt], methods: Sequence[str]) -> Results:
    """Beam search over steps."""
    own, scorer = searching.own, searching.needed_guide.scorer
    results = beam_search(searching.policy, prompts, scorer, num_beams=own.num_beams, num_expansions=own.num_expansions)
    return dict.fromkeys(methods, results)


def by_tree(searching: Searching, prompts: Sequence[Prompt], methods: Sequence[str]) -> Results:
    """Monte-Carlo tree search."""
    own, guide = searching.own, searching.needed_guide
    options = TreeOptions(
        own.num_simulations, own.num_expansions, own.tree_rule, own.tree_prior, math.inf if own.enough is None else own.enough
    )
    value = None if rolls_out(own, guide) else guide.bounded
    return dict.fromkeys(methods, mcts(searching.policy, prompts, guide.bounded, value=value, options=options))


def rolls_out(own: SearchArguments, guide: Guide) -> bool:
    """Whether mcts values a step by rollouts."""
    return own.tree_value == "rollouts" or (own.tree_value == "auto" and not guide.judges_steps)


PASSES = (
    Pass(("greedy",), greedy, lambda own: 1),
    Pass(("best_of_n", "majority", "weighted"), by_samples, lambda own: own.num_samples),
    Pass(("beam",), by_beams, lambda own: own.num_beams * own.num_expansions),
    Pass(("mcts",), by_tree, lambda own: own.num_expansions),
)
ALONE = ("greedy", "majority")  # methods that no scorer guides
BY_SCORE = ("best_of_n", "beam", "mcts")  # methods whose scores are the scorer's


def check(own: SearchArguments, guide: Guide | None) -> None:
    """Raises ValueError, with the remedy, where a method lacks what it needs."""
    guided = [method for method in own.methods if method not in ALONE]
    if guided and guide is None:
        raise ValueError(f"--method {guided[0]} needs --scorer: a reward model's folder, a built-in reward or path.py:function")
    stepwise = [method for method in own.methods if method in ("beam", "mcts")]
    if stepwise and not own.step_separator and not own.max_step_tokens:
        raise ValueError(f"--method {stepwise[0]}: nothing ends a step; give --step_separator or --max_step_tokens")
    if guide is None or guide.judges_steps:
        return
    if "beam" in own.methods:
        raise ValueError(
            f"--method beam: --scorer {own.scorer} judges finished solutions alone; give a model of steps (fastalign reward --loss process)"
        )
    if "mcts" in own.methods and own.tree_value == "scorer":
        raise ValueError(f"--tree_value scorer: --scorer {own.scorer} judges finished solutions alone; use rollouts, or a model of steps")
