"""Monte-Carlo tree search over reasoning steps, the trees of all prompts side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..data import Prompt
from .paths import Path, Scorer, SearchResult, StepEstimate, score_paths
from .policy import Policy, Stem
from .sampled import best_index
from .tree import PRIORS, RULES, Node, Rule, back_up, close, leaves, select


@dataclass(frozen=True)
class TreeOptions:
    """How a tree grows.

    Args:
        num_simulations: times a tree is gone down and expanded.
        num_expansions: draws behind the node that is reached; equal ones make one child.
        rule: puct, uct or rmax (`tree.RULES`).
        prior: token_probability, step_probability or draw_share (`tree.PRIORS`); only puct reads it.
        enough: a prompt's search ends with the first solution of this score.

    Raises:
        ValueError: a number below 1, an unknown rule or prior.
    """

    num_simulations: int = 16
    num_expansions: int = 4
    rule: str = "puct"
    prior: str = "token_probability"
    enough: float = math.inf

    def __post_init__(self) -> None:
        if self.num_simulations < 1 or self.num_expansions < 1:
            got = f"{self.num_simulations} and {self.num_expansions}"
            raise ValueError(f"mcts: num_simulations and num_expansions must be >= 1, got {got}")
        for name, table in (("rule", RULES), ("prior", PRIORS)):
            if getattr(self, name) not in table:
                raise ValueError(f"mcts: {name} must be one of {', '.join(table)}, got {getattr(self, name)!r}")


@dataclass(eq=False)
class Tree:
    """One prompt's search."""

    prompt: Prompt
    root: Node = field(default_factory=lambda: Node(Path()))
    found: dict[Path, float] = field(default_factory=dict)
    serial: int = 0
    num_tokens: int = 0
    num_scored: int = 0

    def stem(self, node: Node) -> Stem:
        self.serial += 1
        return Stem(self.prompt, node.path, self.serial - 1)

    def goes_on(self, enough: float) -> bool:
        return not self.root.closed and not any(score >= enough for score in self.found.values())

    def result(self, chains: list[list[StepEstimate]]) -> SearchResult:
        scores = list(self.found.values())
        return SearchResult(list(self.found), scores, best_index(scores), self.num_tokens, self.num_scored, chains)


@dataclass(frozen=True)
class Expansion:
    """A node that is gone on from, and the node where going down ended: itself, or its `again`."""

    tree: Tree
    node: Node
    reached: Node


def mcts(
    policy: Policy,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    *,
    value: Scorer | None = None,
    options: TreeOptions | None = None,
) -> list[SearchResult]:
    """Grows a tree of steps a prompt, all of them one simulation at a time, and takes the finished solution with the best score.

    With `value`, a model of steps, a simulation draws next steps behind the node that it reaches and judges each of them
    (arXiv:2309.17179). Without it, it draws whole solutions from there: their scores are what goes up, the first steps are the
    new children, and every solution is a candidate. A score of NaN goes up as 0. Finished nodes are visited once; a prompt whose
    tree holds nothing more ends early. A tree without a finished solution in the end is completed from its most visited branch.

    Args:
        scorer: of finished solutions.
        value: of unfinished ones; None: rollouts. Rules expect both between 0 and 1.

    Raises:
        ValueError: as `TreeOptions`.
    """
    chosen = options or TreeOptions()
    rule, trees = RULES[chosen.rule], [Tree(prompt) for prompt in prompts]
    for _ in range(chosen.num_simulations):
        going = [at for tree in trees if tree.goes_on(chosen.enough) for at in _reach(tree, rule)]
        if not going:
            break
        grow = _roll_out if value is None else _judge
        for at, fresh in zip(going, grow(policy, going, chosen, scorer, value or scorer), strict=True):
            _settle(at, fresh, chosen)
    _complete(policy, [tree for tree in trees if not tree.found], scorer)
    estimates = value is None and not rule.novelty
    return [tree.result([_estimates(chain) for chain in leaves(tree.root)] if estimates else []) for tree in trees]


def _reach(tree: Tree, rule: Rule) -> Iterator[Expansion]:
    """Goes down to where there is something to draw; finished solutions on the way there are visited. Nothing: the tree is done."""
    while not tree.root.closed:
        reached = select(tree.root, rule)
        if not reached.path.finished:
            parent = reached.parent
            yield Expansion(tree, parent if parent is not None and reached is parent.again else reached, reached)
            return
        back_up(reached, 0.0 if rule.novelty else reached.value, rule.discount)
        close(reached)


def _judge(policy: Policy, going: list[Expansion], options: TreeOptions, scorer: Scorer, value: Scorer) -> list[int]:
    """Draws and judges next steps; returns how many were new, for each expansion."""
    drawn = policy.step([at.tree.stem(at.node) for at in going], options.num_expansions)
    fresh = [_children(at, paths) for at, paths in zip(going, drawn, strict=True)]
    for at, paths in zip(going, drawn, strict=True):
        at.tree.num_tokens += sum(len(path.ids) - len(at.node.path.ids) for path in paths)
    for judge, finished in ((scorer, True), (value, False)):
        nodes = [[child for child in own if child.path.finished == finished] for own in fresh]
        prompts = [at.tree.prompt for at in going]
        scores, judged = score_paths(judge, prompts, [[child.path for child in own] for own in nodes])
        for at, own, given, count in zip(going, nodes, scores, judged, strict=True):
            at.tree.num_scored += count
            for child, score in zip(own, given, strict=True):
                child.value = _number(score)
                at.tree.found |= {child.path: score} if finished else {}
    novelty = RULES[options.rule].novelty
    for at, own in zip(going, fresh, strict=True):
        back_up(at.reached, float(bool(own)) if novelty else at.node.value, RULES[options.rule].discount)
    return [len(own) for own in fresh]


def _roll_out(policy: Policy, going: list[Expansion], options: TreeOptions, scorer: Scorer, value: Scorer) -> list[int]:
    """Draws whole solutions and sends their scores up through their first steps; returns how many of these were new."""
    drawn = policy.complete([at.tree.stem(at.node) for at in going], options.num_expansions)
    scores, judged = score_paths(scorer, [at.tree.prompt for at in going], drawn)
    counts, rule = [], RULES[options.rule]
    for at, paths, given, count in zip(going, drawn, scores, judged, strict=True):
        at.tree.num_tokens += sum(len(path.ids) - len(at.node.path.ids) for path in paths)
        at.tree.num_scored += count
        at.tree.found |= dict(zip(paths, given, strict=True))
        firsts = [policy.first_step(path, at.node.path) for path in paths]
        fresh = _children(at, firsts)
        counts.append(len(fresh))
        if rule.novelty:
            back_up(at.reached, float(bool(fresh)), rule.discount)
            continue
        steps = {child.path: child for child in at.node.children}
        for first, score in zip(firsts, given, strict=True):
            back_up(steps[first], _number(score), rule.discount)
        for child in fresh:
            if child.path.finished:
                close(child)
    return counts


def _children(at: Expansion, paths: list[Path]) -> list[Node]:
    """Hangs what was drawn below the node; returns the children that are new."""
    known = {child.path: child for child in at.node.children}
    fresh = []
    for path in paths:
        if path not in known:
            known[path] = Node(path, at.node)
            fresh.append(known[path])
        known[path].drawn += 1
    at.node.children.extend(fresh)
    return fresh


def _settle(at: Expansion, fresh: int, options: TreeOptions) -> None:
    """After an expansion: its priors, and whether the node may be gone on from again."""
    node = at.node
    for child, prior in zip(node.children, PRIORS[options.prior](node.children), strict=True):
        child.prior = prior
    if RULES[options.rule].reopens and node.again is None:
        node.again = Node(node.path, node)


def _complete(policy: Policy, trees: list[Tree], scorer: Scorer) -> None:
    """Goes on to the end from the most visited branch of trees that have no solution yet."""
    if not trees:
        return
    stems = []
    for tree in trees:
        node = tree.root
        while opened := [child for child in node.children if not child.path.finished]:
            node = max(opened, key=lambda child: (child.visits, child.mean))
        stems.append((tree, node))
    drawn = policy.complete([tree.stem(node) for tree, node in stems], 1)
    scores, judged = score_paths(scorer, [tree.prompt for tree in trees], drawn)
    for (tree, node), paths, given, count in zip(stems, drawn, scores, judged, strict=True):
        tree.found |= dict(zip(paths, given, strict=True))
        tree.num_tokens += sum(len(path.ids) - len(node.path.ids) for path in paths)
        tree.num_scored += count


def _estimates(chain: list[Node]) -> list[StepEstimate]:
    return [StepEstimate(node.path.steps[-1], node.mean, int(node.visits)) for node in chain]


def _number(score: float) -> float:
    """What goes up the tree for a score."""
    return 0.0 if math.isnan(score) else score
