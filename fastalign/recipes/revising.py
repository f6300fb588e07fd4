"""Answers, critiques and revisions of many prompts at once, through one engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..data import Prompt, Record
from ..data.chat import ChatEncoder
from ..data.tokens import TextEncoder
from ..generation import CompletionOutput, Engine, SamplingParams
from ..judges.asking import shortened
from ..models.backbone import causal_lm
from .judging import Comparer
from .principles import Constitution

logger = logging.getLogger("fastalign")

ASKED, SAID = ("Critique request", "Critique"), ("Revision request", "Revision")  # how plain text, without a chat template, is asked


class Reviser:
    """Completes prompts, then criticizes and revises the answers round by round.

    Args:
        engine: with the model's tokenizer.
        params: of answers, critiques and revisions; `n` of the answers alone. A completion's key is its prompt's number and its step,
            so that a run that goes on draws what an unbroken one would have.
        constitution: principles, of which each round draws one by the seed.
        num_rounds: of critique and revision.
    """

    def __init__(self, engine: Engine, params: SamplingParams, constitution: Constitution, seed: int, num_rounds: int) -> None:
        self.engine, self.params, self.constitution, self.seed, self.num_rounds = engine, params, constitution, seed, num_rounds
        self.text, self.chat = TextEncoder(engine.tokenizer), ChatEncoder(engine.tokenizer)
        config: Any = causal_lm(engine.model).config
        self.max_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)

    def answers(self, prompts: Sequence[Prompt]) -> list[list[CompletionOutput]]:
        """`params.n` completions a prompt."""
        keys = [prompt.index * self._steps for prompt in prompts]
        return [out.outputs for out in self.engine.generate([prompt.ids for prompt in prompts], self.params, request_ids=keys)]

    def revise(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """{"answer", "rounds": [{"asked", "critique", "revision"}], "ended"} of each prompt, every text with its finish_reason.

        `ended` says how: "rounds" (all were gone through), "stop" (a critique that says so), "empty" (an answer or revision without a
        word) or "length" (no room for a reply within what the model reads; named in the log).
        """
        answers = [_part(outputs[0]) for outputs in self.answers(prompts)]
        live = [i for i, answer in enumerate(answers) if answer["text"].strip()]
        found: list[dict[str, Any]] = [
            {"answer": answer, "rounds": [], "ended": "length" if i in live else "empty"} for i, answer in enumerate(answers)
        ]
        current = {i: found[i]["answer"]["text"] for i in live}
        for number in range(self.num_rounds):
            principles = {i: self.constitution.draw(self.seed, prompts[i].index, number) for i in live}
            turns = {i: [current[i], principles[i].critique] for i in live}
            critiques = self._replies(prompts, turns, 1 + 2 * number)
            for i, critique in critiques.items():
                found[i]["rounds"].append({"asked": principles[i].critique, "critique": critique, "revision": None})
                found[i]["ended"] = "stop" if self.constitution.ends(critique["text"]) else "length"
            going = [i for i in critiques if found[i]["ended"] != "stop"]
            turns = {i: [*turns[i], critiques[i]["text"], principles[i].revision] for i in going}
            revisions = self._replies(prompts, turns, 2 + 2 * number)
            for i, revision in revisions.items():
                revision["text"] = _led_as(current[i], revision["text"])
                found[i]["rounds"][-1]["revision"] = revision
                last = "rounds" if number == self.num_rounds - 1 else "length"
                found[i]["ended"] = last if revision["text"].strip() else "empty"
            live = [i for i, revision in revisions.items() if revision["text"].strip()]
            current = {i: revisions[i]["text"] for i in live}
        return found

    def compare(self, prompts: Sequence[Prompt], comparer: Comparer) -> list[dict[str, Any]]:
        """{"answers": both, "principle", "score"} of each prompt: the probability that the first answer is the better one, or None."""
        answers = self.answers(prompts)
        questions = [self.constitution.draw(self.seed, prompt.index, 0).choice for prompt in prompts]
        differ = [i for i, (a, b) in enumerate(answers) if a.text != b.text]
        self.engine.release_cache()  # the judge has the memory
        columns: dict[str, list[Any]] = {"principle": [questions[i] for i in differ]}
        asked = [prompts[i].prompt for i in differ]
        firsts, seconds = ([answers[i][k].text for i in differ] for k in (0, 1))
        scores = {i: each.score for i, each in zip(differ, comparer.compare(asked, firsts, seconds, **columns), strict=True)}
        return [
            {"answers": [_part(a), _part(b)], "principle": question, "score": scores.get(i)}
            for i, ((a, b), question) in enumerate(zip(answers, questions, strict=True))
        ]

    @property
    def _steps(self) -> int:
        """Completions of a prompt: the answer, and two a round."""
        return 1 + 2 * self.num_rounds

    def _replies(self, prompts: Sequence[Prompt], turns: dict[int, list[str]], step: int) -> dict[int, dict[str, Any]]:
        """The reply to each conversation that fits into the model, by the prompt's place."""
        encoded = {i: self._encode(prompts[i], said) for i, said in turns.items()}
        fitting = {i: ids for i, ids in encoded.items() if self._fits(ids, turns[i])}
        if not fitting:
            return {}
        params = replace(self.params, n=1, stop=(*self.params.stop, f"\n\n{ASKED[0]}:", f"\n\n{SAID[0]}:"))
        keys = [prompts[i].index * self._steps + step for i in fitting]
        outputs = self.engine.generate(list(fitting.values()), params, request_ids=keys)
        return {i: _part(output.outputs[0]) for i, output in zip(fitting, outputs, strict=True)}

    def _fits(self, ids: Sequence[int], turns: Sequence[str]) -> bool:
        if self.max_length is None or len(ids) + self.params.max_tokens <= self.max_length:
            return True
        message = "critique: %d tokens and --max_completion_length %d pass the model's %d: the rounds end before %s"
        logger.warning(message, len(ids), self.params.max_tokens, self.max_length, shortened(turns[-1], 80))
        return False

    def _encode(self, prompt: Prompt, turns: Sequence[str]) -> list[int]:
        """The prompt, then answer, request, reply, request, … up to where the next reply begins."""
        if isinstance(prompt.prompt, str):
            answer, *rest = turns
            labels = (ASKED, SAID)
            text = f"{prompt.prompt}{answer}"
            for number, (request, reply) in enumerate(zip(rest[::2], [*rest[1::2], ""], strict=False)):
                asked, said = labels[number]
                text += f"\n\n{asked}: {request}\n\n{said}:" + (f" {reply.strip()}" if reply else "")
            return self.text.prompts([text])[0]
        roles = ("assistant", "user")
        messages = [{"role": roles[k % 2], "content": said} for k, said in enumerate(turns)]
        return self.chat.prompt(Record({}, "critique", 0), [*prompt.prompt, *messages])


def _led_as(answer: str, revision: str) -> str:
    """The revision with the white space in front that the answer has: it is to follow the same prompt."""
    return answer[: len(answer) - len(answer.lstrip())] + revision.strip()


def _part(output: CompletionOutput) -> dict[str, Any]:
    return {"text": output.text, "finish_reason": output.finish_reason}
