"""`fastalign search`: better answers for more tokens, by several methods in one table; what they find as training data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data import Prompt
from ..generation import Engine, Stats
from ..rewards import RewardSet, load_rewards
from ..search import Policy, SearchResult
from ..training.files import write_atomic
from .arguments import Arguments, GenerateArguments
from .claims import claim
from .evaluate import VOTES
from .generate import BATCHES_A_CHUNK, Key, as_record, completed_prompts, key_of, not_done, read_prompts, sampling_params, writer
from .model_rewards import with_reward_models
from .search_methods import PASSES, Pass, Searching, check, rolls_out
from .search_records import number, save_pairs, save_sft, save_steps
from .search_scorers import Guide, guide_of, score_texts
from .search_summary import summarize, table
from .setup import load

RESULTS, SUMMARY = "results.jsonl", "summary.json"
FREE = (  # may change when it goes on
    *("output_dir", "overwrite_output_dir", "max_num_seqs", "kv_cache_tokens", "block_size", "device"),
    *("method", "min_reward", "save_sft", "save_pairs", "save_steps", "step_labels"),
)


def run(args: Arguments) -> dict[str, Any]:
    """Searches, writes results.jsonl and summary.json, prints the table and returns the summary; a broken-off run goes on.

    Raises:
        ValueError: arguments out of range, or methods without what they need.
        FileExistsError: output_dir holds another search.
    """
    own = args.search
    varied = [method for method in own.methods if method != "greedy"]
    if args.sampling.temperature == 0 and varied:
        raise ValueError(f"--temperature 0: --method {varied[0]} chooses among draws, which would all be the same; give a temperature > 0")
    separator = own.step_separator.replace("\\n", "\n").replace("\\t", "\t")
    loaded = load(args.model)
    sampling = GenerateArguments(seed=own.seed, logprobs=True)
    prompts = read_prompts(args.data, sampling, loaded)
    with ExitStack() as closing:
        guide = guide_of(own, loaded, closing)
        check(own, guide)
        check_saved(args, guide)
        rewards = rewards_of(args, loaded, closing)
        columns = sorted({name for prompt in prompts for name in prompt.columns})
        for checked in (guide, rewards):
            if checked is not None:
                checked.check_columns(columns)
        folder = Path(own.output_dir)
        claim(folder, args.flat(), files=(RESULTS, SUMMARY), free=FREE, overwrite=own.overwrite_output_dir, what="a search")
        options = {"kv_cache_tokens": args.sampling.kv_cache_tokens or None, "max_num_seqs": args.sampling.max_num_seqs}
        engine = Engine(loaded.model, loaded.tokenizer, block_size=own.block_size, **options)  # type: ignore[arg-type]
        policy = Policy(engine, sampling_params(args.sampling, sampling), separator=separator, max_step_tokens=own.max_step_tokens)
        search(Searching(policy, guide, own, VOTES[own.vote]), prompts, rewards, folder / RESULTS, args.sampling.max_num_seqs)
    return finish(args, folder, prompts)


def finish(args: Arguments, folder: Path, prompts: list[Prompt]) -> dict[str, Any]:
    """Reads what there is of these prompts; writes the summary and the data that are asked for, and prints the table."""
    own, found = args.search, read_results(folder / RESULTS, prompts, args.search.methods)
    summary = summarize(found, own.min_reward)
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    print(table(summary))
    if own.save_sft:
        print(save_sft(Path(own.save_sft), found, own.min_reward))
    if own.save_pairs:
        print(save_pairs(Path(own.save_pairs), found))
    if own.save_steps:
        print(save_steps(Path(own.save_steps), found, own.step_labels))
    return summary


def rewards_of(args: Arguments, loaded: Any, closing: ExitStack) -> RewardSet | None:
    """The rewards that the table's accuracy is by; None where the flags name none."""
    own = args.search
    if not own.reward:
        return None
    named = with_reward_models(own.reward, loaded)
    return closing.enter_context(load_rewards(named, list(own.reward_weights) or None, timeout=own.reward_timeout))


def check_saved(args: Arguments, guide: Guide | None) -> None:
    """Raises ValueError where data are asked for that no method gives."""
    own = args.search
    estimates = "mcts" in own.methods and guide is not None and rolls_out(own, guide) and own.tree_rule != "rmax"
    if own.save_steps and not estimates:
        raise ValueError("--save_steps needs --method mcts with --tree_value rollouts, and --tree_rule puct or uct: they estimate steps")
    if own.save_pairs and set(own.methods) <= {"greedy", "majority", "weighted"} and not own.reward:
        raise ValueError("--save_pairs needs --reward, or best_of_n, beam or mcts with a scorer: something must order the solutions")


@dataclass(frozen=True)
class Shares:
    """Tokens that a chunk's prompts needed besides those drawn, a prompt: forwarded as prompts, and found in the cache."""

    num_prefilled: float
    num_reused: float

    @classmethod
    def of(cls, before: Stats, after: Stats, num_prompts: int) -> Shares:
        forwarded = after.prompt_tokens + after.recomputed_tokens - before.prompt_tokens - before.recomputed_tokens
        return cls(forwarded / num_prompts, (after.cached_tokens - before.cached_tokens) / num_prompts)


def search(searching: Searching, prompts: list[Prompt], rewards: RewardSet | None, path: Path, max_num_seqs: int) -> None:
    """Runs every method over the prompts that the file has not got from it, in chunks, a line a method and prompt."""
    for each in PASSES:
        methods = [method for method in each.methods if method in searching.own.methods]
        left: dict[str, set[int]] = {}
        for method in methods:
            left[method] = {id(prompt) for prompt in not_done(prompts, completed_prompts(path, result_key(method)), record_key)}
        waiting = [prompt for prompt in prompts if any(id(prompt) in missing for missing in left.values())]
        if not waiting:
            continue
        size = max(1, BATCHES_A_CHUNK * max_num_seqs // each.width(searching.own))
        with writer(str(path)) as write, tqdm(total=len(waiting), unit="prompt", desc=" ".join(methods), disable=None) as bar:
            for start in range(0, len(waiting), size):
                chunk = waiting[start : start + size]
                searching.policy.engine.release_cache()  # the trees of the last chunk; and a method finds only what is its own
                for method, prompt, value in searched(searching, each, methods, chunk, rewards):
                    if id(prompt) in left[method]:
                        write(value)
                bar.update(len(chunk))


def searched(
    searching: Searching, each: Pass, methods: Sequence[str], chunk: list[Prompt], rewards: RewardSet | None
) -> Iterator[tuple[str, Prompt, dict[str, Any]]]:
    """(method, prompt, what is written of it) for a chunk."""
    stats = searching.policy.engine.stats
    before = replace(stats)
    found = each.run(searching, chunk, methods)
    shares = Shares.of(before, stats, len(chunk))
    right = judged(rewards, chunk, found)
    for method, results in found.items():
        for i, (prompt, result) in enumerate(zip(chunk, results, strict=True)):
            yield method, prompt, as_object(prompt, method, result, right[i], shares)


def judged(rewards: RewardSet | None, chunk: list[Prompt], found: dict[str, list[SearchResult]]) -> list[dict[str, float | None]]:
    """[P] the reward of each text that some method found for the prompt, each judged once; empty without rewards."""
    texts = [{path.text: path.ids for results in found.values() for path in results[i].paths} for i in range(len(chunk))]
    if rewards is None:
        return [{} for _ in texts]
    owners = [prompt for prompt, own in zip(chunk, texts, strict=True) for _ in own]
    flat = [(text, ids) for own in texts for text, ids in own.items()]
    scores = iter(score_texts(rewards, owners, [text for text, _ in flat], [ids for _, ids in flat]) if flat else [])
    return [{text: number(next(scores)) for text in own} for own in texts]


def as_object(prompt: Prompt, method: str, result: SearchResult, right: Mapping[str, float | None], shares: Shares) -> dict[str, Any]:
    """{"prompt", the record's other columns, "search": {"method", "completion", …, "candidates": […]}}."""
    candidates: list[dict[str, Any]] = [
        {"text": path.text, "finish_reason": path.finish_reason, "score": number(score)} | _reward(right, path.text)
        for path, score in zip(result.paths, result.scores, strict=True)
    ]
    own: dict[str, Any] = {"method": method, "completion": result.path.text, "score": number(result.score)}
    own |= _reward(right, result.path.text)
    own |= {"num_tokens": result.num_tokens, "num_scored": result.num_scored} | vars(shares)
    own |= {"best": result.best, "candidates": candidates}
    if result.chains:
        own["chains"] = [[[step.text, step.mean, step.visits] for step in chain] for chain in result.chains]
    return {**as_record(prompt), "search": own}


def _reward(right: Mapping[str, float | None], text: str) -> dict[str, float | None]:
    return {"reward": right[text]} if text in right else {}


def record_key(item: Mapping[str, Any]) -> str:
    """What a prompt with its columns is recognized by."""
    return key_of({name: value for name, value in item.items() if name != "search"})


def result_key(method: str) -> Key:
    """The same of a result of the method; other methods' results are nobody's."""
    return lambda item: record_key(item) if item["search"]["method"] == method else ""


def read_results(path: Path, prompts: list[Prompt], methods: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """By method, the objects of these prompts, in the order of the file."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    found: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        left = Counter(record_key(as_record(prompt)) for prompt in prompts)
        found[method] = []
        for item in lines:
            key = result_key(method)(item)
            if left[key] > 0:
                left[key] -= 1
                found[method].append(item)
    return found
