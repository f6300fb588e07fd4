"""Plots of a suite's JSON file: how many times faster than torch each op is, and time and memory against T and V.

python -m bench.plots bench/results/kernels-cpu-2026-11-20.json
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, PEER = "#DD8452", "#4C72B0"


def sizes(shape: str) -> dict[str, int]:
    """{"T": 512, "V": 151936} of "T=512 V=151,936"."""
    return {name: int(value.replace(",", "")) for name, value in re.findall(r"(\w+)=([\d,]+)", shape)}


def ratios(record: dict[str, Any], axis: Any) -> int:
    """One bar a case of ours: times faster than torch in the same run, on a logarithmic axis. Returns how many."""
    cases = [r for r in record["results"] if r["backend"].startswith("fastalign") and r["torch_ms"] and not r["op"].startswith("sweep")]
    labels = []
    for at, case in enumerate(cases):
        ratio = case["torch_ms"] / case["ms"]
        axis.barh(at, ratio, color=OURS if ratio >= 1 else PEER)
        axis.text(ratio, at, f" {ratio:,.3g}×" if ratio < 100 else f" {ratio:,.0f}×", va="center", fontsize=7)
        name = ", ".join(part for part in (case["op"], case["backend"].removeprefix("fastalign").strip(", ")) if part)
        labels.append(f"{name}  {case['shape']}  {case['dtype']}")
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_xscale("log")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set(title=f"times faster than torch, {record['device']}, {record['date']}")
    return len(cases)


def sweep(record: dict[str, Any], axis: Any, variable: str, value: str) -> bool:
    """Lines of `value` (ms or peak_mib) of every sweep over `variable` (T or V), one an op and side. False when there is none."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for result in record["results"]:
        if result["op"].startswith(f"sweep {variable}: ") and result[value] is not None:
            name = f"{result['op'].split(': ')[1]}, {result['backend']}"
            lines[name].append((sizes(result["shape"])[variable], result[value]))
    for name, points in lines.items():
        ours = "fastalign" in name
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linestyle="-" if ours else "--", label=name)
    if lines:
        axis.set(xlabel=variable, ylabel={"ms": "ms", "peak_mib": "peak MiB above inputs"}[value], xscale="log", yscale="log")
        axis.legend(frameon=False, fontsize=7)
    return bool(lines)


def draw(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes <stem>.png (ratios) and <stem>-scaling.png (time and memory against T and V) where the record has them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    figure, axis = plt.subplots(figsize=(11, 2 + 0.13 * len(record["results"]) / 2))
    if ratios(record, axis):
        written.append(_save(figure, folder / f"{stem}.png"))
    panels = [("T", "peak_mib", "memory against scored tokens"), ("T", "ms", "time against scored tokens")]
    panels.append(("V", "ms", "time against vocabulary"))
    swept = [r for r in record["results"] if r["op"].startswith("sweep ")]
    panels = [panel for panel in panels if any(r["op"].startswith(f"sweep {panel[0]}: ") and r[panel[1]] is not None for r in swept)]
    if panels:
        figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False)
        for axis, (variable, value, title) in zip(axes[0], panels, strict=True):
            sweep(record, axis, variable, value)
            axis.set_title(title)
        written.append(_save(figure, folder / f"{stem}-scaling.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON file of bench.suite")
    options = parser.parse_args()
    record = json.loads(options.file.read_text(encoding="utf-8"))
    for path in draw(record, options.file.parent, options.file.stem):
        print(path)


if __name__ == "__main__":
    main()
