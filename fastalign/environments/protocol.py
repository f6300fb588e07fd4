"""What an environment is, and what of it the sampler must know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Environment(Protocol):
    """The other side of one conversation: a tool, a game, a user. Every sample gets an instance of its own.

    A class may say more about itself:
        stop: texts that end the model's turn, besides the end-of-sequence token, such as the end of a tool call.
        role: who speaks its observations where the prompt is a conversation; "tool" unless it says otherwise, and "user" where the
            chat template has no such role.
        immediate: its calls end at once by themselves, so that they need no thread and no time limit; False unless it says so.
        gives_reward: its steps' rewards count; True unless it says otherwise, as tools without an aim of their own do.
    """

    def reset(self, **columns: Any) -> str | None:
        """Begins the conversation.

        Args:
            columns: those of the record's columns that the signature names, and of `prompt` (as the rewards get it) and `seed` (an
                integer of this sample's own, the same when a run is repeated).

        Returns:
            A first observation, which follows the prompt, or None.
        """

    def step(self, text: str) -> tuple[str | None, float | None, bool]:
        """Answers one turn of the model.

        Args:
            text: what the model wrote in this turn, with the stop text that ended it, without the end-of-sequence token.

        Returns:
            (observation, reward, done): what the model reads before its next turn; what this turn adds to the sample's reward (None
            is 0); whether this was the last turn, whose observation nobody reads.
        """


@dataclass(frozen=True)
class Kind:
    """An environment as a run uses it.

    Attributes:
        name: in metrics and logs.
        make: gives a fresh instance.
        columns: the names that its `reset` takes; None: any.
        required: those of them without a default.
        stop, role, immediate, gives_reward: what the class says of itself (`Environment`).
    """

    name: str
    make: Callable[[], Any]
    columns: frozenset[str] | None
    required: tuple[str, ...]
    stop: tuple[str, ...] = ()
    role: str = "tool"
    immediate: bool = False
    gives_reward: bool = True

    @property
    def reward(self) -> str:
        """The name of its reward beside the others."""
        return f"environment/{self.name}"
