"""`fastalign generate`: completions of prompts to a .jsonl file, one object a prompt; a broken-off run goes on where it stopped."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data import Prompt, Record, prompt_examples
from ..generation import Engine, SamplingParams
from ..models.backbone import causal_lm, positions_of
from ..rewards import RewardSet, load_rewards
from ..rollout import Sample
from .arguments import DataArguments, EvalArguments, GenerateArguments, ModelArguments, SamplingArguments
from .feedback_arguments import PairArguments
from .model_rewards import with_reward_models
from .online_arguments import EnvironmentArguments
from .pairs import check, pairs_path, write_pairs
from .reading import prompts_named_by
from .samplers import Sampler, sampler_of
from .scored_rollouts import score
from .setup import Loaded, load

Key = Callable[[Mapping[str, Any]], str]  # an object of the output file → what it is recognized by
BATCHES_A_CHUNK = 4  # prompts are completed, and written, in chunks of this many full batches


def run(
    model: ModelArguments,
    data: DataArguments,
    sampling: SamplingArguments,
    generate: GenerateArguments,
    pairs: PairArguments | None = None,
    environment: EnvironmentArguments | None = None,
) -> None:
    """Completes every prompt that the output file has not got yet, appends the objects and flushes after each chunk; then pairs.

    Raises:
        ValueError: arguments out of range, or an output file that is not ours.
        DataError: a bad record.
    """
    params, pairs = sampling_params(sampling, generate), pairs or PairArguments()
    check(pairs, generate.output_file)
    done = completed_prompts(Path(generate.output_file), _key_of_completed) if generate.output_file else Counter()
    loaded = load(model)
    wanted = read_prompts(data, generate, loaded)
    prompts = list(not_done(wanted, done))
    if len(prompts) < len(wanted):
        kept = f"{len(wanted) - len(prompts)} of {len(wanted)} prompts are in {generate.output_file} already and stay as they are"
        print(f"{kept}, whatever the flags of this run; name another --output_file to sample them again", file=sys.stderr)
    with rewards_named_by(pairs, loaded) as rewards:
        if rewards is not None:
            rewards.check_columns(sorted({name for prompt in wanted for name in prompt.columns}))
        sample(sampling, generate, params, loaded, prompts, rewards, sampler_of(environment or EnvironmentArguments(), prompts))
    if pairs.save_pairs != "none":
        left = Counter(key_of_prompt(as_record(prompt)) for prompt in wanted)
        count = write_pairs(pairs, generate.output_file, lambda item: left[key_of_prompt(item)] > 0)
        remedy = "; are all cut off? raise --max_completion_length, or give --finished_only false" if pairs.finished_only else ""
        print(f"{count} pairs of {len(wanted)} prompts in {pairs_path(generate.output_file)}{'' if count else remedy}", file=sys.stderr)


@contextmanager
def rewards_named_by(flags: PairArguments | EvalArguments, loaded: Loaded) -> Iterator[RewardSet | None]:
    """The rewards that the flags name; None where they name none."""
    if not flags.reward:
        yield None
        return
    with load_rewards(with_reward_models(flags.reward, loaded), list(flags.reward_weights) or None, flags.reward_timeout) as rewards:
        yield rewards


def sample(
    sampling: SamplingArguments,
    generate: GenerateArguments,
    params: SamplingParams,
    loaded: Loaded,
    prompts: list[Prompt],
    rewards: RewardSet | None,
    sampler: Sampler,
) -> None:
    """Completes and scores the prompts, an object each, in chunks of a few full batches."""
    weights = (rewards.weights if rewards is not None else {}) | sampler.weights
    options = {"kv_cache_tokens": sampling.kv_cache_tokens or None, "max_num_seqs": sampling.max_num_seqs}
    engine = Engine(loaded.model, loaded.tokenizer, **options)  # type: ignore[arg-type]
    size = max(1, BATCHES_A_CHUNK * sampling.max_num_seqs // params.n)
    with writer(generate.output_file) as write, tqdm(total=len(prompts) * params.n, unit="sample", disable=None) as bar:
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            keys = [prompt.index for prompt in chunk]  # a resumed run draws what an unbroken one would have
            rollout = sampler(engine, chunk, params, keys, bar.update)
            if rewards is not None:
                score(rewards, chunk, rollout)
            for prompt, samples in zip(chunk, rollout.samples, strict=True):
                item = as_object(prompt, samples, generate.logprobs)
                for completion, one in zip(item["completions"], samples, strict=True):
                    if weights:
                        completion["reward"] = None if math.isnan(total := one.reward(weights)) else total
                write(item)


def sampling_params(sampling: SamplingArguments, generate: GenerateArguments) -> SamplingParams:
    """The arguments as the engine takes them."""
    return SamplingParams(
        n=generate.num_samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_completion_length,
        stop=list(sampling.stop),
        seed=generate.seed,
        logprobs=generate.logprobs,
    )


def read_prompts(data: DataArguments, generate: GenerateArguments, loaded: Loaded) -> list[Prompt]:
    """The prompts given on the command line, or those of the data set."""
    if generate.prompt:
        records = [Record({"prompt": text}, "--prompt", number) for number, text in enumerate(generate.prompt, 1)]
    else:
        records = prompts_named_by(data, data.dataset_name, data.max_samples)
    positions = positions_of(loaded.model)
    room = positions - 1 if positions else data.max_prompt_length  # a completion needs one
    own = 0 < data.max_prompt_length <= room
    return prompt_examples(
        records,
        loaded.tokenizer,
        max_prompt_length=data.max_prompt_length if own else room,
        limit_flag="--max_prompt_length" if own else f"the model has {positions} positions, and a completion needs one: shorten the prompt",
        on_bad_record=data.on_bad_record,
        system_prompt=data.system_prompt,
        vocab_size=causal_lm(loaded.model).get_input_embeddings().weight.shape[0],
    )


def key_of(value: Any) -> str:
    """What a prompt, or a whole record, is recognized by in the output file."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def key_of_prompt(item: Mapping[str, Any]) -> str:
    """The prompt's own key: other columns may change."""
    return key_of(item["prompt"])


def _key_of_completed(item: Mapping[str, Any]) -> str:
    """The same of an object that has completions, as a file of prompts has not."""
    if "completions" not in item:
        raise KeyError("completions")
    return key_of_prompt(item)


def not_done(prompts: list[Prompt], done: Counter[str], key: Key = key_of_prompt) -> Iterator[Prompt]:
    """The prompts that the output file has not got; of equal ones, as many as are missing."""
    left = Counter(done)
    for prompt in prompts:
        found = key(as_record(prompt))
        if left[found] > 0:
            left[found] -= 1
        else:
            yield prompt


def completed_prompts(path: Path, key: Key = key_of_prompt) -> Counter[str]:
    """How often each prompt is in the output file. A last line that was not written whole is cut off.

    Raises:
        ValueError: a line is not what `fastalign generate` writes.
    """
    done: Counter[str] = Counter()
    if not path.exists():
        return done
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            done[key(json.loads(line))] += 1
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"--output_file {path}: line {number} is no object with a prompt and completions, as fastalign generate writes;"
                " is it another file? choose a new one"
            ) from error
    rest = content[len(whole) :]
    if rest and not (rest.startswith(b"{") and (whole or b'"prompt": ' in rest)):
        raise ValueError(f"--output_file {path}: it ends in what fastalign generate does not write; is it another file? choose a new one")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return done


@contextmanager
def writer(output_file: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one object a line, to the file or, when none is named, to standard output."""

    def write(value: dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False, default=str)
        try:
            line.encode()
        except UnicodeEncodeError:  # half of a surrogate pair in a column: as JSON escapes it
            line = json.dumps(value, default=str)
        file.write(line + "\n")
        file.flush()

    if not output_file:
        file = sys.stdout
        yield write
        return
    Path(output_file).parent.mkdir(parents=True, exist_ok=True)
    with open(output_file, "a", encoding="utf-8") as file:
        yield write


def as_record(prompt: Prompt) -> dict[str, Any]:
    """The prompt and the record's other columns; `completions` is the output's own."""
    return {**prompt.columns, "prompt": prompt.prompt}


def as_object(prompt: Prompt, samples: list[Sample], logprobs: bool) -> dict[str, Any]:
    """{"prompt", the record's other columns, "completions": [{"text", "finish_reason", …}]}."""
    completions = []
    for sample in samples:
        item: dict[str, Any] = {"text": sample.text, "finish_reason": sample.finish_reason}
        if logprobs:
            item |= {"token_ids": sample.ids, "logprobs": sample.logprobs, "raw_logprobs": sample.raw_logprobs}
            item |= {"kept_mass": sample.kept_mass} if sample.kept_mass is not None else {}
            item |= {"scored": sample.scored} if sample.scored is not None else {}
        completions.append(item)
    return {**as_record(prompt), "completions": completions}
