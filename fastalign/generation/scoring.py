"""Log-probs of sequences that are given, as the trainer computes them: packed, and a shared beginning forwarded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastalign.models.backbone import Head, causal_lm, head_of, hidden_states
from fastalign.ops.linear_head import borrowed, even_chunks, head_logits
from fastalign.ops.logits import logp_rows
from fastalign.packing import Segment, pack

LOGITS_BYTES = 64 << 20  # held at once

Top = list[tuple[int, float]]


@dataclass(frozen=True)
class SequenceScores:
    """What a model makes of one sequence of L tokens.

    Attributes:
        token_ids: the sequence.
        logprobs: L numbers in nats, each given the tokens before it; the first has none before it and is None.
        top_logprobs: the most probable tokens at each place, best first, as (id, log-prob); None at the first place, and None
            altogether when not asked for.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[Top | None] | None = None


def score_sequences(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    top_logprobs: int = 0,
    max_tokens: int = 8192,
) -> list[SequenceScores]:
    """Scores sequences under softmax(logits / temperature), with no gradient. The caller sets eval mode.

    The numbers are bitwise what the engine's `raw_logprobs` were if it sampled the sequence with the same weights on the
    native CPU backend.

    Args:
        model: a causal LM with the "fastalign" attention.
        sequences: token ids, at least one each. Sequences that begin alike share that beginning's forward pass.
        temperature: divides the logits; > 0.
        top_logprobs: how many of the most probable tokens to return at each place.
        max_tokens: tokens forwarded at once; a longer sequence is forwarded alone.

    Raises:
        ValueError: an empty or over-long sequence, an id outside the vocabulary, or options out of range; names the sequence.
    """
    head = head_of(model)
    ids = check_sequences(model, head, sequences)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"score: temperature must be finite and > 0, got {temperature}; 1 gives the model's own log-probs")
    if not 0 <= top_logprobs <= head.weight.shape[0]:
        raise ValueError(f"score: top_logprobs must be in [0, vocabulary size {head.weight.shape[0]}], got {top_logprobs}")
    found: dict[tuple[int, ...], SequenceScores] = {}
    with torch.no_grad():
        for chunk in _chunks(sorted(set(ids)), max_tokens):
            found.update(zip(chunk, _score(model, head, chunk, temperature, top_logprobs), strict=True))
    return [found[sequence] for sequence in ids]


def check_sequences(model: nn.Module, head: Head, sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The sequences as tuples of ints, each one the model can take.

    Raises:
        ValueError: names the first sequence that it cannot.
    """
    base = causal_lm(model)
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    vocab_size = min(head.weight.shape[0], base.get_input_embeddings().weight.shape[0])
    checked = [tuple(int(token) for token in sequence) for sequence in sequences]
    for number, sequence in enumerate(checked):
        if not sequence:
            raise ValueError(f"score: sequence {number} is empty; give it at least one token")
        if longest is not None and len(sequence) > longest:
            raise ValueError(
                f"score: sequence {number} has {len(sequence)} tokens, expected at most {longest}: the model's longest; cut it"
            )
        if min(sequence) < 0 or max(sequence) >= vocab_size:
            bad = next(i for i, token in enumerate(sequence) if not 0 <= token < vocab_size)
            raise ValueError(
                f"score: sequence {number} must hold token ids in [0, vocabulary size {vocab_size}), got {sequence[bad]} at position"
                f" {bad}; is the tokenizer larger than the model?"
            )
    return checked


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _chunks(ordered: list[tuple[int, ...]], max_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Sorted sequences in runs that forward at most `max_tokens` tokens: a sequence costs what it does not share with the last."""
    chunk: list[tuple[int, ...]] = []
    used = 0
    for sequence in ordered:
        cost = len(sequence) - (_shared(chunk[-1], sequence) if chunk else 0)
        if chunk and used + cost > max_tokens:
            yield chunk
            chunk, used, cost = [], 0, len(sequence)
        chunk.append(sequence)
        used += cost
    if chunk:
        yield chunk


@dataclass(eq=False)
class _Node:
    """A run of tokens that one or more sequences have in common, and what was found for each of them."""

    start: int  # position of the first token
    ids: tuple[int, ...]
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    tops: list[Top | None] = field(default_factory=list)


def _forest(ordered: list[tuple[int, ...]]) -> tuple[list[_Node], list[_Node]]:
    """The prefix tree of sorted, distinct sequences: its roots, and the node in which each sequence ends.

    A sequence branches off the path of the one before it, where both differ first.
    """
    roots: list[_Node] = []
    ends: list[_Node] = []
    before: tuple[int, ...] = ()
    for sequence in ordered:
        common = _shared(before, sequence)
        node = ends[-1] if common else None
        while node is not None and node.start >= common:
            node = node.parent
        siblings = roots if node is None else node.children
        if node is not None and node.start + len(node.ids) > common:
            node = _split(node, common, roots if node.parent is None else node.parent.children)
            siblings = node.children
        siblings.append(_Node(common, sequence[common:], node))
        ends.append(siblings[-1])
        before = sequence
    return roots, ends


def _split(node: _Node, position: int, siblings: list[_Node]) -> _Node:
    """Cuts the last of `siblings` before `position`; returns the new node of the tokens before it."""
    at = position - node.start
    upper = siblings[-1] = _Node(node.start, node.ids[:at], node.parent, [node])
    node.start, node.ids, node.parent = position, node.ids[at:], upper
    return upper


def _in_order(roots: list[_Node]) -> list[_Node]:
    """Every node before its children, as the packer lays them out; prefixes may nest deeper than Python recurses."""
    order, stack = [], roots[::-1]
    while stack:
        order.append(stack.pop())
        stack.extend(reversed(order[-1].children))
    return order


def _trees(roots: list[_Node], order: list[_Node]) -> list[Segment]:
    """The nodes as the packer takes them, every token scored."""
    built: dict[int, Segment] = {}
    for node in reversed(order):
        built[id(node)] = Segment(node.ids, True, tuple(built[id(child)] for child in node.children))
    return [built[id(root)] for root in roots]


def _score(model: nn.Module, head: Head, chunk: list[tuple[int, ...]], temperature: float, top: int) -> list[SequenceScores]:
    roots, ends = _forest(chunk)
    order = _in_order(roots)
    packed = pack(_trees(roots, order)).to(head.weight.device)
    hidden = hidden_states(model, packed)[packed.rows]
    logprobs, tops = _logprobs(head, hidden, packed.targets, temperature, top)
    at = 0  # the packer scores every token but the roots' first ones, in order
    for node in order:
        missing = 1 if node.parent is None else 0
        count = len(node.ids) - missing
        node.logprobs = [None] * missing + logprobs[at : at + count]
        node.tops = [None] * missing + tops[at : at + count]
        at += count
    return [_path(sequence, end, top > 0) for sequence, end in zip(chunk, ends, strict=True)]


def _path(sequence: tuple[int, ...], end: _Node, with_tops: bool) -> SequenceScores:
    """What was found on the way from the root to a sequence's last node."""
    nodes = []
    node: _Node | None = end
    while node is not None:
        nodes.append(node)
        node = node.parent
    logprobs = [value for node in reversed(nodes) for value in node.logprobs]
    tops = [value for node in reversed(nodes) for value in node.tops]
    return SequenceScores(list(sequence), logprobs, tops if with_tops else None)


def _logprobs(head: Head, hidden: Tensor, targets: Tensor, temperature: float, top: int) -> tuple[list[float], list[Top]]:
    """Log-probs of the N targets and the `top` best tokens of each row; by the sampler's own calls, a chunk of logits at a time."""
    logprobs: list[float] = []
    tops: list[Top] = []
    vocab = head.weight.shape[0]
    heat, softcap = head.temperature(temperature), head.logit_softcap
    for part in even_chunks(0, len(targets), max(16, LOGITS_BYTES // (vocab * head.weight.element_size()))):
        with borrowed(len(targets[part]), vocab, head.weight) as buffer:
            logits = head_logits(hidden[part].to(head.weight.dtype), head.weight, head.bias, out=buffer)
            logprobs += logp_rows(logits, targets[part], temperature=heat, logit_softcap=softcap)[0].tolist()
            if top:
                tops += _best(logits, top, heat, softcap)
    return logprobs, tops


def _best(logits: Tensor, count: int, temperature: float, logit_softcap: float | None) -> list[Top]:
    """The most probable tokens of each row; each log-prob by the call that gives a drawn token's, so both are one number."""
    ids = logits.topk(count, 1).indices
    options = {"temperature": temperature, "logit_softcap": logit_softcap}
    columns = [logp_rows(logits, column.contiguous(), **options)[0].tolist() for column in ids.t()]  # type: ignore[arg-type]
    return [list(zip(row, values, strict=True)) for row, values in zip(ids.tolist(), zip(*columns, strict=True), strict=True)]
