"""A judge's language model behind an OpenAI-compatible server, asked with the standard library alone."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import urlsplit

from ..generation import SamplingParams
from .asking import Question, shortened

logger = logging.getLogger("fastalign")

MOST_SECONDS = 60.0  # between two attempts
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class Refused(Exception):
    """The server answered with what is no reply. `again`: another attempt may help, after `seconds` if it says so."""

    def __init__(self, reason: str, again: bool, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.seconds = again, seconds


@dataclass(frozen=True)
class Patience:
    """How a server is asked.

    Attributes:
        concurrency: requests at once.
        timeout: seconds that the server may be silent in one attempt.
        retries: attempts after the first, for errors that may pass.
        backoff: seconds before the second attempt, doubled each time and drawn from its upper half.
    """

    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0 or self.backoff < 0:
            raise ValueError(f"judge: expected concurrency >= 1, timeout > 0, retries >= 0, backoff >= 0, got {self}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to a host that nobody named."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:
        return None


class ServerModel:
    """Replies of POST URL/chat/completions.

    Args:
        url: up to and with its version, http://localhost:8000/v1.
        name: of the model, as the server calls it; empty: the server's own choice, where it has one.
        params: temperature, top_p, max_tokens and seed; a vote's number is added to the seed.
        key_variable: the environment variable that holds the API key; empty: none is sent.
        patience: how often, how long and how many at once.

    Raises:
        ValueError: no http(s) URL, or the variable is not set.
    """

    def __init__(self, url: str, name: str, params: SamplingParams, *, key_variable: str = "", patience: Patience | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"judge: expected a URL as http://localhost:8000/v1, got {url!r}")
        if key_variable and not os.environ.get(key_variable):
            raise ValueError(f"judge: the environment variable {key_variable}, which key= names, is not set")
        self.url, self.name, self.params = url.rstrip("/") + "/chat/completions", name, params
        self.key_variable, self.patience = key_variable, patience or Patience()
        sampled = {key: getattr(params, key) for key in ("temperature", "top_p", "max_tokens", "seed")}
        self.identity: dict[str, Any] = {"model": f"{url.rstrip('/')} {name}".strip(), **sampled}
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._jitter = random.Random()

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
        """As `Model`. A question that the server does not answer has no reply, and is named in the log."""
        pool = ThreadPoolExecutor(min(self.patience.concurrency, max(1, len(questions))), thread_name_prefix="fastalign-judge")
        over = threading.Event()
        try:
            futures = {pool.submit(self._reply, question, over): i for i, question in enumerate(questions)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            over.set()  # an interrupt: what waits for its next attempt gives up
            pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, question: Question, over: threading.Event) -> str | None:
        for attempt in range(self.patience.retries + 1):
            try:
                return self._post(question)
            except Refused as refused:
                if refused.again and attempt < self.patience.retries and not over.is_set():
                    wait = self.patience.backoff * 2**attempt * self._jitter.uniform(0.5, 1.0)
                    over.wait(min(MOST_SECONDS, wait if refused.seconds is None else refused.seconds))
                    continue
                tries = f"after {attempt + 1} attempts" if attempt else "at the first attempt"
                logger.warning("judge %s: no reply %s: %s; it was asked %s", self.url, tries, refused, shortened(question.messages[-1][1]))
                return None
        raise AssertionError("the last attempt returns")

    def _post(self, question: Question) -> str:
        body: dict[str, Any] = {"messages": question.conversation, "temperature": self.params.temperature}
        body |= {"top_p": self.params.top_p, "max_tokens": self.params.max_tokens}
        body |= {"model": self.name} if self.name else {}
        body |= {"seed": self.params.seed + question.draw} if self.params.seed is not None else {}
        headers = {"Content-Type": "application/json", "User-Agent": "fastalign"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_variable, '')}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.patience.timeout) as response:
                return _content(response.read())
        except urllib.error.HTTPError as error:
            with error:
                told = error.read(500).decode("utf-8", "replace")
            raise Refused(f"HTTP {error.code}: {' '.join(told.split())}", error.code in RETRIED, _retry_after(error.headers)) from error
        except (OSError, HTTPException) as error:  # refused, reset, timed out, cut off
            raise Refused(f"{type(error).__name__}: {error}", True) from error


def _retry_after(headers: Message) -> float | None:
    """Seconds that the server asks to wait; None where it says nothing that can be read."""
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except ValueError:
        return None


def _content(body: bytes) -> str:
    """The reply in a chat completion.

    Raises:
        Refused: there is none.
    """
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Refused(f"expected a chat completion, got {shortened(body[:300].decode('utf-8', 'replace'))}", False) from error
    if not isinstance(content, str):
        raise Refused("the chat completion has no text", False)
    return content
