"""A generative verifier: a language model that says Yes or No, and whose p(Yes) is the score (GenRM, arXiv:2408.15240)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..data.chat import ChatEncoder
from ..data.records import Record
from ..data.tokens import TextEncoder
from ..models.load import load_causal_lm, load_tokenizer
from ..packing import group, pack, split_by_tokens
from ..training.step import score

QUESTION = "{question}\nProposed solution: {solution}\nIs the answer correct (Yes/No)?"
YES, NO = "Yes", "No"


def verifier_records(
    judgements: Sequence[Mapping[str, Any]], *, template: str = QUESTION, conversational: bool = False
) -> list[dict[str, Any]]:
    """Judgements as records for `fastalign sft`: the question and solution as the prompt, Yes or No as the completion (Eq. 4).

    Args:
        judgements: `question`, `solution` and `verdict` (whether the solution is right), each.
        template: with {question} and {solution}.
        conversational: prompt and completion as messages, for chat models.

    Raises:
        ValueError: a judgement lacks a key, or its verdict is no truth value; names its index.
    """
    records: list[dict[str, Any]] = []
    for index, judgement in enumerate(judgements):
        missing = [key for key in ("question", "solution", "verdict") if judgement.get(key) is None]
        if missing:
            raise ValueError(f"verifier_records: judgement {index} has no {' and no '.join(missing)}, got {sorted(judgement)}")
        if judgement["verdict"] not in (True, False):
            raise ValueError(f"verifier_records: judgement {index}: expected verdict true or false, got {judgement['verdict']!r}")
        prompt = template.format(question=judgement["question"], solution=judgement["solution"])
        verdict = YES if judgement["verdict"] else NO
        if conversational:
            records.append({"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": verdict}]})
        else:
            records.append({"prompt": prompt, "completion": f" {verdict}"})
    return records


class Verifier:
    """p(Yes) of a verifier trained on `verifier_records`, with TRL's reward signature.

    The prompt is forwarded once, Yes and No behind it; both are scored through the fused head.

    Args:
        model: a causal language model with the "fastalign" attention.
        tokenizer: its tokenizer; a chat template is used where `conversational`.
        template: as in training.
        conversational: as in training.
        normalized: p(Yes) / (p(Yes) + p(No)) instead of the paper's p(Yes) (Eq. 5).
        max_tokens: tokens forwarded at once.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        template: str = QUESTION,
        conversational: bool = False,
        normalized: bool = False,
        max_tokens: int = 8192,
    ) -> None:
        self.model, self.template, self.conversational = model.eval(), template, conversational
        self.normalized, self.max_tokens = normalized, max_tokens
        self.text, self.chat = TextEncoder(tokenizer), ChatEncoder(tokenizer)
        answers = self.text.pieces([YES, NO] if conversational else [f" {YES}", f" {NO}"])
        if not all(answers):
            raise ValueError(f"Verifier: the tokenizer has no tokens of their own for {YES} and {NO}")
        self.answers = [ids for ids in answers if ids is not None]

    @classmethod
    def load(cls, name_or_path: str, *, dtype: str = "auto", device: str = "cpu", **options: Any) -> Verifier:
        """Loads a model that `fastalign sft` trained on `verifier_records`."""
        return cls(load_causal_lm(name_or_path, dtype=dtype, device=device), load_tokenizer(name_or_path), **options)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """[B] probabilities that each completion solves its prompt."""
        questions = [
            self.template.format(question=_said(prompt), solution=_said(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        trees = [group(ids, self.answers) for ids in self._prompts(questions)]
        device = next(self.model.parameters()).device
        found = [0.0] * len(trees)
        for members in split_by_tokens(trees, self.max_tokens):
            packed = pack([trees[i] for i in members])
            logp = score(self.model, packed.to(device)).cpu().double()
            yes, no = logp.new_zeros(packed.num_sequences).index_add(0, packed.sequence_of_targets(), logp).view(-1, 2).unbind(1)
            values = torch.sigmoid(yes - no) if self.normalized else yes.exp()
            for i, value in zip(members, values.tolist(), strict=True):
                found[i] = value
        return found

    def _prompts(self, questions: Sequence[str]) -> list[list[int]]:
        if not self.conversational:
            return self.text.prompts(questions)
        turns = [[{"role": "user", "content": question}] for question in questions]
        return [self.chat.prompt(Record({}, "verifier", 0), messages) for messages in turns]


def _said(value: Any) -> str:
    """A text as it is; of a conversation, the contents line by line."""
    return value if isinstance(value, str) else "\n".join(str(message.get("content") or "") for message in value)
