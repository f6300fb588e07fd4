"""Generative judges that flags name: judge:model=FOLDER_OR_URL,template=FILE,votes=3,…"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from ..catalogue import nearest
from ..generation import Engine, SamplingParams
from ..judges import Chooser, Judge, LocalModel, Patience, Remembering, ServerModel, Template, Verifier, load_template
from ..judges.asking import Model
from ..judges.templates import CHOOSE, COMPARE, GRADE, VERIFY
from ..models.load import load_causal_lm, load_tokenizer
from ..rewards.callers import InProcess
from .reference_cache import weights_digest
from .setup import Loaded

JUDGE, SELF = "judge", "self"
Grader = Judge | Verifier
Comparer = Judge | Chooser


@dataclass(frozen=True)
class JudgeOptions:
    """What a specification says.

    Attributes:
        model: a folder, a Hub name, the URL of an OpenAI-compatible server up to its /v1, or `self`: the model that is being used.
        template: the name of a built-in one, or a YAML file; empty: the usual one for the purpose.
        votes: replies a question, averaged.
        temperature, top_p, max_tokens, seed: how a reply is sampled; the temperature is 0 for one vote and 1 for several.
        cache: a .jsonl file of replies, so that nothing is asked twice.
        name: the model's, as the server calls it.
        key: the environment variable that holds the server's API key.
        concurrency, timeout, retries: requests at once, seconds each, attempts after the first.
    """

    model: str = ""
    template: str = ""
    votes: int = 1
    temperature: float = -1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 0
    cache: str = ""
    name: str = ""
    key: str = ""
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 3

    @property
    def remote(self) -> bool:
        """Whether the model is behind a server."""
        return self.model.startswith(("http://", "https://"))

    @property
    def is_self(self) -> bool:
        """Whether the model that is being used judges, too."""
        return self.model == SELF

    def params(self) -> SamplingParams:
        """How replies are sampled."""
        heat = self.temperature if self.temperature >= 0 else float(self.votes > 1)
        return SamplingParams(temperature=heat, top_p=self.top_p, max_tokens=self.max_tokens, seed=self.seed)

    @classmethod
    def parse(cls, specification: str) -> JudgeOptions:
        """judge:option=value,option=value; a comma splits only before another option.

        Raises:
            ValueError: an unknown option (the nearest is named), a value of the wrong type, no model, options that do not go together.
        """
        kinds, given = get_type_hints(cls), dict[str, Any]()
        head, _, tail = specification.partition(":")
        if head != JUDGE:
            raise ValueError(f"expected a judge as judge:model=FOLDER_OR_URL, got {specification!r}")
        for part in re.split(r",(?=[a-z_]+=)", tail) if tail else []:
            name, equals, value = part.partition("=")
            if name not in kinds or not equals:
                raise ValueError(f"{specification}: {nearest(name, [f.name for f in fields(cls)], prefix='option ')}")
            try:
                given[name] = kinds[name](value)
            except ValueError:
                raise ValueError(f"{specification}: expected a number for {name}, got {value!r}") from None
        found = cls(**given)
        if not found.model:
            raise ValueError(f"{specification!r} names no model: judge:model=FOLDER, judge:model=http://HOST/v1 or judge:model=self")
        if not found.remote and (unread := [name for name in ("name", "key", "concurrency", "timeout", "retries") if name in given]):
            raise ValueError(f"{specification}: {', '.join(unread)}: for servers alone, and {found.model!r} is no http(s) URL")
        if found.is_self and found.cache:
            raise ValueError(f"{specification}: the model may change, so its replies are not kept; leave cache out, or name its folder")
        return found


def names_judge(specification: str) -> bool:
    """Whether a reward's specification is a generative judge's."""
    return specification.partition(":")[0] == JUDGE


def build_grader(specification: str, policy: Loaded) -> Grader:
    """The judge that gives single answers a number, its model loaded on the policy's device.

    Raises:
        ValueError: as `JudgeOptions.parse`; a model or template that cannot be had or does not fit.
    """
    options = JudgeOptions.parse(specification)
    template = _template(options, "grade", (GRADE, VERIFY))
    return _verifier(options, template, policy) if template.kind == VERIFY else _judge(options, template, policy)


def build_comparer(specification: str, policy: Loaded, default: str = "compare", *, cache: str = "") -> Comparer:
    """The judge that compares two answers; `default` and `cache` are the template and the file where the specification names none.

    Raises:
        ValueError: as `build_grader`.
    """
    options = JudgeOptions.parse(specification)
    template = _template(options, default, (COMPARE, CHOOSE))
    if template.kind == CHOOSE:
        return Chooser(_engine(options, policy), template)
    if cache and not options.cache and not options.is_self:
        options = replace(options, cache=cache)
    return _judge(options, template, policy)


def _template(options: JudgeOptions, default: str, kinds: Sequence[str]) -> Template:
    template = load_template(options.template or default)
    if template.kind not in kinds:
        raise ValueError(f"judge: expected a template of kind {' or '.join(kinds)}, got {options.template}, of kind {template.kind}")
    if template.kind in (VERIFY, CHOOSE) and (options.votes > 1 or options.cache or options.temperature >= 0):
        raise ValueError(f"judge: template {options.template} reads log-probs, not replies; leave out votes, temperature and cache")
    return template


def _judge(options: JudgeOptions, template: Template, policy: Loaded) -> Judge:
    model = _model(options, policy)
    return Judge(Remembering(model, options.cache) if options.cache else model, template, votes=options.votes)


def _model(options: JudgeOptions, policy: Loaded) -> Model:
    if options.remote:
        patience = Patience(options.concurrency, options.timeout, options.retries)
        return ServerModel(options.model, options.name, options.params(), key_variable=options.key, patience=patience)
    engine = _engine(options, policy)
    name = f"{options.model} {weights_digest(engine.model)}" if options.cache else options.model
    return LocalModel(engine, options.params(), name)


def _engine(options: JudgeOptions, policy: Loaded) -> Engine:
    """An engine over the model in a folder, or over the one that is being used."""
    if options.remote:
        raise ValueError(f"judge: template {options.template} needs the log-probs of a model in a folder, got model={options.model}")
    if options.is_self:
        return Engine(policy.model, policy.tokenizer)
    model, tokenizer = load_causal_lm(options.model, device=policy.device), load_tokenizer(options.model)
    return Engine(model.requires_grad_(False), tokenizer)


def _verifier(options: JudgeOptions, template: Template, policy: Loaded) -> Verifier:
    if options.remote or options.is_self:
        raise ValueError(
            f"judge: p(Yes) needs the log-probs of a model in a folder, got model={options.model}; take a template of kind grade"
        )
    (turn,) = template.turns
    asked = turn.replace("{prompt}", "{question}").replace("{completion}", "{solution}")
    chat = bool(load_tokenizer(options.model).chat_template)
    return Verifier.load(options.model, device=str(policy.device), template=asked, conversational=chat, normalized=True)


class InJudge(InProcess):
    """Calls a judge as a reward: it wants the columns that its template names, and is named where the data lack one.

    One behind a server judges completions while others are generated; one in this process would take turns with the generation.
    """

    def __init__(self, judge: Grader) -> None:
        super().__init__(judge)
        self.columns: Sequence[str] = judge.template.columns if isinstance(judge, Judge) else ()
        model = judge.model if isinstance(judge, Judge) else None
        self.remote = isinstance(model.model if isinstance(model, Remembering) else model, ServerModel)

    def signature(self) -> dict[str, Any]:
        wanted = ["prompts", "completions", *self.columns]
        return {"names": wanted, "required": wanted, "any": False, "per_sample": self.remote}
