"""Every bench in one run: a table on the terminal, one JSON file with device, date and commit, and plots.

    python -m bench.suite [--quick] [--json FILE] [--plots FOLDER] [pytest arguments, e.g. bench/bench_scan.py or -k gae]

Each case runs its sides in turn with cold caches; see bench/README.md for what is compared and how it is kept fair.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def run(arguments: list[str], results: Path) -> int:
    """The benches under pytest with the options of bench/conftest.py; their lines go to `results`."""
    named = [a for a in arguments if a.startswith("bench/") or a.endswith(".py")]
    rest = [a for a in arguments if a not in named]
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), "--results", str(results), *rest]
    return subprocess.run([*command, *(named or [str(HERE)])], cwd=HERE.parent).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: 3 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep everything measured, with the device, date and commit")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNG plots here (default: beside the JSON file)")
    options, rest = parser.parse_known_args()
    missing = [word for word in rest if word.endswith(".py") and not (HERE.parent / word).exists()]
    if missing:
        parser.error(f"no such bench: {', '.join(missing)}; there are {', '.join(path.name for path in sorted(HERE.glob('bench_*.py')))}")
    with tempfile.TemporaryDirectory() as folder:
        results = options.json or Path(folder) / "results.json"
        before = results.stat().st_mtime if results.exists() else 0.0
        status = run([*(["--quick"] if options.quick else []), *rest], results)
        if results.exists() and results.stat().st_mtime > before:
            record = json.loads(results.read_text(encoding="utf-8"))
            plots = options.plots or (options.json.parent if options.json else None)
            if plots:
                from bench.plots import draw  # matplotlib only when something is drawn

                stem = options.json.stem if options.json else "suite"
                for path in draw(record, plots, stem):
                    print(f"plot: {path}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
