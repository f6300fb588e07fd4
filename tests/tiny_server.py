"""A small model with a byte-level tokenizer behind a real server on a free port of the loopback device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tiny_models import llama, ready
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastalign.generation import AsyncEngine, Engine

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'banned' %}{{ raise_exception('no such role: banned') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Any:
    """One token a byte: a random model writes many unfinished and broken characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def byte_model() -> Any:
    """A random model of that vocabulary."""
    return ready(llama(vocab_size=259, max_position_embeddings=192))


def make_engine(model: Any, **options: Any) -> Engine:
    """An engine over it."""
    return Engine(model, byte_tokenizer(), **options)


@contextmanager
def serving(engine: AsyncEngine, name: str = "tiny", **options: Any) -> Iterator[Any]:
    """The server in a thread; its `url` is where clients go. The engine ends with it."""
    from fastalign.serving.server import Server

    server = Server(engine, name, "127.0.0.1", 0, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    give_up = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < give_up:
        time.sleep(0.01)
    assert server.started
    server.url = "http://{}:{}".format(*server.address)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
