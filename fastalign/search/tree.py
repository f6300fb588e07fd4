"""The tree of Monte-Carlo search: its nodes, the rules by which one goes down it, and what goes back up. Plain float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .paths import Path


@dataclass(eq=False)
class Node:
    """A solution so far, and what is known of it.

    Attributes:
        path: the solution so far.
        prior: the policy's share of this step among its siblings.
        value: what it is thought to be worth before a visit.
        visits, total: how often it was gone through, and the sum of what came of it; both discounted where the rule discounts.
        drawn: how often the policy has drawn it.
        children: next steps, in the order they were drawn.
        again: stands for going on from this node once more, where the rule does that; it has no children.
        closed: nothing is left to find below.
    """

    path: Path
    parent: Node | None = None
    prior: float = 1.0
    value: float = 0.0
    visits: float = 0.0
    total: float = 0.0
    drawn: int = 0
    children: list[Node] = field(default_factory=list)
    again: Node | None = None
    closed: bool = False

    @property
    def mean(self) -> float:
        """What came of it on average; before a visit, what it is thought to be worth."""
        return self.total / self.visits if self.visits else self.value

    def ways(self) -> list[Node]:
        """Where one can go from here."""
        return [child for child in (*self.children, *((self.again,) if self.again else ())) if not child.closed]


@dataclass(frozen=True)
class Rule:
    """How a tree is gone down.

    Attributes:
        score: (node, child) → the child with the highest one is next, the first of those that tie.
        reopens: a node that has children can be gone on from once more.
        novelty: what goes back up is 1 for a new node, 0 for none, instead of the value.
        discount: weight of a visit when the next one comes.
    """

    score: Callable[[Node, Node], float]
    reopens: bool = False
    novelty: bool = False
    discount: float = 1.0


def puct(node: Node, child: Node, *, c_init: float = 1.25, c_base: float = 19652.0) -> float:
    """Q + c(s)·P·√N(s) / (1 + N(s, a)), c(s) = c_init + log((1 + N(s) + c_base) / c_base), over steps as in arXiv:2309.17179."""
    c = c_init + math.log((1 + node.visits + c_base) / c_base)
    return child.mean + c * child.prior * math.sqrt(node.visits) / (1 + child.visits)


def uct(node: Node, child: Node, *, c: float = math.sqrt(2)) -> float:
    """Q + c·√(ln N(s) / N(s, a)); infinite before the first visit (Kocsis and Szepesvári, 2006)."""
    return child.mean + c * math.sqrt(math.log(node.visits) / child.visits) if child.visits else math.inf


def discounted_ucb(node: Node, child: Node) -> float:
    """Q + √(2 ln Σ N(s, ·) / N(s, a)) of discounted counts; infinite before the first visit (RMaxTS, arXiv:2408.08152)."""
    if not child.visits:
        return math.inf
    together = sum(way.visits for way in (*node.children, *((node.again,) if node.again else ())))
    return child.mean + math.sqrt(2 * math.log(max(together, 1.0)) / child.visits)


RULES: dict[str, Rule] = {
    "puct": Rule(puct),
    "uct": Rule(uct),
    "rmax": Rule(discounted_ucb, reopens=True, novelty=True, discount=0.99),
}


def _softmax(scores: Sequence[float]) -> list[float]:
    most = max(scores)
    shares = [math.exp(score - most) for score in scores]
    return [share / sum(shares) for share in shares]


def _last_step(path: Path) -> tuple[float, int]:
    """(log-prob, tokens) of the last step."""
    return path.logprobs[-1], path.ends[-1] - (path.ends[-2] if len(path.ends) > 1 else 0)


def step_probability(children: Sequence[Node]) -> list[float]:
    """The model's probability of each step, over those that were drawn."""
    return _softmax([_last_step(child.path)[0] for child in children])


def token_probability(children: Sequence[Node]) -> list[float]:
    """The same of the geometric mean over a step's tokens, so that long steps do not lose by length."""
    return _softmax([logprob / num_tokens for logprob, num_tokens in (_last_step(child.path) for child in children)])


def draw_share(children: Sequence[Node]) -> list[float]:
    """How often each step was drawn (arXiv:2104.06303: actions that the policy itself proposed)."""
    together = sum(child.drawn for child in children)
    return [child.drawn / together for child in children]


PRIORS: dict[str, Callable[[Sequence[Node]], list[float]]] = {
    "token_probability": token_probability,
    "step_probability": step_probability,
    "draw_share": draw_share,
}


def select(root: Node, rule: Rule) -> Node:
    """Goes down from an open root, the best way at each node, to one without children."""
    node = root
    while ways := node.ways():
        at = node
        node = max(ways, key=lambda way: rule.score(at, way))
    return node


def back_up(node: Node, value: float, discount: float = 1.0) -> None:
    """Counts a visit with its value from the node up to the root."""
    at: Node | None = node
    while at is not None:
        at.visits, at.total = discount * at.visits + 1, discount * at.total + value
        at = at.parent


def close(node: Node) -> None:
    """Notes that nothing is left to find here, and above where that was the last way."""
    node.closed = True
    at = node.parent
    while at is not None and not at.ways():
        at.closed = True
        at = at.parent


def leaves(node: Node) -> Iterator[list[Node]]:
    """Every branch from below the root to a node without children."""
    stack = [(child, [child]) for child in reversed(node.children)]
    while stack:
        last, chain = stack.pop()
        if not last.children:
            yield chain
        stack.extend((child, [*chain, child]) for child in reversed(last.children))
