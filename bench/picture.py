"""README's picture, from files that other commands wrote.

python -m bench.picture --demo runs/demo --grpo bench/results/grpo-*.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PHASES = {"rollout": "#4C72B0", "reference": "#8FA9D0", "update": "#DD8452"}
ACCURACY = "eval/rewards/correct/mean"


def learning(axis: Any, runs: list[Path]) -> None:
    """Held-out accuracy over the GRPO steps, a line a run."""
    for run in runs:
        rows = [json.loads(line) for line in (run / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        points = [(row["step"], row[ACCURACY]) for row in rows if ACCURACY in row]
        seed = json.loads((run / "summary.json").read_text(encoding="utf-8"))["seed"]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"seed {seed}")
    axis.set(ylim=(0, 1), xlabel="GRPO step", title="make demo: held-out greedy accuracy")
    axis.legend(frameon=False, loc="lower right")


def phases(axis: Any, files: list[Path]) -> None:
    """Seconds of a GRPO step by phase, a pair of bars a workload."""
    labels, at = [], 0
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        totals = []
        for side, turns in record["turns"].items():
            seconds = {name: median(turn["phases"][name] for turn in turns) for name in PHASES}
            left = 0.0
            for name, color in PHASES.items():
                axis.barh(at, seconds[name], left=left, color=color, label=name if at == 0 else None)
                left += seconds[name]
            totals.append(median(turn["seconds"] for turn in turns))
            faster = f", {totals[0] / totals[1]:.1f}× faster" if len(totals) == 2 else ""
            axis.text(left, at, f" {totals[-1]:.0f} s{faster}", va="center")
            labels.append(f"{side}, {record['options']['prompt_tokens']} prompts")
            at += 1
    axis.set_yticks(range(at), labels)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set(title="a GRPO step, 40M-parameter Qwen2, fp32, 2 CPU cores", xlabel="seconds")
    axis.legend(frameon=False, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.picture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, nargs="+", required=True, help="output folders of fastalign demo")
    parser.add_argument("--grpo", type=Path, nargs="+", required=True, help="JSON files of bench.peers.trl_grpo")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overview.png")
    options = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1, 1.25))
    learning(left, options.demo)
    phases(right, options.grpo)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
