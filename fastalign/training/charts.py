"""The report's curves: matplotlib figures as SVG, one small panel a question."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Points = tuple[list[float], list[float]]

INK, MUTED, GRID = "#1c2128", "#667080", "#e6e9ee"
COLORS = ("#2457d6", "#d9622b", "#1a8f6a", "#8a4fc7", "#b8890b", "#c2385a", "#3a9cc2", "#6b7280")
MAX_POINTS = 600  # a longer run is averaged in windows: no screen shows more, and the file stays small
SMOOTH_FROM = 40  # points from which a moving average is drawn over the raw curve


@dataclass(frozen=True)
class Panel:
    """One chart to be: its question, its series (metric key → label), an optional band between two keys, and whether zero is shown."""

    title: str
    series: Mapping[str, str]
    unit: str = ""
    band: tuple[str, str] | None = None
    from_zero: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawn panel."""

    title: str
    unit: str
    image: str  # a data: URI


PANELS = (
    Panel("Reward", {"reward": "training", "eval/reward": "held-out"}),
    Panel("Loss", {"loss": "training", "eval/loss": "held-out"}),
    Panel("Token accuracy", {"mean_token_accuracy": "training", "eval/mean_token_accuracy": "held-out"}),
    Panel("KL to the reference", {"kl": "kl"}, "nats a token"),
    Panel("Entropy", {"entropy": "entropy"}, "nats a token"),
    Panel("Completion length", {"completions/mean_length": "mean"}, "tokens", ("completions/min_length", "completions/max_length")),
    Panel("Spread of rewards in a group", {"reward_std": "standard deviation"}),
    Panel("No signal", {"frac_reward_zero_std": "groups of equal rewards", "completions/clipped_ratio": "completions cut off"}, "fraction"),
    Panel("Clipped tokens", {"clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"}, "fraction"),
    Panel(
        "Sampler against trainer",
        {"sampling/sampling_logp_difference/max": "largest", "sampling/sampling_logp_difference/mean": "mean"},
        "|difference of log-probs|, nats",
    ),
    Panel("Gradient norm", {"grad_norm": "before clipping"}),
    Panel("Learning rate", {"learning_rate": "learning rate"}),
    Panel("Throughput", {"tokens_per_second": "tokens"}, "tokens a second", from_zero=True),
    Panel("Peak memory", {"peak_memory_mb": "peak"}, "MiB", from_zero=True),
)


def draw(rows: Rows) -> list[Chart]:
    """A chart for every panel that has at least two points, one for each reward by name, and the phases' times."""
    import matplotlib as mpl  # deferred: half a second, and only a report needs it

    style: Any = _style()  # matplotlib types its keys one by one
    with mpl.rc_context(style):
        names = sorted({name for row in rows for name in row if name.startswith("rewards/") and name.endswith("/mean")})
        rewards = Panel("Rewards by name", {name: name.split("/")[1] for name in names})
        panels = [*PANELS[:1], *([rewards] if len(names) > 1 else []), *PANELS[1:]]
        charts = [chart for panel in panels if (chart := _lines(panel, rows))]
        phases = _phases(rows)
        return [*charts, phases] if phases else charts


def points(rows: Rows, name: str) -> Points:
    """(steps, values) of a metric where it was measured, averaged in windows beyond `MAX_POINTS`."""
    found = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    width = math.ceil(len(found) / MAX_POINTS)
    if width > 1:
        windows = [found[i : i + width] for i in range(0, len(found), width)]
        found = [(window[-1][0], sum(value for _, value in window) / len(window)) for window in windows]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred moving average over a tenth of the curve, narrower at the ends."""
    half = max(1, len(values) // 20)
    out = []
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        out.append(sum(window) / len(window))
    return out


def _lines(panel: Panel, rows: Rows) -> Chart | None:
    curves = [(label, points(rows, name)) for name, label in panel.series.items()]
    curves = [(label, curve) for label, curve in curves if len(curve[0]) > 1]
    if not curves:
        return None
    figure, axes = _axes(rows)
    for color, (label, (steps, values)) in zip(COLORS, curves, strict=False):
        marker = {"marker": "o", "markersize": 3.2} if len(steps) <= 12 else {}
        if len(steps) >= SMOOTH_FROM:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
            values = smoothed(values)
        axes.plot(steps, values, color=color, linewidth=1.7, label=label, clip_on=False, **marker)
    if panel.band:
        (steps, low), (_, high) = points(rows, panel.band[0]), points(rows, panel.band[1])
        if len(low) == len(high) and len(low) > 1:
            axes.fill_between(steps, low, high, color=COLORS[0], alpha=0.12, linewidth=0, label="shortest to longest")
    if len(curves) > 1 or panel.band:
        _legend(axes)
    _bound(axes, [value for _, (_, values) in curves for value in values], from_zero=panel.from_zero)
    return Chart(panel.title, panel.unit, _image(figure))


def _phases(rows: Rows) -> Chart | None:
    """Seconds a step by phase, stacked."""
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name.startswith("timing_s/") and name != "timing_s/eval"]
    kept = [row for row in rows if any(row.get(name) is not None for name in names)]
    if len(kept) < 2 or not names:
        return None
    curves = [points([{"step": row["step"], name: row.get(name) or 0.0} for row in kept], name) for name in names]
    figure, axes = _axes(rows)
    labels = [name.partition("/")[2] for name in names]
    axes.stackplot(curves[0][0], *(values for _, values in curves), labels=labels, colors=COLORS, alpha=0.85, linewidth=0)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return Chart("Where the time goes", "seconds a step", _image(figure))


def _axes(rows: Rows) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(4.4, 2.5))
    axes = figure.add_axes((0.11, 0.12, 0.86, 0.85))  # fixed: measuring texts costs more than all the drawing
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlim(0, max(row["step"] for row in rows))
    return figure, axes


def tick(value: float) -> str:
    """A tick's label, short enough for the margin: 21k, 0.02, 2e-5."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    text = f"{value:.1e}".replace(".0e", "e") if 0 < abs(value) < 1e-3 else f"{value:.6g}"
    return text.replace("e-0", "e-")


def _bound(axes: Any, values: Iterable[float], *, from_zero: bool) -> None:
    """Zero is shown when it is near: a curve that hovers at 5 % of its level should not look like a storm."""
    low, high = min(values := list(values)), max(values)
    if low >= 0 and high > 0 and (from_zero or low < 0.5 * high):
        axes.set_ylim(bottom=0, top=high * 1.12)
    elif low == high:
        pad = abs(low) * 0.1 or 1.0
        axes.set_ylim(low - (pad if low else 0.0), high + pad)


def _legend(axes: Any) -> None:
    axes.set_position((0.11, 0.12, 0.86, 0.74))  # room above for one line
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.02), ncols=4, frameon=False, borderpad=0, handlelength=1.1, columnspacing=1.2)


def _style() -> dict[str, Any]:
    return {
        "font.size": 9.5,
        "text.color": INK,
        "axes.edgecolor": "#c3c9d2",
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "legend.fontsize": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastalign",  # the same run gives the same file
    }


def _image(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # measured with DejaVu Sans, shown in the reader's own sans-serif, which is nicer and never wider
    svg = buffer.getvalue().replace("'DejaVu Sans'", "'Inter', 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans'")
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
