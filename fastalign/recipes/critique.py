"""`fastalign critique`: a model's answers criticized and revised, or compared, under principles; records for sft, pairs for dpo."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..generation import Engine
from ..training.files import write_atomic
from .arguments import Arguments, GenerateArguments
from .claims import claim
from .feedback_arguments import CritiqueArguments
from .generate import BATCHES_A_CHUNK, completed_prompts, not_done, read_prompts, sampling_params, writer
from .judging import build_comparer
from .pairs import as_side
from .principles import load_principles
from .revising import Reviser
from .setup import load

TRANSCRIPTS, RECORDS, PAIRS = "transcripts.jsonl", "sft.jsonl", "pairs.jsonl"
COMPLETE = ("rounds", "stop")  # how the transcripts end of which data are made
FREE = ("output_dir", "overwrite_output_dir", "max_num_seqs", "kv_cache_tokens", "device", "min_probability", "finished_only")


def run(args: Arguments) -> dict[str, int]:
    """Goes through every prompt that transcripts.jsonl has not got yet, then writes sft.jsonl and pairs.jsonl; returns their counts.

    Raises:
        ValueError: arguments out of range, principles or a judge that are none. FileExistsError: output_dir holds another run.
    """
    given = args.critique
    compares = given.feedback == "compare"
    check(given, args.sampling.temperature)
    constitution = load_principles(given.principles)
    folder = Path(given.output_dir)
    flags, files = args.flat(), (TRANSCRIPTS, RECORDS, PAIRS)
    claim(folder, flags, files=files, free=FREE, overwrite=given.overwrite_output_dir, what="a critique")
    done = completed_prompts(folder / TRANSCRIPTS)
    loaded = load(args.model)
    own = GenerateArguments(seed=given.seed, num_samples=2 if compares else 1)
    prompts = list(not_done(read_prompts(args.data, own, loaded), done))
    options = {"kv_cache_tokens": args.sampling.kv_cache_tokens or None, "max_num_seqs": args.sampling.max_num_seqs}
    engine = Engine(loaded.model, loaded.tokenizer, **options)  # type: ignore[arg-type]
    reviser = Reviser(engine, sampling_params(args.sampling, own), constitution, given.seed, given.num_rounds)
    comparer = build_comparer(given.judge or "judge:model=self,template=choose_under", loaded, "compare_under") if compares else None
    size = max(1, BATCHES_A_CHUNK * args.sampling.max_num_seqs // own.num_samples)
    with writer(str(folder / TRANSCRIPTS)) as write, tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            found = reviser.revise(chunk) if comparer is None else reviser.compare(chunk, comparer)
            for prompt, transcript in zip(chunk, found, strict=True):
                write({"prompt": prompt.prompt, **transcript})
            bar.update(len(chunk))
    return write_data(folder, given)


def check(given: CritiqueArguments, temperature: float) -> None:
    """What can be said before anything is loaded.

    Raises:
        ValueError: flags that do not go together.
    """
    if given.num_rounds < 1:
        raise ValueError(f"--num_rounds must be >= 1, got {given.num_rounds}")
    if given.feedback == "compare" and temperature == 0:
        raise ValueError("--feedback compare: two greedy answers are the same; give --temperature")
    if given.feedback == "revise" and given.judge:
        raise ValueError("--judge compares answers: add --feedback compare; revisions are the model's own")
    if not 0.5 <= given.min_probability <= 1:
        raise ValueError(f"--min_probability must be between 0.5 and 1, got {given.min_probability}")


def write_data(folder: Path, given: CritiqueArguments) -> dict[str, int]:
    """The transcripts as records for sft (of revisions) and as pairs for dpo."""
    items = [json.loads(line) for line in (folder / TRANSCRIPTS).read_text(encoding="utf-8").splitlines()]
    records: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for item in items:
        if given.feedback == "compare":
            pairs += preferred(item, given)
        else:
            records += revised(item, given)
            pairs += improved(item, given)
    for name, found in ((RECORDS, records), (PAIRS, pairs)):
        write_atomic(folder / name, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in found))
    counts = {"prompts": len(items), "records": len(records), "pairs": len(pairs)}
    remedy = "; are all cut off? raise --max_completion_length, or give --finished_only false" if items and not pairs else ""
    print(f"{counts['records']} records and {counts['pairs']} pairs of {len(items)} prompts in {folder}{remedy}", file=sys.stderr)
    return counts


def revised(item: Mapping[str, Any], given: CritiqueArguments) -> Iterator[dict[str, Any]]:
    """The prompt with the last version of its answer: what a model is fine-tuned on, and the refined answer itself."""
    last = versions(item)[-1]
    if item["ended"] in COMPLETE and usable(last, given):
        yield {"prompt": item["prompt"], "completion": as_side(item["prompt"], last["text"])}


def improved(item: Mapping[str, Any], given: CritiqueArguments) -> Iterator[dict[str, Any]]:
    """The last version against the first."""
    first, *_, last = [versions(item)[0], *versions(item)]
    if item["ended"] in COMPLETE and first["text"] != last["text"] and usable(first, given) and usable(last, given):
        sides = {"chosen": as_side(item["prompt"], last["text"]), "rejected": as_side(item["prompt"], first["text"])}
        yield {"prompt": item["prompt"], **sides}


def preferred(item: Mapping[str, Any], given: CritiqueArguments) -> Iterator[dict[str, Any]]:
    """The answer that is more probably the better one against the other, with that probability."""
    score, answers = item["score"], item["answers"]
    if score is None or score == 0.5 or not all(usable(answer, given) for answer in answers):
        return
    win, lose = answers if score > 0.5 else answers[::-1]
    probability = max(score, 1 - score)
    if probability >= given.min_probability:
        sides = {"chosen": as_side(item["prompt"], win["text"]), "rejected": as_side(item["prompt"], lose["text"])}
        yield {"prompt": item["prompt"], **sides, "probability": probability}


def versions(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answer and its revisions."""
    return [item["answer"], *(step["revision"] for step in item["rounds"] if step["revision"] is not None)]


def usable(answer: Mapping[str, Any], given: CritiqueArguments) -> bool:
    """Whether data may be made of it."""
    return bool(answer["text"]) and (answer["finish_reason"] == "stop" or not given.finished_only)
