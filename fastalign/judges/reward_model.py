"""A trained reward model as a reward: completions packed behind their prompts, each prompt forwarded once."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.candidates import shared_tree
from ..data.chat import ChatEncoder
from ..data.places import read_place
from ..data.records import Record
from ..data.steps import StepEncoder
from ..data.tokens import TextEncoder
from ..losses.reward import aggregate_steps
from ..models.load import load_tokenizer
from ..models.reward import load_reward_model, score_trees
from ..packing import Segment

logger = logging.getLogger("fastalign")

Conversation = list[dict[str, Any]]


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether both turn any text and any conversation into the same ids."""
    if hasattr(one, "backend_tokenizer") and hasattr(other, "backend_tokenizer"):
        same = _rules(one) == _rules(other)
    else:
        same = type(one) is type(other) and one.get_vocab() == other.get_vocab()
    return same and (one.chat_template, one.eos_token_id) == (other.chat_template, other.eos_token_id)


class RewardModel:
    """Scores completions with TRL's reward signature: `judge(prompts, completions, completion_ids)` → rewards.

    A model of outcomes or rankings gives the score at the end. One of steps (its config has `step_separator`) gives its steps'
    probabilities σ(score), aggregated as its config says.

    Args:
        model: from `load_reward_model`.
        tokenizer: the reward model's.
        policy_tokenizer: whose `completion_ids` are reused where it is the same tokenizer; otherwise the text is encoded anew.
        max_tokens: tokens forwarded at once.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, policy_tokenizer: Any = None, *, max_tokens: int = 8192) -> None:
        self.model, self.tokenizer, self.max_tokens = model.eval().requires_grad_(False), tokenizer, max_tokens
        self.policy_tokenizer = policy_tokenizer
        self.reuses_ids = policy_tokenizer is not None and same_tokenizer(tokenizer, policy_tokenizer)
        self.text, self.chat = TextEncoder(tokenizer), ChatEncoder(tokenizer)
        config: Any = model.config
        self.pad_token_id = config.get_text_config().pad_token_id
        self.max_length = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.aggregation = getattr(config, "step_aggregation", "product")
        separator = getattr(config, "step_separator", None)
        self.steps = StepEncoder(tokenizer, separator) if separator else None
        self.separator = separator
        self._tail: list[int] | None = None
        self._told = False

    @classmethod
    def load(
        cls, name_or_path: str, policy_tokenizer: Any = None, *, dtype: str = "auto", device: torch.device | str = "cpu"
    ) -> RewardModel:
        """Loads a folder that `fastalign reward` wrote, or any one-label sequence classifier of a causal family.

        Raises:
            ValueError, UnsupportedModelError: as `load_reward_model`.
        """
        tokenizer = load_tokenizer(name_or_path)
        return cls(load_reward_model(name_or_path, tokenizer, dtype=dtype, device=device), tokenizer, policy_tokenizer)

    def __call__(
        self,
        prompts: Sequence[str | Conversation],
        completions: Sequence[str | Conversation],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float | None]:
        """[B] rewards; None for a sequence longer than the model's positions, or one without a step."""
        texts = [completion if isinstance(completion, str) else _content(completion) for completion in completions]
        given: Sequence[Sequence[int] | None] = [None] * len(texts) if completion_ids is None else completion_ids
        encode = self._whole if self.steps is None else self._by_steps
        found: list[tuple[list[int], list[int]] | None] = []
        known: dict[str, list[int]] = {}
        for prompt, text, ids in zip(prompts, texts, given, strict=True):
            key = str(prompt)
            if key not in known:
                known[key] = self._prompt(prompt)
            found.append(self._fitting(encode(prompt, known[key], text, ids)))
        return self._scores(prompts, found)

    def step_values(self, prompts: Sequence[str | Conversation], solutions: Sequence[Sequence[str]]) -> list[list[float] | None]:
        """For each solution the probabilities σ(score) of its steps, not aggregated; solutions of one prompt forward it once.

        Args:
            prompts: [B]. solutions: [B] lists of steps, finished or not, without separators; blank ones are passed over.

        Returns:
            [B]; None for a solution without a step, or longer than the model's positions.

        Raises:
            ValueError: the model judges outcomes.
        """
        if self.steps is None:
            raise ValueError("step_values: expected a model of steps (fastalign reward --loss process), got one that scores whole answers")
        values: list[list[float] | None] = [None] * len(solutions)
        known: dict[str, list[int]] = {}
        groups: dict[str, list[tuple[int, list[int], list[int]]]] = {}
        for i, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
            key, steps = str(prompt), [step for step in solution if step.strip()]
            begin = known[key] = known.get(key) or self._prompt(prompt)
            found = self._fitting(self.steps.solution(begin, steps) if steps else None)
            if found is not None:
                groups.setdefault(key, []).append((i, *found))
        trees, places = [], []
        for key, own in groups.items():
            shared = len(known[key])
            trees.append(Segment(known[key], children=tuple(Segment(ids[shared:]) for _, ids, _ in own)))
            places.append([(1 + k, end - shared) for k, (_, _, ends) in enumerate(own) for end in ends])
        for own, scores in zip(groups.values(), score_trees(self.model, trees, places, max_tokens=self.max_tokens), strict=True):
            for (i, *_), each in zip(own, torch.sigmoid(scores.double()).split([len(ends) for _, _, ends in own]), strict=True):
                values[i] = each.tolist()
        return values

    def _scores(self, prompts: Sequence[Any], found: Sequence[tuple[list[int], list[int]] | None]) -> list[float | None]:
        """Rewards of (ids, places): the completions of one prompt are one tree, those by steps are one each."""
        groups: dict[str, list[int]] = {}
        for i, (prompt, each) in enumerate(zip(prompts, found, strict=True)):
            if each is not None:
                groups.setdefault(str(prompt) if self.steps is None else str(i), []).append(i)
        trees, places = [], []
        for members in groups.values():
            own = [each for i in members if (each := found[i]) is not None]
            if self.steps is None:
                tree, where = shared_tree([ids for ids, _ in own], [ends[0] for _, ends in own])
            else:
                tree, where = Segment(own[0][0]), tuple((0, end) for end in own[0][1])
            trees.append(tree)
            places.append(where)
        rewards: list[float | None] = [None] * len(found)
        for members, scores in zip(groups.values(), score_trees(self.model, trees, places, max_tokens=self.max_tokens), strict=True):
            values = scores if self.steps is None else self._aggregate(scores)
            for i, value in zip(members, values.tolist(), strict=True):
                rewards[i] = value
        return rewards

    def _aggregate(self, scores: Tensor) -> Tensor:
        return aggregate_steps(torch.sigmoid(scores.double()), torch.tensor([0, scores.numel()]), self.aggregation)

    def _prompt(self, prompt: str | Conversation) -> list[int]:
        return self.text.prompts([prompt])[0] if isinstance(prompt, str) else self.chat.prompt(_record(prompt), prompt)

    def _whole(
        self, prompt: str | Conversation, begin: list[int], text: str, ids: Sequence[int] | None
    ) -> tuple[list[int], list[int]] | None:
        """The sequence and the place of its last token."""
        if ids is not None and self.reuses_ids:
            sequence = [*begin, *ids, *(self._behind_turn() if isinstance(prompt, list) and self._is_finished(ids) else ())]
        elif isinstance(prompt, list):
            sequence = self.chat.whole(_record(prompt), [*prompt, {"role": "assistant", "content": text}])
        else:
            encode = self.text.completions if ids is None or self._is_finished(ids) else self.text.pieces
            (completion,) = encode([text])
            if completion is None:
                return None
            sequence = [*begin, *completion]
        return sequence, [read_place(sequence, self.pad_token_id)]

    def _by_steps(
        self, prompt: str | Conversation, begin: list[int], text: str, ids: Sequence[int] | None
    ) -> tuple[list[int], list[int]] | None:
        """The sequence and the places of its steps' ends."""
        assert self.steps is not None
        steps = [step for step in text.split(self.separator) if step.strip()]
        return self.steps.solution(begin, steps) if steps else None

    def _is_finished(self, ids: Sequence[int]) -> bool:
        """Whether a completion of the policy ends with a token that closes it."""
        special = self.policy_tokenizer.all_special_ids if self.policy_tokenizer is not None else ()
        return bool(ids) and ids[-1] in special

    def _behind_turn(self) -> list[int]:
        """As the model was trained to read a closed turn: with what the template puts behind it."""
        if self._tail is None:
            self._tail = self.chat.behind_turn()
        return self._tail

    def _fitting(self, found: tuple[list[int], list[int]] | None) -> tuple[list[int], list[int]] | None:
        if found is None or self.max_length is None or len(found[0]) <= self.max_length:
            return found
        if not self._told:
            self._told = True
            logger.warning(
                "the reward model reads at most %d tokens, got %d: such completions have no reward", self.max_length, len(found[0])
            )
        return None


def _rules(tokenizer: Any) -> dict[str, Any]:
    """What a fast tokenizer does to text, without how its last caller had it pad and cut."""
    return {
        name: value for name, value in json.loads(tokenizer.backend_tokenizer.to_str()).items() if name not in ("padding", "truncation")
    }


def _record(messages: Conversation) -> Record:
    return Record({"prompt": messages}, "reward model", 0)


def _content(messages: Conversation) -> str:
    return "".join(str(message.get("content") or "") for message in messages)


def reward_name(name_or_path: str) -> str:
    """What a reward model is called in metrics: the last part of its folder or Hub name."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path.rpartition("/")[2]
