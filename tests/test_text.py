"""Text that grows: its pieces are the finished completion's text, nothing is taken back, and a token costs a window."""

import random

import pytest
from test_stops import STORIES, Pieces

from fastalign.generation.stops import StopScanner
from fastalign.generation.text import WINDOW, GrowingText, begun_stop, completion_text, special_ids
from fastalign.models.load import load_tokenizer

EURO = "€".encode()
BYTES = Pieces("a", "b", "ab", "ba", "é", "é".encode()[:1], "é".encode()[1:], "c", b"\xff", EURO[:1], EURO[1:2], EURO[2:])


def pieces_of(growing, ids, generator):
    """Pushes ids in runs of random lengths."""
    at, pieces = 0, []
    while at < len(ids):
        count = generator.choice([1, 1, 1, 2, 5])
        pieces.append(growing.push(ids[at : at + count]))
        at += count
    return pieces


def test_text_pieces_are_the_whole_text():
    generator = random.Random(0)
    for _ in range(500):
        ids = [generator.randrange(12) for _ in range(60)]
        growing = GrowingText(BYTES)
        pieces = pieces_of(growing, ids, generator)
        assert "".join([*pieces, growing.finish()]) == BYTES.decode(ids)


def test_text_pieces_end_before_the_stop_string():
    """Completions that a scanner stops, as the engine does; min_tokens too, before which a stop string is plain text."""
    generator = random.Random(1)
    stopped = 0
    for round_ in range(600):
        stops, min_tokens = [("abba", "éc"), ("aa",), ("€a", "ab€")][round_ % 3], generator.choice([0, 0, 5, 12])
        scanner, ids, found = StopScanner(BYTES, stops), [], None
        while found is None and len(ids) < 60:
            ids.append(generator.randrange(12))
            found = scanner.push(ids[-1]) if len(ids) >= min_tokens else scanner.push(ids[-1]) and None
        growing = GrowingText(BYTES, stops)
        pieces = pieces_of(growing, ids[:-1], generator)
        growing.ids.append(ids[-1])
        pieces.append(growing.finish(found, min_tokens))
        text = "".join(pieces)
        assert text == completion_text(BYTES, ids, found, min_tokens)
        if found is not None:
            stopped += 1
            assert BYTES.decode(ids).startswith(text + found)
            if not min_tokens:
                assert not any(stop in text for stop in stops)
    assert stopped > 250


def test_text_holds_back_what_may_become_a_stop_string_or_a_character():
    tokenizer = Pieces("x", "<", "/s", ">", EURO[:2], EURO[2:])
    growing = GrowingText(tokenizer, ("</s>",))
    assert [growing.push([token]) for token in (0, 1, 2, 0, 1, 2)] == ["x", "", "", "</sx", "", ""]
    growing.ids.append(3)
    assert growing.finish("</s>") == ""
    euro = GrowingText(tokenizer)
    assert [euro.push([token]) for token in (0, 4, 5, 4)] == ["x", "", "€", ""]
    assert euro.finish() == "\ufffd"


def test_text_lets_broken_bytes_go():
    """Bytes that no character waits for do not hold the text back for ever."""
    tokenizer = Pieces(b"\xff", "é".encode()[:1], "é".encode()[1:])
    growing = GrowingText(tokenizer)
    shown = "".join(growing.push([0]) for _ in range(100))
    assert len(shown) >= 95
    assert shown + growing.push([1]) + growing.push([2]) + growing.finish() == "\ufffd" * 100 + "é"


def test_text_reads_a_window_a_token():
    read = []

    class Counting(Pieces):
        def decode(self, ids, **options):
            read.append(len(ids))
            return super().decode(ids, **options)

    growing = GrowingText(Counting("word ", "."), ("\n\n",))
    for _ in range(2000):
        growing.push([0])
    assert max(read) <= WINDOW + 1
    assert sum(read) <= 2000 * 1.5 * WINDOW


@pytest.mark.parametrize("text, held", [("", 0), ("ab", 2), ("xab", 2), ("xabc", 0), ("b", 0), ("x\n", 1)])
def test_text_begun_stop(text, held):
    assert begun_stop(text, ("abc", "\n\n", "a")) == held


def test_text_of_a_sentencepiece_tokenizer():
    if not STORIES.is_dir():
        pytest.skip("the pretrained stories260k model is not beside the project")
    tokenizer, generator = load_tokenizer(str(STORIES)), random.Random(2)
    special = special_ids(tokenizer)
    assert special >= set(tokenizer.all_special_ids)
    for _ in range(60):
        ids = [generator.choice([*special]) if generator.random() < 0.2 else generator.randrange(259, len(tokenizer)) for _ in range(80)]
        growing = GrowingText(tokenizer, ("the",), special)
        assert "".join([*pieces_of(growing, ids, generator), growing.finish()]) == tokenizer.decode(ids, skip_special_tokens=True)
    text = "Once upon a time " * 20 + "日本語 was 5 € ok"
    ids = tokenizer(text).input_ids
    growing = GrowingText(tokenizer)
    assert "".join([*pieces_of(growing, ids, generator), growing.finish()]) == text
