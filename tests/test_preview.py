"""The preview of token trees: what is scored is marked, in a terminal and without one."""

import io

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastalign.packing import Segment, conversation, group, pair
from fastalign.recipes.preview import GIVEN, preview, render


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def lines(tokenizer, trees, terminal=False, **options):
    out = io.StringIO()
    preview(trees, tokenizer, console=Console(file=out, force_terminal=terminal, width=60, soft_wrap=True, highlight=False), **options)
    return out.getvalue().splitlines()


def test_preview_marks_the_scored_runs(tokenizer):
    text = "Q: 1+1? A: 2. Q: é? A: ü."
    flags = [i in range(11, 13) or i >= len(text.encode()) - 3 for i in range(len(text.encode()))]
    shown = lines(tokenizer, [conversation(ids(tokenizer, text), flags)])
    assert shown == ["── example 1 of 1: 27 tokens, 5 scored", "Q: 1+1? A: ⟦2.⟧ Q: é? A: ⟦ü.⟧"]


def test_preview_never_marks_the_first_token_of_a_root(tokenizer):
    assert lines(tokenizer, [conversation(ids(tokenizer, "abc"))])[1] == "a⟦bc⟧"
    empty = Segment([], children=(Segment(ids(tokenizer, "abc"), True),))
    assert lines(tokenizer, [empty])[2] == "1 a⟦bc⟧"


def test_preview_names_the_branches_of_a_tree(tokenizer):
    encode = lambda text: ids(tokenizer, text)  # noqa: E731
    deep = Segment(encode("r"), False, (Segment(encode("a"), True, (Segment(encode("b"), True), Segment(encode("c"), False))),))
    shown = lines(tokenizer, [pair(encode("q?"), encode("yes"), encode("no")), group(encode("p"), [encode("x")]), deep])
    assert shown[1:4] == ["q?", "1 ⟦yes⟧", "2 ⟦no⟧"]
    assert shown[5:7] == ["p", "1 ⟦x⟧"]
    assert shown[8:] == ["r", "1 ⟦a⟧", "1.1 ⟦b⟧", "1.2 c"]


def test_preview_shows_a_few_and_their_weights(tokenizer):
    shown = lines(tokenizer, [conversation(ids(tokenizer, "ab"), weight=0.5)] * 9, num_trees=2)
    assert shown[::2] == [f"── example {number} of 9: 2 tokens, 1 scored" for number in (1, 2)]
    assert shown[1::2] == ["a⟦b⟧ (weight 0.5)"] * 2


def test_preview_cuts_the_middle_of_long_runs(tokenizer):
    line = lines(tokenizer, [conversation(ids(tokenizer, "a" * 1000 + "b" * 700), [False] * 1000 + [True] * 700)])[1]
    assert line == "a" * 300 + " … 400 tokens … " + "a" * 300 + "⟦" + "b" * 300 + " … 100 tokens … " + "b" * 300 + "⟧"


def test_preview_in_a_terminal_colours_tokens(tokenizer):
    segment = conversation(ids(tokenizer, "qé\n!"), [False, True, True, True, True])
    (line,) = render(segment, tokenizer, coloured=True)
    spans = [(line.plain[s.start : s.end], str(s.style)) for s in line.spans]
    assert spans == [
        ("q", GIVEN),
        ("é", "black on bright_green"),
        ("⏎\n", "black on green"),
        ("!", "black on bright_green"),
    ]
    shown = "\n".join(lines(tokenizer, [segment], terminal=True))
    assert "\x1b[30;42m" in shown
    assert "⟦" not in shown
