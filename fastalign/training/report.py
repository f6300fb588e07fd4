"""report.html: a run on one page that opens offline: results, curves, samples before and after, configuration."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .charts import Rows, draw
from .files import write_atomic

# summary keys worth a tile, in this order; a key with a "/before" twin shows both
_TILES = {
    "accuracy_base": "accuracy, untrained",
    "accuracy_sft": "accuracy after SFT",
    "accuracy_grpo": "accuracy after GRPO",
    "eval/reward": "held-out reward",
    "eval/loss": "held-out loss",
    "eval/mean_token_accuracy": "held-out token accuracy",
    "reward": "reward",
    "loss": "loss",
    "kl": "KL to the reference",
    "num_tokens": "tokens",
    "step_time": "seconds a step",
    "tokens_per_second": "tokens a second",
    "grpo_tokens_per_second": "tokens a second",
    "max_sampling_logp_difference": "sampler against trainer, nats",
    "peak_memory_mb": "peak memory, MiB",
}
_MAX_TILES = 8
_SAMPLE_TEXTS = ("prompt", "before", "after", "completion")
_PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy", "triton")


def write_report(
    output_dir: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    metrics: Rows | Mapping[str, Rows],
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]] = (),
    tables: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `output_dir/report.html` and returns its path.

    Args:
        title: the page's title.
        config: the resolved configuration.
        metrics: the rows of metrics.jsonl, or those of several stages by the stage's title.
        summary: what summary.json holds.
        samples: {"prompt", "before", "after"}, each a text; whatever else is in them is shown beneath.
        tables: {"title", "columns": [...], "rows": [[...]]}, shown first.
        environment: versions and devices; None: those of this process.

    Raises:
        OSError: the disk is full; an earlier report is untouched.
    """
    stages = metrics if isinstance(metrics, Mapping) else {"Curves": metrics}
    page = _template().render(
        title=title,
        subtitle=_subtitle(stages),
        tiles=_tiles(summary),
        tables=[{**table, "numeric": _numeric_columns(table)} for table in tables],
        stages=[{"title": name, "charts": draw(rows)} for name, rows in stages.items()],
        samples=[_sample(sample) for sample in samples],
        details=_details(summary, config, environment),
        version=__version__,
    )
    path = Path(output_dir) / "report.html"
    write_atomic(path, page)
    return path


def this_environment() -> dict[str, Any]:
    """Versions and machine, for the reader who wants to repeat the run."""
    import torch

    found: dict[str, Any] = {"fastalign": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found |= {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return found | {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def number(value: Any) -> str:
    """A number as a reader wants it: four significant digits, thousands apart; anything else as text."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _details(
    summary: Mapping[str, Any], config: Mapping[str, Any], environment: Mapping[str, Any] | None
) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        ("All final numbers", summary),
        ("Configuration", {name: _as_written(value) for name, value in config.items()}),
        ("Environment", this_environment() if environment is None else environment),
    ]


def _as_written(value: Any) -> str:
    """A configuration value as it would be given on the command line: a seed is no quantity to be rounded."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else "–" if value in (None, "") else str(value)


def _template() -> Any:
    import jinja2  # deferred: only a report needs it

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def _subtitle(stages: Mapping[str, Rows]) -> str:
    parts = []
    for name, rows in stages.items():
        steps = max((row["step"] for row in rows), default=0)
        parts.append(f"{steps:,} steps" if len(stages) == 1 else f"{name}: {steps:,} steps")
    return " · ".join(parts)


def _tiles(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    tiles = []
    for name, label in _TILES.items():
        if isinstance(summary.get(name), int | float):
            before = summary.get(f"{name}/before")
            tiles.append({"name": label, "value": _short(summary[name]), "before": "" if before is None else _short(before)})
    return tiles[:_MAX_TILES]


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _numeric_columns(table: Mapping[str, Any]) -> list[bool]:
    count = len(table["columns"])
    wrong = [row for row in table["rows"] if len(row) != count]
    if wrong:
        raise ValueError(f"report: table {table['title']!r} has {count} columns, got a row of {len(wrong[0])}: {wrong[0]}")
    columns = [[row[i] for row in table["rows"]] for i in range(count)]
    return [all(cell is None or isinstance(cell, int | float) for cell in column) for column in columns]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    sides = [(label, sample[key]) for key, label in (("before", "Before"), ("after", "After")) if key in sample]
    if not sides and "completion" in sample:
        sides = [("Completion", sample["completion"])]
    facts = [(name.replace("_", " "), value) for name, value in sample.items() if name not in _SAMPLE_TEXTS]
    return {"prompt": sample["prompt"], "sides": [{"label": label, "text": text} for label, text in sides], "facts": facts}
