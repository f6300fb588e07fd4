"""Every bench in one run: a table on the terminal, one JSON file with device, date and commit, and plots.

    python -m bench.suite [--quick] [--json FILE] [--plots FOLDER] [pytest arguments, e.g. bench/bench_scan.py or -k gae]
    python -m bench.suite --only policy --into bench/results/kernels-cpu-2026-11-20.json

The second measures some files again (--only may be repeated) and puts their cases into results that exist; the other cases stay, and
every row keeps the date and commit it was taken on. Each case runs its sides in turn with cold caches; see bench/README.md for what is
compared and how it is kept fair.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BENCHES = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def run(arguments: list[str], results: Path) -> int:
    """The benches under pytest with the options of bench/conftest.py; their lines go to `results`."""
    named = [a for a in arguments if a.startswith("bench/") or a.endswith(".py")]
    rest = [a for a in arguments if a not in named]
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), "--results", str(results), *rest]
    return subprocess.run([*command, *(named or [str(HERE)])], cwd=HERE.parent).returncode


def merged(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The record `before` with the cases (op, shape, dtype) of `found` in place of its own.

    Each row says when and on which commit it was taken; the record names every commit, and the later date.

    Raises:
        ValueError: the two are from different devices or versions of torch, whose times do not belong in one table.
    """
    for key in ("device", "torch"):
        if before[key] != found[key]:
            raise ValueError(f"the results are of {key} {before[key]!r}, this run is of {found[key]!r}; give another file")
    case = ("op", "shape", "dtype")
    new = {tuple(row[key] for key in case) for row in found["results"]}
    rows = [
        {"date": record["date"], "commit": record["commit"], **row}
        for record in (before, found)
        for row in record["results"]
        if record is found or tuple(row[key] for key in case) not in new
    ]
    commits = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    return {**before, "date": max(before["date"], found["date"]), "commit": commits, "results": rows}


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The suite's own options, and what is left for pytest."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    parser.add_argument("--only", action="append", choices=BENCHES, default=[], help="bench/bench_NAME.py alone; repeatable")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--json", type=Path, metavar="FILE", help="keep everything measured, with the device, date and commit")
    target.add_argument("--into", type=Path, metavar="FILE", help="put the cases measured into this file of --json, and keep its others")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNG plots here (default: beside the JSON file)")
    options, rest = parser.parse_known_args()
    missing = [word for word in rest if word.endswith(".py") and not (HERE.parent / word).exists()]
    if missing:
        parser.error(f"no such bench: {', '.join(missing)}; there are {', '.join(path.name for path in BENCHES.values())}")
    if options.into and not options.into.exists():
        parser.error(f"--into: no such file: {options.into}; --json writes a new one")
    return options, [*(["--quick"] if options.quick else []), *rest, *(str(BENCHES[name]) for name in options.only)]


def main() -> None:
    options, arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        results = options.json or Path(folder) / "results.json"
        before = results.stat().st_mtime if results.exists() else 0.0
        status = run(arguments, results)
        if results.exists() and results.stat().st_mtime > before:
            record = json.loads(results.read_text(encoding="utf-8"))
            kept = options.json or options.into
            if options.into:
                record = merged(json.loads(kept.read_text(encoding="utf-8")), record)
                kept.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            plots = options.plots or (kept.parent if kept else None)
            if plots:
                from bench.plots import draw  # matplotlib only when something is drawn

                for path in draw(record, plots, kept.stem if kept else "suite"):
                    print(f"plot: {path}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
