"""Writes bench/results/tables.md from the JSON files beside it, and the README's one table, between its `<!-- figures -->` marks.

    python -m bench.readme [--check]

Of the files of one kind and device the newest is taken; each table says on which device and commit it was measured, and how to measure
it again. The README shows one kind of CPU, and beside its ratios those of the others. --check writes nothing and fails when a file says
something else (a test runs it).
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
TABLES = "bench/results/tables.md"
SECONDS_PEERS = {  # file, what, command
    "grpo-short": ("GRPO step, 8 prompts × 8 × 64 tokens, ≈25-token prompts", "python -m bench.peers.trl_grpo --prompt_tokens short"),
    "grpo-long": ("the same with ≈300-token prompts", "python -m bench.peers.trl_grpo --prompt_tokens long"),
    "dpo": ("DPO step, 8 pairs of ≈290 + 2 × 70 tokens, reference included", "python -m bench.peers.trl_dpo"),
    "sft": ("SFT step, 16 GSM8K records", "python -m bench.peers.trl_sft"),
}
PROCESSORS = {  # folder of the results: (in a sentence, in a cell)
    "": ("a CPU with AVX-512", "AVX-512"),
    "amx/": ("a CPU with AMX", "AMX"),
    "avx2/": ("a CPU with AVX2", "AVX2"),
    "zen1/": ("a Zen 1 CPU, which takes AVX2 in two halves", "Zen 1"),
}
SHOWN = "zen1/"  # in the README
OPERATIONS = {  # of the README: (op, shape), all of them fp32
    ("linear_loss", "T=512 V=151936 H=896"): "loss of a head and its gradient, 512 × 151,936 × 896",
    ("cross_entropy, half masked", "T=512 V=151936 H=896"): "the same, half of the tokens without a label",
    ("packed forward+backward", "8x512"): "attention over 8 packed sequences of 512, forward + backward",
    ("tree forward+backward", "8x(256+8x64)"): "attention over 8 prompts of 256 with 8 completions of 64, forward + backward",
    ("decode", "64x(256/8+64)"): "attention of a decode step, 64 sequences, 8 a prompt of 256",
    ("sample", "B=32 V=151936"): "sampling, 32 rows of 151,936",
    ("gae", "B=64 T=2048"): "GAE, 64 × 2,048",
    ("preference dpo x100", "16 pairs of 512"): "DPO's loss of 16 packed pairs of 512 tokens, 100 times",
}


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


def trainer_runs(folder: str) -> dict[str, tuple[dict[str, Any], dict[str, float], list[str], str]]:
    """By kind, a run against TRL: its record, each side's seconds a step, a cell a side, the command.

    Seconds are medians of the measured steps and a step's share of the first pass over the data, which an epoch has once.
    """
    runs = {}
    for stem, (_, command) in SECONDS_PEERS.items():
        for record in records(f"{folder}{stem}-*.json"):
            seconds = {side: median(turn["seconds"] for turn in turns) for side, turns in record["turns"].items()}
            for side in seconds if "warm" in record else ():
                steps = len(record["turns"][side]) + len(record["warm"][side])
                seconds[side] += record["facts"][side].get("preparation_s", 0.0) / steps
            peak = {side: max(turn["peak_mib"] for turn in turns) for side, turns in record["turns"].items()}
            cells = [f"{number(seconds[side])} s, {peak[side]:,.0f} MiB" for side in ("trl", "fastalign")]
            measured = len(next(iter(record["turns"].values())))
            steps = f" --steps {measured}" if stem.startswith("grpo") and measured != 2 else ""  # as it was run, where not by default
            runs[stem] = (record, seconds, cells, f"`{command}{steps}`")
    return runs


def trainers(folder: str) -> list[str]:
    """Whole training steps against TRL."""
    rows = []
    for stem, (record, seconds, cells, command) in trainer_runs(folder).items():
        faster = f"**{seconds['trl'] / seconds['fastalign']:.1f}×**"
        rows.append(f"| {SECONDS_PEERS[stem][0]} | {' | '.join(cells)} | {faster} | {record['date']}, {record['commit']} | {command} |")
    if not rows:
        return []
    first = records(f"{folder}grpo-*.json")[0]
    machine = f"{PROCESSORS[folder][0]}: {first['device']}, torch {first['torch']}"
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


def on_other_cpus(ratios: dict[str, float]) -> str:
    """The ratios of other folders of results, each with the kind of its CPU."""
    return ", ".join(f"{ratio(value)}× {PROCESSORS[folder][1]}" for folder, value in ratios.items()) or "–"


def shown_trainers() -> list[str]:
    others = {folder: trainer_runs(folder) for folder in PROCESSORS if folder != SHOWN}
    rows = []
    for stem, (record, seconds, (peer, ours), command) in trainer_runs(SHOWN).items():
        all_seconds = {folder: runs[stem][1] for folder, runs in others.items() if stem in runs}
        ratios = on_other_cpus({folder: each["trl"] / each["fastalign"] for folder, each in all_seconds.items()})
        faster = f"**{ratio(seconds['trl'] / seconds['fastalign'])}×**"
        when = f"{record['date']}, {record['commit']}"
        rows.append(f"| {SECONDS_PEERS[stem][0]} | TRL 1.16: {peer} | {ours} | {faster} | {ratios} | {when} | {command} |")
    return rows


def shown_generation() -> list[str]:
    rows = []
    for record in records(f"{SHOWN}generation-*.json"):
        for one in record["lines"]:
            rate = {side: median(rounds) for side, rounds in one["tokens_per_second"].items()}
            peers = [side for side in ("generate", "generate_batch") if side in rate]
            peer = ", ".join(f"`{side}` {rate[side]:,.0f} tokens/s" for side in peers)
            faster = ", ".join(f"**{ratio(rate['fastalign'] / rate[side])}×**" for side in peers)
            load, lengths = one["load"].split(" ")
            what = f"generation, {one['model']}, {load.replace('x', ' × ')} samples, {lengths.replace('+', ' + ')} tokens"
            when = f"{record['date']}, {one['commit']}"
            ours = f"{rate['fastalign']:,.0f} tokens/s"
            rows.append(f"| {what} | {peer} | {ours} | {faster} | – | {when} | `python bench/bench_generation.py` |")
    return rows


def operation_times(folder: str) -> dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """The README's operations in a folder's records: (record, result) by op and shape."""
    times = {}
    for record in records(f"{folder}kernels-*.json"):
        for result in record["results"]:
            key = (result["op"], result["shape"])
            if key in OPERATIONS and result["backend"] == "fastalign" and result["dtype"] == "float32" and result["torch_ms"]:
                times[key] = (record, result)
    return times


def shown_operations() -> list[str]:
    mine = operation_times(SHOWN)
    others = {folder: operation_times(folder) for folder in PROCESSORS if folder != SHOWN}
    rows = []
    for key, what in OPERATIONS.items():
        if key in mine:
            record, result = mine[key]
            ratios = {folder: times[key][1]["torch_ms"] / times[key][1]["ms"] for folder, times in others.items() if key in times}
            faster = f"**{ratio(result['torch_ms'] / result['ms'])}×**"
            when = f"{result.get('date', record['date'])}, {result.get('commit', record['commit'])}"
            times = f"torch {number(result['torch_ms'])} ms | {number(result['ms'])} ms"
            rows.append(f"| {what} | {times} | {faster} | {on_other_cpus(ratios)} | {when} | `make bench` |")
    return rows


def section() -> str:
    """What stands between the README's marks."""
    machine = records(f"{SHOWN}grpo-*.json")[0]
    head = (
        f"On {PROCESSORS[SHOWN][0]} ({machine['device']}, torch {machine['torch']}), in fp32; every row is one run in which\n"
        "the sides take turns. The trainers' model is a Qwen2 of 40M parameters with a vocabulary of 32,000; peak memory is that of a\n"
        f"process. All tables, also of other CPUs and dtypes, are in [{TABLES}]({TABLES})."
    )
    columns = "| what | peer | fastalign | faster | on other CPUs | taken | command |\n|---|---|---|---|---|---|---|"
    return "\n".join([BEGIN, "", head, "", columns, *shown_trainers(), *shown_generation(), *shown_operations(), "", END])


def tables() -> str:
    """The whole of tables.md."""
    lines = ["# All figures", "", "Written by `python -m bench.readme` from the files beside this one.", ""]
    for folder in PROCESSORS:
        lines += trainers(folder)
    for name, table in (("generation", generation), ("kernels", kernels)):
        for folder in PROCESSORS:
            for record in records(f"{folder}{name}-*.json"):
                lines += table(record)
    return "\n".join(lines)


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
    readme = ROOT / "README.md"
    new = {readme: written(readme.read_text(encoding="utf-8")), ROOT / TABLES: tables()}
    for path, text in new.items():
        same = path.exists() and path.read_text(encoding="utf-8") == text
        if options.check and not same:
            raise SystemExit(f"{path.name}'s figures are not those of bench/results: run python -m bench.readme")
        if not same:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
