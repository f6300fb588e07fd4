"""Writes the README's benchmark tables from the JSON files of bench/results, between its `<!-- figures -->` marks.

    python -m bench.readme [--check]

Of the files of one kind and device the newest is taken; each table says on which device and commit it was measured, and how to measure
it again. --check writes nothing and fails when the README says something else (a test runs it).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: written by python -m bench.readme -->", "<!-- end of figures -->"
SECONDS_PEERS = {  # file, what, command
    "grpo-short": ("GRPO step, 8 prompts × 8 × 64 tokens, ≈25-token prompts", "python -m bench.peers.trl_grpo --prompt_tokens short"),
    "grpo-long": ("the same with ≈300-token prompts", "python -m bench.peers.trl_grpo --prompt_tokens long"),
    "dpo": ("DPO step, 8 pairs of ≈290 + 2 × 70 tokens, reference included", "python -m bench.peers.trl_dpo"),
    "sft": ("SFT step, 16 GSM8K records", "python -m bench.peers.trl_sft"),
}
PROCESSORS = {"": "a CPU with AVX-512", "amx/": "a CPU with AMX", "avx2/": "a CPU with AVX2 and no AVX-512"}  # folder of the results


def records(pattern: str) -> list[dict[str, Any]]:
    """The newest file a device of those that match."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob(pattern)):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["device"] not in newest or record["date"] >= newest[record["device"]]["date"]:
            newest[record["device"]] = record
    return list(newest.values())


def taken(record: dict[str, Any]) -> str:
    return f"{record['device']}, {record['date']}, commit {record['commit']}, torch {record['torch']}"


def trainers(folder: str) -> list[str]:
    """Whole training steps against TRL: medians of the measured steps, a first pass over the data shared out over one epoch's."""
    rows = []
    for stem, (what, command) in SECONDS_PEERS.items():
        for record in records(f"{folder}{stem}-*.json"):
            seconds = {side: median(turn["seconds"] for turn in turns) for side, turns in record["turns"].items()}
            for side in seconds if "warm" in record else ():
                steps = len(record["turns"][side]) + len(record["warm"][side])
                seconds[side] += record["facts"][side].get("preparation_s", 0.0) / steps
            peak = {side: max(turn["peak_mib"] for turn in turns) for side, turns in record["turns"].items()}
            cells = [f"{number(seconds[side])} s, {peak[side]:,.0f} MiB" for side in ("trl", "fastalign")]
            faster = f"**{seconds['trl'] / seconds['fastalign']:.1f}×**"
            measured = len(next(iter(record["turns"].values())))
            steps = f" --steps {measured}" if stem.startswith("grpo") and measured != 2 else ""  # as it was run, where not by default
            rows.append(f"| {what} | {' | '.join(cells)} | {faster} | {record['date']}, {record['commit']} | `{command}{steps}` |")
    if not rows:
        return []
    first = records(f"{folder}grpo-*.json")[0]
    machine = f"{PROCESSORS[folder]}: {first['device']}, torch {first['torch']}"
    head = f"Training steps of a 40M-parameter Qwen2 (vocabulary 32,000) in fp32, against TRL 1.16 ({machine}):"
    return [head, "", "| what | TRL | fastalign | faster | taken | command |", "|---|---|---|---|---|---|", *rows, ""]


def generation(record: dict[str, Any]) -> list[str]:
    """Tokens a second of the engine and of transformers: medians of the rounds."""
    rows = []
    for one in record["lines"]:
        rate = {side: median(rounds) for side, rounds in one["tokens_per_second"].items()}
        cells = [f"{rate[side]:,.0f}" if side in rate else "–" for side in ("generate", "generate_batch", "fastalign")]
        faster = [f"**{rate['fastalign'] / rate[side]:.1f}×**" if side in rate else "–" for side in ("generate", "generate_batch")]
        rows.append(f"| {one['model']} | {one['load']} | {one['dtype']} | {' | '.join(cells + faster)} | {one['commit']} |")
    head = f"Tokens a second, prompts × samples, prompt + new tokens ({record['device']}, {record['date']}, torch {record['torch']};"
    columns = "| model | load | dtype | `generate` | `generate_batch` | fastalign | × `generate` | × `generate_batch` | commit |"
    return [head + " `python bench/bench_generation.py`):", "", columns, "|---|---|---|---|---|---|---|---|---|", *rows, ""]


def kernels(record: dict[str, Any]) -> list[str]:
    """Each op's largest case: time, times faster than torch, times its floor."""
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in record["results"]:
        key = (result["op"], result["backend"], result["dtype"])
        ours = result["backend"].startswith("fastalign") and not result["op"].startswith("sweep")
        if ours and result["torch_ms"] and (key not in best or result["torch_ms"] > best[key]["torch_ms"]):
            best[key] = result
    taken_each = any("commit" in result for result in best.values())  # of several runs: bench.suite --into
    rows = []
    for (op, side, dtype), result in best.items():
        name = ", ".join(part for part in (op, side.removeprefix("fastalign").strip(", ")) if part)
        floor = f"{result['ms'] / result['floor_ms']:.2f}×" if result["floor_ms"] else "–"
        times = f"{number(result['torch_ms'])} ms | {number(result['ms'])} ms | **{ratio(result['torch_ms'] / result['ms'])}×**"
        when = f" {result['date']}, {result['commit']} |" if taken_each else ""
        rows.append(f"| {name} | {result['shape']} | {dtype} | {times} | {floor} |{when}")
    head = f"Operations against torch and against their floor ({taken(record)}; `make bench`):"
    columns = "| op | shape | dtype | torch | fastalign | faster | × floor |" + (" taken |" if taken_each else "")
    return [head, "", columns, "|---|---|---|---|---|---|---|" + ("---|" if taken_each else ""), *rows, ""]


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def section() -> str:
    lines = [BEGIN, ""]
    for folder in PROCESSORS:
        lines += trainers(folder)
    for folder in PROCESSORS:
        for record in records(f"{folder}generation-*.json"):
            lines += generation(record)
    for record in records("kernels-*.json"):
        lines += kernels(record)
    return "\n".join([*lines, END])


def written(readme: str) -> str:
    """The README with its section replaced."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    if not pattern.search(readme):
        raise SystemExit(f"README.md has no section between {BEGIN} and {END}")
    return pattern.sub(lambda _: section(), readme)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__, formatter_class=formatter)
    parser.add_argument("--check", action="store_true", help="fail when the README differs from what would be written")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = written(before)
    if options.check:
        raise SystemExit(0 if before == after else "README.md's figures are not those of bench/results: run python -m bench.readme")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
