"""The obviously right generator: one sequence, forwarded whole for every token, with no cache, no batch and no schedule.

What the engine gives for a live request, however it was scheduled, must be what `NaiveGenerator.sample` gives for its prompt,
its parameters, its random key and the weights that were in force at each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fastalign.models.backbone import head_of, hidden_states
from fastalign.ops.linear_head import head_logits
from fastalign.ops.logits import logp_rows
from fastalign.ops.sampling import sample as sample_rows
from fastalign.ops.sampling import uniform
from fastalign.packing import conversation, pack

BORDER = 1e-5  # a uniform this close to a border of the distribution is decided by rounding: fp32 in the sampler, fp64 here
MEMO = 100_000  # rows of logits kept


@dataclass(frozen=True)
class Naive:
    """One completion; the fields of a CompletionOutput, and for each token the model's log-probs [V] at temperature 1, fp64."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    raw_logprobs: tuple[float, ...] = ()
    kept_mass: tuple[float, ...] = ()
    weight_versions: tuple[int, ...] = ()
    model_logprobs: tuple[np.ndarray, ...] = field(default=(), compare=False)
    finish_reason: str = ""
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Key:
    """Whose random numbers: the sample's key without the position."""

    seed: int
    request: int
    sample: int


class NaiveGenerator:
    """Generates with the trainer's forward of one whole sequence.

    Args:
        models: the weights, by version: version v is models[v % len(models)].
        eos: token ids that end a completion unless the parameters ignore them.
        max_length: tokens of a sequence.
        tokenizer: for stop strings and text; None: no text.
    """

    def __init__(self, models, eos=(), max_length=None, tokenizer=None):
        self.models, self.eos, self.max_length, self.tokenizer = list(models), frozenset(eos), max_length, tokenizer
        self._logits, self._samples = {}, {}

    # --- the model ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(self, version, ids):
        """Logits [len(ids), V] of one sequence, whole."""
        model = self.models[version % len(self.models)]
        head = head_of(model)
        return head_logits(hidden_states(model, pack(conversation(list(ids)))), head.weight, head.bias)

    def logits(self, version, ids):
        """The row [1, V] that predicts the token after `ids`."""
        key = self._key(version, ids)
        if key not in self._logits:
            self._remember(key, self._forward(version, ids)[-1:])
        return self._logits[key]

    def foresee(self, versions, ids, start):
        """Forwards `ids` once for all of its prefixes of `start` tokens and more: a row does not depend on what comes after it.

        Only a saving: `logits` would forward each prefix alone, to the same bits (`test_naive_foresight_changes_nothing`).
        """
        for version in versions:
            missing = [n for n in range(start, len(ids) + 1) if self._key(version, ids[:n]) not in self._logits]
            if missing:
                rows = self._forward(version, ids)
                for n in missing:
                    self._remember(self._key(version, ids[:n]), rows[n - 1 : n].clone())

    def _key(self, version, ids):
        return version % len(self.models), np.array(ids, np.int16).tobytes()

    def _remember(self, key, row):
        if len(self._logits) >= MEMO:
            self._logits.clear()
        self._logits[key] = row

    # --- one completion ----------------------------------------------------------------------------------------------

    def sample(self, prompt, params, key, versions=((0, 0),), most=None):
        """The completion of `prompt` under `key`.

        Args:
            prompt: token ids.
            params: its SamplingParams; n does not matter.
            versions: (k, v) pairs: from the k-th token of the completion on, the weights are version v.
            most: tokens after which it is aborted; None: never.
        """
        arguments = (tuple(prompt), params, key, tuple(versions), most)
        if arguments not in self._samples:
            self._samples[arguments] = self._sample(*arguments)
        return self._samples[arguments]

    def _sample(self, prompt, params, key, versions, most):
        out = Naive()
        while most is None or len(out.token_ids) < most:
            version = [v for k, v in versions if k <= len(out.token_ids)][-1]
            out = self._extended(out, prompt, params, key, version)
            out = self._ended(out, len(prompt), params)
            if out.finish_reason:
                break
        return replace(self._with_text(out, params), finish_reason=out.finish_reason or "abort")

    def _extended(self, out, prompt, params, key, version):
        """One more token."""
        ids = [*prompt, *out.token_ids]
        head = head_of(self.models[version % len(self.models)])
        model = Scores(self.logits(version, ids), head.logit_softcap, head.logit_scale)
        processed = model
        for i, processor in enumerate(params.logits_processors):
            processed = Scores(processor(torch.tensor([ids]), (processed if i else model.final()).logits.clone()))
        banned = Scores(processed.logits.clone(), processed.softcap, processed.scale)
        if len(out.token_ids) + 1 < params.min_tokens:
            banned.logits[0, sorted(self.stop_ids(params))] = -torch.inf
        token, kept = _draw(banned, params, key, len(ids))
        logprob, raw, kept_mass = _logprobs(model, processed, banned, token, kept, params.temperature)
        return replace(
            out,
            token_ids=(*out.token_ids, token),
            logprobs=(*out.logprobs, logprob),
            raw_logprobs=(*out.raw_logprobs, raw),
            kept_mass=(*out.kept_mass, kept_mass),
            weight_versions=(*out.weight_versions, version),
            model_logprobs=(*out.model_logprobs, model.final().logits[0].double().log_softmax(0).numpy()),
        )

    # --- its end -----------------------------------------------------------------------------------------------------

    def stop_ids(self, params):
        """Token ids that end a completion."""
        return {*params.stop_token_ids, *(() if params.ignore_eos else self.eos)}

    def _ended(self, out, prompt_length, params):
        count, token = len(out.token_ids), out.token_ids[-1]
        limit = params.max_tokens
        if self.max_length is not None:
            limit = min(limit, self.max_length - prompt_length)
        if count >= params.min_tokens and token in self.stop_ids(params):
            return replace(out, finish_reason="stop", stop_reason=token)
        found = self._new_stop(out.token_ids, params) if count >= params.min_tokens else None
        if found is not None:
            return replace(out, finish_reason="stop", stop_reason=found[1])
        return replace(out, finish_reason="length") if count >= limit else out

    def _new_stop(self, ids, params):
        """(position, string) of the stop string that the last token completes: of several the one that begins first, the longest."""
        text, before = self._text(ids), len(self._text(ids[:-1]).rstrip("\ufffd"))  # the rest of a character may follow
        ends = [(at, stop) for stop in params.stop for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > before]
        return min(ends, key=lambda end: (end[0], -len(end[1])), default=None)

    def _with_text(self, out, params):
        if self.tokenizer is None:
            return out
        if isinstance(out.stop_reason, int):
            return replace(out, text=self._text(out.token_ids[:-1]))
        text = self._text(out.token_ids)
        return replace(out, text=text[: self._new_stop(out.token_ids, params)[0]] if out.stop_reason is not None else text)

    def _text(self, ids):
        return self.tokenizer.decode(list(ids)) if self.tokenizer is not None else ""


@dataclass(frozen=True, eq=False)
class Scores:
    """One row [1, V]: the scores are scale * softcap * tanh(logits / softcap)."""

    logits: torch.Tensor
    softcap: float | None = None
    scale: float = 1.0

    def final(self):
        """The same scores as plain logits, fp32."""
        capped = self.logits if self.softcap is None else torch.tanh(self.logits / self.softcap) * self.softcap
        return Scores(capped * self.scale)

    def logp(self, token, temperature):
        """(log-prob of the token, log-sum-exp), by the function that the trainer's losses call."""
        logp, lse, _, _ = logp_rows(self.logits, torch.tensor([token]), temperature=temperature / self.scale, logit_softcap=self.softcap)
        return logp.numpy()[0], lse.numpy()[0]


def _draw(scores, params, key, position):
    """(token, kept probability) of the sampler, which must be those of the definition."""
    seed = key.seed - (key.seed >> 63 << 64)  # the same 64 bits as int64
    u = uniform(*(torch.tensor([value]) for value in (seed, key.request, key.sample, position)))
    heat = torch.tensor([params.temperature / scores.scale], dtype=torch.float32)
    columns = (torch.tensor([params.top_k]), torch.tensor([params.top_p]), torch.tensor([params.min_p]))
    drawn, mass = (float(value) for value in sample_rows(scores.logits, u, heat, *columns, logit_softcap=scores.softcap))
    exact = Scores(scores.logits.double(), scores.softcap, scores.scale).final().logits[0]
    banned = scores.logits[0] == -torch.inf
    token, kept, sure = draw_by_definition(torch.where(banned, -torch.inf, exact).numpy(), float(u), params)
    if sure:
        assert int(drawn) == token
        assert abs(mass - kept) <= 1e-5 * kept
    return int(drawn), np.float32(mass)


def _logprobs(model, processed, banned, token, kept, temperature):
    """(log-prob under the sampled distribution, the model's at temperature 1, kept mass)."""
    raw, _ = model.logp(token, 1.0)
    if temperature == 0:
        return float(raw), float(raw), 1.0
    logprob, lse = banned.logp(token, temperature)
    if kept < 1:
        logprob = logprob - np.log(kept)
    return float(logprob), float(raw), float(kept * np.exp(lse - processed.logp(token, temperature)[1]))


def draw_by_definition(scores, u, params):
    """(token, kept probability, sure) by inverse CDF in vocabulary order; not `sure` when rounding may decide otherwise.

    Args:
        scores: [V] fp64; u: in [0, 1).
    """
    if params.temperature == 0:
        return int(scores.argmax()), 1.0, True
    weight = np.exp((scores - scores.max()) / np.float64(np.float32(params.temperature)))
    left, sure = weight.copy(), True
    ordered = np.sort(weight)[::-1]
    if params.top_k:
        left[weight < ordered[min(params.top_k, len(ordered)) - 1]] = 0
    if params.top_p < 1:
        ordered = np.sort(left)[::-1]
        mass = ordered.cumsum() / ordered.sum()
        wanted = np.float64(np.float32(params.top_p))
        left[left < ordered[int((mass < wanted).sum())]] = 0
        sure &= bool(np.abs(mass - wanted).min() > BORDER)
    floor = np.float64(np.float32(params.min_p))
    left[left < floor] = 0
    sure &= bool((np.abs(weight - floor) > BORDER * floor).all()) if floor else True
    smallest, largest_cut = left[left > 0].min(), weight[left == 0].max(initial=0)
    sure &= bool(largest_cut < smallest * (1 - BORDER))
    cdf = left.cumsum()
    token = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
    sure &= bool(np.abs(cdf[left > 0][:-1] / cdf[-1] - u).min(initial=1) > BORDER)
    return token, float(left.sum() / weight.sum()), sure
