"""Search at test time: more tokens for better answers, over the engine and its cache."""

from .beam import beam_search
from .mcts import TreeOptions, mcts
from .paths import Path, Scorer, SearchResult, StepEstimate
from .policy import Policy, Stem
from .sampled import best_of_n, majority_vote, sample, voted, weighted_vote

__all__ = [
    "Path",
    "Policy",
    "Scorer",
    "SearchResult",
    "Stem",
    "StepEstimate",
    "TreeOptions",
    "beam_search",
    "best_of_n",
    "majority_vote",
    "mcts",
    "sample",
    "voted",
    "weighted_vote",
]
