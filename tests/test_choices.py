"""The text of /v1/completions goes on where the prompt's ends, piece by piece, also where a decoder drops a text's first space."""

from types import SimpleNamespace

import pytest
from tiny_server import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastalign.generation.stops import decode, special_ids
from fastalign.generation.streams import StreamDelta
from fastalign.generation.text import GrowingText
from fastalign.serving.choices import CompletionChoice
from fastalign.serving.service import PromptIds
from fastalign.serving.tokens import TokenNames


def spaced_tokenizer():
    """Puts "▁" before any text and drops a text's first space, as SentencePiece models do."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b", "ab", "▁ab"])}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab")], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_tokenizer():
    """Writes a space between any two tokens."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"sentencepiece": spaced_tokenizer, "words": word_tokenizer, "bytes": byte_tokenizer}
CASES = [
    ("sentencepiece", [1, 6, 4], [7, 5, 6], " bb a"),
    ("sentencepiece", [6], [5, 7], "b b"),  # goes on with the prompt's word
    ("sentencepiece", [6], [3, 3, 5], "  b"),
    ("sentencepiece", [6, 2], [1, 7, 2], " b"),  # special tokens have no text
    ("sentencepiece", [1], [7], "b"),  # nothing before it
    ("sentencepiece", [6], [2], ""),
    ("words", [3, 4], [5, 3], " ab a"),
    ("bytes", [70, 71], [35, 72, 73], None),
]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("kind, prompt, ids, text", CASES)
def test_a_completion_goes_on_where_the_prompt_ends(kind, prompt, ids, text, size, echo):
    tokenizer = TOKENIZERS[kind]()
    special = special_ids(tokenizer)
    service = SimpleNamespace(tokenizer=tokenizer, special=special, names=TokenNames(tokenizer))
    before = decode(tokenizer, prompt)
    choice = CompletionChoice(service, 0, PromptIds(prompt, before), echo=echo, scores=None, top=0)
    pieces = [] if choice.opening() is None else [choice.opening()]
    growing = GrowingText(tokenizer, (), special)
    for at in range(0, len(ids), size):
        new = ids[at : at + size]
        shown = growing.push(new) + (growing.finish() if at + size >= len(ids) else "")
        pieces.append(choice.piece(StreamDelta(0, new, shown, raw_logprobs=[-1.0] * len(new))))
    whole = choice.whole(pieces)
    opening = before if echo else ""
    assert before + whole["text"].removeprefix(opening) == decode(tokenizer, [*prompt, *ids])
    assert text is None or whole["text"] == opening + text
    ends = [len(decode(tokenizer, [*prompt, *ids[:n]])) for n in range(len(ids))]
    assert [len(before) - len(opening) + offset for offset in whole["logprobs"]["text_offset"]] == ends


@pytest.mark.parametrize(("ids", "text"), [([7], ""), ([4, 7], "a")])
def test_a_stop_token_brings_no_space(ids, text):
    tokenizer = spaced_tokenizer()
    service = SimpleNamespace(tokenizer=tokenizer, special=special_ids(tokenizer), names=TokenNames(tokenizer))
    choice = CompletionChoice(service, 0, PromptIds([6], "a"), echo=False, scores=None, top=None)
    pieces = [choice.piece(StreamDelta(0, ids, text, finish_reason="stop", stop_reason=7))]
    assert choice.whole(pieces)["text"] == text
