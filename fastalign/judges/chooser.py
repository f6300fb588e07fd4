"""The better of two answers by the log-probs of one letter: a soft label without a word generated (arXiv:2212.08073, section 4.1)."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

from ..data.chat import ChatEncoder
from ..data.records import Record
from ..data.tokens import TextEncoder
from ..generation import Engine
from ..models.backbone import causal_lm
from .asking import shortened
from .judge import Comparison, filled
from .templates import CHOOSE, Template, as_text

logger = logging.getLogger("fastalign")

LETTERS = "A", "B"


class Chooser:
    """p(A) / (p(A) + p(B)), the mean of both orders, which cancels what a model gives to a place.

    Args:
        engine: over the model and with its tokenizer; a chat template is used where there is one.
        template: of kind choose.

    Raises:
        ValueError: another kind, or a tokenizer without tokens for the letters.
    """

    def __init__(self, engine: Engine, template: Template) -> None:
        if template.kind != CHOOSE:
            raise ValueError(f"Chooser: expected a template of kind {CHOOSE}, got {template.kind}")
        self.engine, self.template = engine, template
        self.text, self.chat = TextEncoder(engine.tokenizer), ChatEncoder(engine.tokenizer)
        self.is_chat = bool(engine.tokenizer.chat_template)
        letters = self.text.pieces([letter if self.is_chat else f" {letter}" for letter in LETTERS])
        if not all(letters):
            raise ValueError(f"Chooser: the tokenizer has no tokens of their own for {' and '.join(LETTERS)}")
        self.letters = [ids for ids in letters if ids is not None]
        config: Any = causal_lm(engine.model).config
        self.max_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._lock = threading.Lock()

    def compare(self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any], **columns: Sequence[Any]) -> list[Comparison]:
        """[B] comparisons; their scores are probabilities. None for a pair that is longer than the model reads."""
        pairs = [(as_text(p), as_text(a), as_text(b)) for p, a, b in zip(prompts, firsts, seconds, strict=True)]
        forth = filled(self.template, [{"prompt": p, "first": a, "second": b} for p, a, b in pairs], columns)
        back = filled(self.template, [{"prompt": p, "first": b, "second": a} for p, a, b in pairs], columns)
        shares = self._shares([*forth, *back])
        found = []
        for one, other in zip(shares[: len(pairs)], shares[len(pairs) :], strict=True):
            if one is None or other is None:
                found.append(Comparison(None, None))
            else:
                found.append(Comparison((one + 1 - other) / 2, float((one > 0.5) == (other < 0.5))))
        return found

    def _shares(self, asked: list[list[str]]) -> list[float | None]:
        """p(A) against p(B) of each (system message, turn); the text before the letter is forwarded once."""
        sequences, owners = [], []
        for i, (system, turn) in enumerate(asked):
            ids = self._encode(system, turn)
            if self.max_length is not None and len(ids) + max(map(len, self.letters)) > self.max_length:
                logger.warning("judge: %d tokens pass the model's %d; it was to choose in %s", len(ids), self.max_length, shortened(turn))
                continue
            owners.append((i, len(ids)))
            sequences += [[*ids, *letter] for letter in self.letters]
        with self._lock:
            scores = iter(self.engine.score(sequences)) if sequences else iter(())
        shares: list[float | None] = [None] * len(asked)
        for i, begin in owners:
            a, b = (math.fsum(value or 0.0 for value in next(scores).logprobs[begin:]) for _ in LETTERS)
            shares[i] = 1 / (1 + math.exp(min(b - a, 700.0)))
        return shares

    def _encode(self, system: str, turn: str) -> list[int]:
        if not self.is_chat:
            return self.text.prompts([f"{system}\n\n{turn}" if system else turn])[0]
        messages = [{"role": "system", "content": system}] if system else []
        return self.chat.prompt(Record({}, "judge", 0), [*messages, {"role": "user", "content": turn}])
