"""Stop tokens and stop strings, on a byte-level toy tokenizer and on a real pretrained model when it is there."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny_models import values
from tokenizers import AddedToken

from fastalign.generation import Engine, SamplingParams
from fastalign.generation.requests import Limits, stop_ids
from fastalign.generation.stops import StopScanner, StopTable, first_stop, special_id
from fastalign.models.load import load_causal_lm, load_tokenizer

STORIES = Path(__file__).parent.parent.parent / "shared" / "models" / "stories260k"


class Pieces:
    """Token i is the bytes pieces[i]; unfinished characters decode to U+FFFD as in any byte-level tokenizer."""

    def __init__(self, *pieces):
        self.pieces = [p.encode() if isinstance(p, str) else p for p in pieces]

    def decode(self, ids, **_):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def stopped_at(tokenizer, ids, *stops):
    """(tokens read, string) when the scanner first finds a stop."""
    scanner = StopScanner(tokenizer, stops)
    for count, token in enumerate(ids, 1):
        found = scanner.push(token)
        if found:
            return count, found
    return None


def test_stop_strings_across_token_borders():
    tokenizer = Pieces("a", "<", "/s", ">", "x</s>y", "\n", "\n\n")
    assert stopped_at(tokenizer, [0, 0, 1, 2, 3, 0], "</s>") == (5, "</s>")
    assert stopped_at(tokenizer, [0, 4, 0], "</s>") == (2, "</s>")
    assert stopped_at(tokenizer, [0, 1, 2, 0, 3], "</s>") is None
    assert stopped_at(tokenizer, [0, 5, 5, 0], "\n\n") == (3, "\n\n")
    assert stopped_at(tokenizer, [0, 6], "\n\n", "\n") == (2, "\n\n")


def test_stop_strings_are_found_when_they_are_completed_and_not_again():
    scanner = StopScanner(Pieces("a", "b", "c"), ["b", "cccc"])
    assert [scanner.push(token) for token in (0, 1, 0, 2, 1)] == [None, "b", None, None, "b"]


def test_stop_strings_behind_a_special_token():
    """As sentencepiece decodes: a leading space is dropped, so that a window of special tokens alone would take it from what follows."""

    class Words(Pieces):
        all_special_ids = (2,)

        def decode(self, ids, **_):
            return super().decode([i for i in ids if i not in self.all_special_ids]).removeprefix(" ")

    tokenizer = Words(" the", " was", "</s>")
    assert stopped_at(tokenizer, [0, 2, 1], " was") == (3, " was")
    assert stopped_at(tokenizer, [0, 2, 2, 1], "thewas") is None


def test_stop_strings_among_unfinished_characters():
    euro = "€".encode()
    tokenizer = Pieces("a", euro[:1], euro[1:2], euro[2:], b"END" + euro[:2], b"\xff")
    assert stopped_at(tokenizer, [0, 1, 2, 3, 0], "€a") == (5, "€a")
    assert stopped_at(tokenizer, [0, 4, 3], "END") == (2, "END")
    assert stopped_at(tokenizer, [5] * 40 + [0, 0], "aa") == (42, "aa")


def test_stop_scanner_finds_what_a_full_decode_finds():
    generator = torch.Generator().manual_seed(0)
    tokenizer = Pieces("a", "b", "ab", "ba", "é", "é".encode()[:1], "é".encode()[1:], "c")
    for _ in range(300):
        ids = torch.randint(0, 8, (40,), generator=generator).tolist()
        wanted = next((n for n in range(1, 41) if "abba" in tokenizer.decode(ids[:n]) or "éc" in tokenizer.decode(ids[:n])), None)
        found = stopped_at(tokenizer, ids, "abba", "éc")
        assert (found[0] if found else None) == wanted


def test_first_stop_is_the_one_that_begins_first():
    assert first_stop("one two three", ["three", "two"]) == (4, "two")
    assert first_stop("aab", ["aa", "aab"]) == (0, "aab")
    assert first_stop("aab", ["c"]) is None


def test_stop_table_keeps_equal_sets_once():
    table = StopTable(10)
    assert [table.add(ids) for ids in ([1, 2], [2, 1], [], [3])] == [0, 0, 1, 2]
    assert table.table[0].nonzero()[0].tolist() == [1, 2]
    assert not table.table[1].any()


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir():
        pytest.skip("the pretrained stories260k model is not beside the project")
    return load_causal_lm(str(STORIES)), load_tokenizer(str(STORIES))


def test_engine_greedy_text_is_model_generate(stories):
    model, tokenizer = stories
    prompts = ["Once upon a time", "The dog and the cat", "One day, Lily"]
    engine = Engine(model, tokenizer)
    for out, prompt in zip(engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=60)), prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        wanted = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids.input_ids.shape[1] :].tolist()
        assert out.outputs[0].token_ids == wanted
        assert out.prompt == prompt
        assert out.outputs[0].text == tokenizer.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("stop", [". She", "ly", " little girl named", "\n"])
def test_engine_stop_strings(stories, stop):
    model, tokenizer = stories
    engine = Engine(model, tokenizer)
    params = {"temperature": 0.0, "max_tokens": 120}
    free = engine.generate("Once upon a time", SamplingParams(**params))[0].outputs[0]
    out = engine.generate("Once upon a time", SamplingParams(**params, stop=stop))[0].outputs[0]
    assert stop in free.text
    assert out.text == free.text[: free.text.index(stop)]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert out.token_ids == free.token_ids[: len(out.token_ids)]
    assert out.logprobs == free.logprobs[: len(out.token_ids)]
    assert stop in tokenizer.decode(out.token_ids)
    assert stop not in tokenizer.decode(out.token_ids[:-1])


def test_engine_stop_strings_survive_preemption(stories):
    model, tokenizer = stories
    params = SamplingParams(n=6, max_tokens=60, seed=3, stop=["."])
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "Tom")]
    roomy, tight = Engine(model, tokenizer), Engine(model, tokenizer, kv_cache_tokens=96)
    assert values(tight.rollout(prompts, params)) == values(roomy.rollout(prompts, params))
    assert tight.stats.preemptions > 0


def test_stop_ids_of_a_special_token_as_stop_string(stories):
    model, tokenizer = stories
    limits = Limits.of(model, tokenizer)
    params = SamplingParams(stop=[tokenizer.eos_token, "x"], stop_token_ids=[7], ignore_eos=True)
    assert set(stop_ids(params, limits, tokenizer)) == {7, tokenizer.eos_token_id}
    assert tokenizer.eos_token_id in stop_ids(SamplingParams(), limits, tokenizer)


def test_stop_strings_that_are_special_and_in_no_map_of_special_tokens():
    """As Llama 3's <|eot_id|>: `decode` leaves them out, so that no text shows them."""

    class Added(Pieces):
        added_tokens_decoder: ClassVar = {2: AddedToken("<|eot|>", special=True), 1: AddedToken("<tool>", special=False)}
        all_special_tokens: ClassVar = ["</s>"]

        def convert_tokens_to_ids(self, text):
            return self.pieces.index(text.encode()) if text.encode() in self.pieces else None

        def convert_ids_to_tokens(self, number):
            return self.pieces[number].decode()

    tokenizer = Added(" the", "<tool>", "<|eot|>")
    assert [special_id(tokenizer, text) for text in ("<|eot|>", "<tool>", " the", "none")] == [2, None, None, None]
    params = SamplingParams(stop=["<|eot|>", "<tool>"], ignore_eos=True)
    assert set(stop_ids(params, Limits(3, 3, 10, frozenset()), tokenizer)) == {2}
