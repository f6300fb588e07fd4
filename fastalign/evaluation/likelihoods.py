"""Log-likelihoods of continuations and texts, as multiple-choice and perplexity benchmarks ask for them, through the engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

from ..generation import Engine
from ..generation.requests import Limits

logger = logging.getLogger("fastalign")

CHUNK = 4096  # sequences scored in one call: what they begin with alike is forwarded once
Ids = list[int]


class Likelihoods:
    """Scores text with an engine's model. Conventions are those of the lm-evaluation-harness, so that numbers compare.

    Args:
        engine: with a tokenizer.
        max_length: most tokens of a sequence; None: what the model reads.
        add_bos_token: put the beginning-of-sequence token in front of every context.

    Raises:
        ValueError: a limit over the model's, or a tokenizer without a token to begin with.
    """

    def __init__(self, engine: Engine, *, max_length: int | None = None, add_bos_token: bool = False) -> None:
        self.engine, self.tokenizer, self.add_bos_token = engine, engine.tokenizer, add_bos_token
        longest = Limits.of(engine.model, engine.tokenizer).max_length
        if max_length is not None and (max_length < 2 or (longest is not None and max_length > longest)):
            raise ValueError(f"likelihoods: max_length must be between 2 and the model's {longest}, got {max_length}")
        self.max_length = max_length or longest or 2**20
        begins = [token for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if token is not None]
        if not begins:
            raise ValueError("likelihoods: the tokenizer has neither a BOS nor an EOS token for a text to begin with")
        self.prefix: int = begins[0]
        self._told = False

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding says the same) of each (context, continuation).

        A context that is too long loses its beginning. White space at a context's end belongs to the continuation.
        """
        return self._score([self.encode_pair(*pair) for pair in pairs])

    def texts(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text, in nats. A longer text is cut into windows; each token is predicted once.

        The last window reaches back as far as the model reads; the others stand behind the token before them.
        """
        windows = [list(self.windows(self.encode(text))) for text in texts]
        scores = iter(self._score([window for own in windows for window in own]))
        return [math.fsum(next(scores)[0] for _ in own) for own in windows]

    def encode(self, text: str) -> Ids:
        """Ids without special tokens but those in the text, and BOS where that is asked and the text has none."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.prefix, *ids] if self.add_bos_token and ids[:1] != [self.prefix] else ids

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Both in ids, split where the context ends when it is tokenized alone."""
        if not context:
            ids = self.tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
            return ([self.prefix], ids) if ids[:1] != [self.prefix] or len(ids) < 2 else (ids[:1], ids[1:])
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        begin = self.encode(context) or [self.prefix]
        rest = self.encode(context + continuation)[len(begin) if context else 0 :]
        return begin, rest or self.tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]

    def windows(self, ids: Ids) -> Iterator[tuple[Ids, Ids]]:
        """(context, what is predicted) of each window, at most `max_length` tokens together."""
        size = self.max_length - 1  # a window's predictions: the token before them is its context
        if ids:
            yield [self.prefix], ids[:size]
        for begin in range(size, len(ids), size):
            end = min(begin + size, len(ids))
            yield ids[max(0, end - self.max_length) : begin], ids[begin:end]

    def _score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        sequences = []
        for context, rest in pairs:
            if len(context) + len(rest) > self.max_length:
                self._tell_of_cut()
            sequences.append([*context, *rest][-self.max_length :])
        found: list[tuple[float, bool]] = []
        for start in range(0, len(pairs), CHUNK):
            scores = self.engine.score(sequences[start : start + CHUNK], top_logprobs=1)
            for (_, rest), score in zip(pairs[start : start + CHUNK], scores, strict=True):
                count = min(len(rest), len(score.token_ids) - 1)
                ids, tops = score.token_ids[len(score.token_ids) - count :], score.top_logprobs or []
                values = score.logprobs[len(score.logprobs) - count :]
                greedy = all(top is not None and top[0][0] == token for top, token in zip(tops[len(tops) - count :], ids, strict=True))
                found.append((math.fsum(value or 0.0 for value in values), greedy))
        return found

    def _tell_of_cut(self) -> None:
        if not self._told:
            self._told = True
            logger.warning("likelihoods: contexts are cut from the left to the %d tokens that are read", self.max_length)
