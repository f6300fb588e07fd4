"""Learning, not only running: every method on the demo's additions, from one and the same SFT model.

    python -m bench.learn [--only dpo kto ...] [--seeds 0 1] [--json FILE] [--plot FILE] [--table FILE]

A seed's problems, untrained model and cold start are those of `fastalign demo`. Preference methods get correct answers against wrong
ones that the SFT model itself sampled; rejection sampling, online methods and reward models their own data from the same problems. What is
reported is the greedy accuracy on 400 held-out problems before and after, or for reward models the share of held-out pairs (steps) in the
right order. Rows that --json's file has already and that are not asked for stay in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.harness import taken, write_record
from bench.learn_offline import OFFLINE
from bench.learn_online import ONLINE
from bench.learn_setting import Row, Setting, prepare

METHODS: dict[str, Callable[[Setting], Row]] = OFFLINE | ONLINE
PAGE = """# What each method learns

<!-- written by make learn -->

On the demo's additions, from its cold start: held-out accuracy, in percent of 400 problems; of reward models the share of pairs (steps) in
order.

![before and after, method by method](learning.png)

"""


def table(rows: list[Row]) -> str:
    """Markdown: one line a method and seed."""
    lines = ["| method | seed | measure | before | after | seconds | taken |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        teacher = f" (teacher {row['teacher']:.1%})" if "teacher" in row else ""
        numbers = f"{row['before']:.1%} | {row['after']:.1%} | {row['seconds']:.0f}"
        where = ", ".join(row[name] for name in ("date", "commit", "device") if name in row)
        lines.append(f"| {row['method']} | {row['seed']} | {row['measure']}{teacher} | {numbers} | {where} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Before and after, a bar a method and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [row["after"] for row in rows], color="#2563eb", label="after")
    axes.barh(places, [row["before"] for row in rows], color="#cbd5e1", label="before")
    axes.set_yticks(places, [f"{row['method']}, seed {row['seed']}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="held-out accuracy; of reward models: pairs in order")
    axes.margins(y=0.01)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.learn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods alone")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--json", type=Path, help="write the rows to this file")
    p.add_argument("--table", type=Path, help="write the table to this file")
    p.add_argument("--plot", type=Path, help="write the picture to this file")
    return p


def main() -> None:
    args = parser().parse_args()
    rows = one_seed(args) if len(args.seeds) == 1 else side_by_side(args)
    print(table(rows))


def one_seed(args: argparse.Namespace) -> list[Row]:
    """Every method in turn; saved after each, so that what is measured outlives an interrupt."""
    (seed,), rows = args.seeds, []
    with tempfile.TemporaryDirectory(prefix="fastalign-learn-") as folder:
        setting = prepare(Path(folder), seed)
        for method in args.only:
            began = time.perf_counter()
            found = METHODS[method](setting)
            rows.append({"method": method, "seed": seed, **found, "seconds": time.perf_counter() - began, **taken()})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            save(rows, args)
    return rows


def side_by_side(args: argparse.Namespace) -> list[Row]:
    """The seeds in processes of their own, which share the cores: small models gain little from a second thread."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(args.seeds)))}
    with tempfile.TemporaryDirectory(prefix="fastalign-learn-") as folder:
        parts = [Path(folder) / f"{seed}.json" for seed in args.seeds]
        commands = [
            [sys.executable, "-m", "bench.learn", "--only", *args.only, "--seeds", str(seed), "--json", str(part)]
            for seed, part in zip(args.seeds, parts, strict=True)
        ]
        children = [subprocess.Popen(command, env=environment) for command in commands]
        try:
            failed = [seed for seed, child in zip(args.seeds, children, strict=True) if child.wait()]
        finally:  # an interrupt reaches the children, too, and what they found until then is kept
            rows = [row for part in parts if part.exists() for row in json.loads(part.read_text(encoding="utf-8"))["rows"]]
            save(rows, args)
    if failed:
        raise SystemExit(f"seeds {failed} ended with an error; what was found until then is saved")
    return rows


def save(rows: list[Row], args: argparse.Namespace) -> None:
    """The rows in order of their method, wherever they were asked for; with them those of the record that were not asked for."""
    if args.json and args.json.exists():
        measured = {(row["method"], row["seed"]) for row in rows}
        record = json.loads(args.json.read_text(encoding="utf-8"))
        facts = {name: record[name] for name in ("device", "date", "commit", "torch") if name in record}
        known = [facts | row for row in record["rows"] if row["method"] in METHODS]
        rows = [*rows, *(row for row in known if (row["method"], row["seed"]) not in measured)]
    rows = sorted(rows, key=lambda row: (list(METHODS).index(row["method"]), row["seed"]))
    if args.table:
        args.table.write_text(PAGE + table(rows) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)
    if args.json:
        write_record(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
