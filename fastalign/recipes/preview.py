"""What training will see: token trees as text, the scored tokens marked. `--dry_run` prints a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ..packing import Segment

NUM_TREES = 3
MAX_CHARACTERS = 600  # of one run of tokens; more is cut out of its middle
SCORED = ("black on green", "black on bright_green")  # alternating, so that tokens can be told apart
GIVEN = "dim"
OPEN, CLOSE = "⟦", "⟧"


def preview(trees: Sequence[Segment], tokenizer: Any, *, num_trees: int = NUM_TREES, console: Console | None = None) -> None:
    """Prints the first token trees: what is given, and highlighted what is scored; plain ⟦marks⟧ where there is no terminal.

    Args:
        trees: conversations, pairs, groups, or deeper.
        tokenizer: decodes the ids; special tokens are shown.
        num_trees: how many trees to show.
        console: where to; None: stdout.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    for number, tree in enumerate(trees[:num_trees], 1):
        scored = sum(sum(flags) for _, flags in _walk(tree))
        console.print(Text(f"── example {number} of {len(trees)}: {tree.num_tokens} tokens, {scored} scored", style="bold"))
        for line in render(tree, tokenizer, coloured=console.is_terminal):
            console.print(line)


def render(tree: Segment, tokenizer: Any, *, coloured: bool) -> list[Text]:
    """A tree's segments as text, each behind the name of its place: children are 1, 2, …, theirs 1.1, 1.2, …"""
    lines = []
    for (name, segment, before), (_, flags) in zip(_named(tree), _walk(tree), strict=True):
        line = Text(f"{name} " if name else "")
        for piece in _runs(segment, flags, before, tokenizer):
            line.append_text(_styled(*piece, coloured))
        if segment.weight != 1.0 and isinstance(segment.weight, int | float):
            line.append(f" (weight {segment.weight:g})")
        lines.append(line)
    return lines


def _walk(root: Segment) -> Iterator[tuple[Segment, list[bool]]]:
    """Every segment, parents first, with one flag a token; a root's first token is never scored."""
    stack = [(root, True)]
    while stack:
        segment, first = stack.pop()
        flags = [segment.scored] * len(segment.ids) if isinstance(segment.scored, bool) else list(segment.scored)
        if first and flags:
            flags[0] = False
        yield segment, flags
        stack += [(child, first and not segment.ids) for child in reversed(segment.children)]


def _named(root: Segment) -> Iterator[tuple[str, Segment, list[int]]]:
    """Every segment in the order of `_walk`, with its name and the token that it continues."""
    stack: list[tuple[str, Segment, list[int]]] = [("", root, [])]
    while stack:
        name, segment, before = stack.pop()
        yield name, segment, before
        last = list(segment.ids[-1:]) or before
        children = [(f"{name}.{k}" if name else str(k), child, last) for k, child in enumerate(segment.children, 1)]
        stack += reversed(children)


def _runs(segment: Segment, flags: Sequence[bool], before: list[int], tokenizer: Any) -> Iterator[tuple[list[str], bool]]:
    """Runs of equal flags, as the texts of their tokens."""
    texts = _pieces(tokenizer, segment.ids, before)
    begin = 0
    for end in range(1, len(texts) + 1):
        if end == len(texts) or flags[end] != flags[begin]:
            yield texts[begin:end], flags[begin]
            begin = end


def _pieces(tokenizer: Any, ids: Sequence[int], before: list[int]) -> list[str]:
    """The text that each token adds, decoded behind the one before it; a character's bytes are shown with its last token."""
    pending: list[int] = []
    pieces, settled = [], list(before)
    for token in ids:
        pending = [*pending, token]
        known = tokenizer.decode(settled, clean_up_tokenization_spaces=False) if settled else ""
        text = tokenizer.decode([*settled, *pending], clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and len(pending) < 4
        pieces.append("" if unfinished else text[len(known) :])
        if not unfinished:
            settled, pending = pending, []
    if pending:
        pieces[-1] = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
    return pieces


def _styled(pieces: list[str], scored: bool, coloured: bool) -> Text:
    pieces = _shortened(pieces)
    if not coloured:
        text = "".join(pieces)
        return Text(f"{OPEN}{text}{CLOSE}" if scored else text)
    if not scored:
        return Text("".join(pieces), style=GIVEN)
    line = Text()
    for number, piece in enumerate(pieces):
        line.append(piece.replace("\n", "⏎\n"), style=SCORED[number % 2])  # a background alone would not show a newline
    return line


def _shortened(pieces: list[str]) -> list[str]:
    """The pieces, without the middle of a run that is too long."""
    if sum(map(len, pieces)) <= MAX_CHARACTERS:
        return pieces
    ends = []
    for side in (pieces, pieces[::-1]):
        length, count = 0, 0
        while count < len(side) and length + len(side[count]) <= MAX_CHARACTERS // 2:
            length, count = length + len(side[count]), count + 1
        ends.append(count)
    front, back = ends
    return [*pieces[:front], f" … {len(pieces) - front - back} tokens … ", *pieces[len(pieces) - back :]]
