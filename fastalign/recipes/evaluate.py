"""`fastalign eval`: samples of every problem, judged by rewards and ranked; pass@k, maj@k and best@k with intervals."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data import Prompt
from ..evaluation.estimators import best_at_k, interval, maj_at_k, pass_at_k
from ..generation import Engine
from ..judges import RewardModel
from ..rewards import RewardSet
from ..rewards.answers import after_thinking, as_number, final_answer, normalize
from ..training.files import write_atomic
from . import win_rate
from .arguments import Arguments, GenerateArguments
from .claims import claim
from .generate import (
    BATCHES_A_CHUNK,
    as_record,
    completed_prompts,
    key_of,
    not_done,
    read_prompts,
    rewards_named_by,
    sampling_params,
    writer,
)
from .samplers import sampler_of
from .scored_rollouts import score
from .setup import load

SAMPLES, SUMMARY = "samples.jsonl", "summary.json"
FREE = (
    "output_dir",
    "overwrite_output_dir",
    "max_num_seqs",
    "kv_cache_tokens",
    "device",
    "k",
    "vote",
    "min_reward",
    "judge",
    "baseline",
)  # may change when it goes on


def run(args: Arguments) -> dict[str, Any]:
    """Evaluates, writes samples.jsonl and summary.json, prints the table and returns the summary; a broken-off run goes on.

    Raises:
        ValueError: arguments out of range, or an output_dir that holds another evaluation.
    """
    given = args.evaluate
    wanted = sorted(set(given.k)) or sorted({1, given.num_samples})
    if wanted[0] < 1 or wanted[-1] > given.num_samples:
        raise ValueError(f"--k {' '.join(map(str, wanted))}: expected numbers between 1 and --num_samples {given.num_samples}")
    if args.sampling.temperature == 0 and given.num_samples > 1:
        raise ValueError(f"--num_samples {given.num_samples}: greedy samples are all the same; give --temperature, or one sample")
    win_rate.check(args.win_rate)
    judged = bool(given.reward or sampler_of(args.environment).weights)
    folder = Path(given.output_dir)
    claim(folder, args.flat(), files=(SAMPLES, SUMMARY), free=FREE, overwrite=given.overwrite_output_dir, what="an evaluation")
    done = completed_prompts(folder / SAMPLES, whole_key)
    loaded = load(args.model)
    own = GenerateArguments(num_samples=given.num_samples, seed=given.seed)
    prompts = read_prompts(args.data, own, loaded)
    ranker = RewardModel.load(given.ranker, loaded.tokenizer, device=loaded.device) if given.ranker else None
    with rewards_named_by(given, loaded) as rewards:
        if rewards is not None:
            rewards.check_columns(sorted({name for prompt in prompts for name in prompt.columns}))
        sample(args, own, loaded, rewards, ranker, list(not_done(prompts, done, whole_key)))
    items = problems(folder / SAMPLES, prompts)
    found = summarize([item["completions"] for item in items], wanted if judged else [], given.min_reward, VOTES[given.vote])
    try:
        if args.win_rate.judge:
            found["win_rate"] = win_rate.compare(args.win_rate, items, loaded, folder)
    finally:  # a judge that does not answer takes nothing of the rest
        write_atomic(folder / SUMMARY, json.dumps(found, indent=1) + "\n")
        print(table(found))
    return found


def sample(
    args: Arguments, own: GenerateArguments, loaded: Any, rewards: RewardSet | None, ranker: RewardModel | None, prompts: list[Prompt]
) -> None:
    """Completes, judges and ranks every prompt, a line each, in chunks of a few full batches."""
    sampling, sampler = args.sampling, sampler_of(args.environment, prompts)
    weights = (rewards.weights if rewards is not None else {}) | sampler.weights
    params = sampling_params(sampling, own)
    engine = Engine(loaded.model, loaded.tokenizer, kv_cache_tokens=sampling.kv_cache_tokens or None, max_num_seqs=sampling.max_num_seqs)
    size = max(1, BATCHES_A_CHUNK * sampling.max_num_seqs // params.n)
    path = str(Path(args.evaluate.output_dir) / SAMPLES)
    with writer(path) as write, tqdm(total=len(prompts) * params.n, unit="sample", disable=None) as bar:
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            keys = [prompt.index for prompt in chunk]
            rollout = sampler(engine, chunk, params, keys, bar.update)
            if rewards is not None:
                score(rewards, chunk, rollout, beside=sampler.weights)
            for prompt, samples in zip(chunk, rollout.samples, strict=True):
                texts, totals = [one.text for one in samples], [one.reward(weights) for one in samples]
                completions: list[dict[str, Any]] = [
                    {"text": one.text, "finish_reason": one.finish_reason, "reward": None if math.isnan(total) else total}
                    for one, total in zip(samples, totals, strict=True)
                ]
                if ranker is not None:
                    ranks = ranker([prompt.prompt] * params.n, texts, [one.ids for one in samples])
                    for completion, rank in zip(completions, ranks, strict=True):
                        completion["rank"] = rank
                write({**as_record(prompt), "completions": completions})


def whole_key(item: Mapping[str, Any]) -> str:
    """Prompt and columns: a problem whose answer was corrected is another problem."""
    return key_of({name: value for name, value in item.items() if name != "completions"})


def problems(path: Path, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """Each of the data's problems with its completions."""
    left, found = Counter(whole_key(as_record(prompt)) for prompt in prompts), []
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        key = whole_key(item)
        if left[key] > 0:
            left[key] -= 1
            found.append(item)
    return found


def _answer(text: str) -> Hashable | None:
    stated = final_answer(after_thinking(text))
    if stated is None:
        return None
    plain = normalize(stated)
    number = as_number(plain)
    return (plain.lower() or None) if number is None else number


def _text(text: str) -> Hashable | None:
    return text.strip() or None


# how a completion votes: by its final answer (equal numbers are one), or by its whole text
VOTES: dict[str, Callable[[str], Hashable | None]] = {"answer": _answer, "text": _text}


def summarize(
    found: list[list[dict[str, Any]]], wanted: list[int], min_reward: float, vote: Callable[[str], Hashable | None]
) -> dict[str, Any]:
    """pass@k, maj@k and, of ranked samples, best@k and wmaj@k as {"value", "low", "high"}; the mean reward, and counts.

    A sample without a reward counts as wrong; one without a rank is ranked last and has no vote where votes are weighed.
    """
    right = [[(c["reward"] is not None and c["reward"] >= min_reward) for c in completions] for completions in found]
    answers = [[vote(c["text"]) for c in completions] for completions in found]
    measures: dict[str, list[float]] = {}
    ranked = bool(found) and all("rank" in c for completions in found for c in completions)
    ranks = [[math.nan if c.get("rank") is None else c["rank"] for c in completions] for completions in found]
    for k in wanted:
        measures[f"pass@{k}"] = [pass_at_k(len(own), sum(own), k) for own in right]
        if k > 1:
            measures[f"maj@{k}"] = [maj_at_k(votes, own, k) for votes, own in zip(answers, right, strict=True)]
        if ranked and k > 1:
            every = list(zip(answers, right, ranks, strict=True))
            measures[f"best@{k}"] = [best_at_k(scores, own, k) for _, own, scores in every]
            measures[f"wmaj@{k}"] = [maj_at_k(votes, own, k, [probability(s) for s in scores]) for votes, own, scores in every]
    rewards = [c["reward"] for completions in found for c in completions if c["reward"] is not None]
    out: dict[str, Any] = {"num_problems": len(found), "num_samples": sum(map(len, found))}
    out["num_without_reward"] = out["num_samples"] - len(rewards)
    out["mean_reward"] = sum(rewards) / len(rewards) if rewards else None
    out["finished"] = sum(c["finish_reason"] == "stop" for own in found for c in own) / max(1, out["num_samples"])
    for name, values in measures.items():
        low, high = interval(values)
        out[name] = {"value": sum(values) / len(values) if values else None, "low": low, "high": high}
    return out


def probability(score: float) -> float:
    """σ(score), a vote's weight; 0 of NaN."""
    if math.isnan(score):
        return 0.0
    return 1 / (1 + math.exp(-score)) if score > -700 else 0.0


def table(found: dict[str, Any]) -> str:
    """What is printed: one line a measure, with its 95 % interval over the problems."""
    lines = [f"{found['num_problems']} problems, {found['num_samples']} samples, {found['finished']:.1%} of them ended by themselves"]
    for name, value in found.items():
        if isinstance(value, dict) and name != "win_rate" and value["value"] is not None:
            lines.append(f"{name:10} {value['value']:7.2%}   95 % {value['low']:.2%} to {value['high']:.2%}")
    if "win_rate" in found:
        lines.append(win_rate.table(found["win_rate"]))
    if found["num_without_reward"] and any(name.startswith("pass@") for name in found):
        lines.append(f"{found['num_without_reward']} samples have no reward and count as wrong")
    return "\n".join(lines)
