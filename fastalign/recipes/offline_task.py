"""What the tasks of given data share: the order of the records, and an engine that shows samples and is told of new weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..data import DataOrder, MixtureOrder, SegmentStream
from ..generation import Engine, SamplingParams
from ..training.step import Updater
from .samples import greedy_samples


class OfflineTask:
    """Draws records and updates; what a step does with them is the subclass's.

    Args:
        updater: of the model that is trained.
        order: which records come next.
        batch_size: records an optimizer step.
        max_tokens_per_micro_batch: tokens forwarded at once.
        engine: samples for the report; None: there are none.
        show_prompts: (text, ids) of the prompts that it completes.
        show_params: how.
    """

    def __init__(
        self,
        *,
        updater: Updater,
        order: DataOrder | MixtureOrder | SegmentStream,
        batch_size: int,
        max_tokens_per_micro_batch: int,
        engine: Engine | None = None,
        show_prompts: Sequence[tuple[str, list[int]]] | None = None,
        show_params: SamplingParams | None = None,
    ):
        self.updater = updater
        self.order: Any = order  # indices or, of a stream, the records themselves: its subclass knows
        self.batch_size, self.max_tokens = batch_size, max_tokens_per_micro_batch
        self.engine, self.show_prompts, self.show_params = engine, list(show_prompts or []), show_params

    def commit(self, apply: Callable[[], None]) -> None:
        """Changes the weights; the engine learns of it."""
        if self.engine is None:
            apply()
        else:
            with self.engine.updating_weights():
                apply()

    def show(self) -> list[dict[str, Any]]:
        """Greedy completions of a few prompts."""
        return greedy_samples(self.engine, self.show_prompts, self.show_params)

    def state_dict(self) -> dict:
        return {"order": self.order.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
