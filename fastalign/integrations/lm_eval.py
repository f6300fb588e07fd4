"""The engine as a model of EleutherAI's lm-evaluation-harness, named "fastalign". Needs lm_eval: install fastalign with its eval extra.

    python -m fastalign.integrations.lm_eval --model fastalign --model_args pretrained=runs/grpo --tasks gsm8k

takes the harness's own flags. From Python: `lm_eval.simple_evaluate(model=FastalignLM("runs/grpo"), tasks=[…])`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import lm_eval.models  # noqa: F401  (names the harness's own models, which a registration before it would hide)
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError(
        "fastalign.integrations.lm_eval needs the package lm_eval: pip install 'fastalign[eval]', or pip install lm_eval", name=error.name
    ) from error

import torch

from ..evaluation.likelihoods import Likelihoods
from ..generation import Engine, SamplingParams
from ..models.load import load_causal_lm, load_tokenizer

logger = logging.getLogger("fastalign")

READ = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed")  # of generate_until's arguments


@register_model("fastalign")
class FastalignLM(LM):
    """A model on the engine, for lm_eval.

    Args:
        pretrained: a folder in Hugging Face format, or a Hub name.
        engine: over a loaded model and with its tokenizer, in place of `pretrained`.
        dtype: auto, float32 or bfloat16.
        device: cpu, cuda, or auto.
        max_length: most tokens of a sequence; unset: what the model reads.
        max_gen_toks: most tokens of a completion where the task says nothing.
        add_bos_token: put the beginning-of-sequence token in front of every context.
        batch_size, max_batch_size: taken because the harness gives them; the engine packs by tokens.

    Raises:
        ValueError: neither a model nor an engine, or what loading refuses.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        engine: Engine | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if engine is None:
            if not pretrained:
                raise ValueError("FastalignLM: expected a model, as in --model_args pretrained=FOLDER")
            place = "cuda" if torch.cuda.is_available() else "cpu"
            model = load_causal_lm(pretrained, dtype=dtype, device=device if device and device != "auto" else place)
            engine = Engine(model.requires_grad_(False), load_tokenizer(pretrained))
        self.engine, self.max_gen_toks = engine, max_gen_toks
        self.likelihoods = Likelihoods(engine, max_length=max_length, add_bos_token=add_bos_token)
        self._unread: set[str] = set()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each request's (context, continuation)."""
        return self._noted("loglikelihood", requests, self.likelihoods.continuations([request.args for request in requests]))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each request's whole text."""
        return self._noted("loglikelihood_rolling", requests, self.likelihoods.texts([request.args[0] for request in requests]))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The completion of each request's context up to one of its stop texts; greedy unless it samples."""
        prompts, params = [], []
        for request in requests:
            context, given = request.args
            sampling = self.sampling(given)
            room = max(1, self.likelihoods.max_length - sampling.max_tokens)
            prompts.append((self.likelihoods.encode(context) or [self.likelihoods.prefix])[-room:])
            params.append(sampling)
        outputs = self.engine.generate(prompts, params, progress=not disable_tqdm) if prompts else []
        return self._noted("generate_until", requests, [output.outputs[0].text for output in outputs])

    def sampling(self, given: Mapping[str, Any]) -> SamplingParams:
        """The harness's arguments as the engine takes them; one that is not read is named once."""
        for name in given.keys() - set(READ) - self._unread:
            self._unread.add(name)
            logger.warning("lm_eval: generate_until's %s=%r is not read", name, given[name])
        until = given.get("until") or []
        samples = given.get("do_sample") is not False and "temperature" in given
        return SamplingParams(
            temperature=float(given["temperature"]) if samples else 0.0,
            top_p=float(given.get("top_p", 1.0)),
            top_k=max(0, int(given.get("top_k", 0))),
            min_p=float(given.get("min_p", 0.0)),
            max_tokens=min(int(given.get("max_gen_toks", self.max_gen_toks)), self.likelihoods.max_length - 1),
            stop=[until] if isinstance(until, str) else [text for text in until if text],
            seed=int(given.get("seed", 0)),
            logprobs=False,
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template writes it."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.engine.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, where the harness asks for one."""
        return self.engine.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.tokenizer.name_or_path).replace("/", "__")

    def _noted(self, kind: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
        """The answers, once the harness's cache has them."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def main() -> None:
    """The harness's command line, with this model known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
