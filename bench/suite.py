"""Every bench in turn: tables on the terminal, and one JSON file with what was printed and where.

python -m bench.suite [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def benches() -> list[Path]:
    return sorted(HERE.glob("bench_*.py"))


def commit() -> str:
    """The short commit, with + behind it when the tree has changes; empty outside a checkout."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name + ("+" if changed else "")


def run(path: Path, quick: bool) -> list[str]:
    """Runs one bench in a process of its own, shows its lines as they come, and returns them."""
    command = [sys.executable, "-u", str(path), *(["--quick"] if quick else [])]
    print(f"\n== {path.stem}", flush=True)
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if process.returncode:
        raise SystemExit(f"{path.name} ended with status {process.returncode}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    parser.add_argument("--json", type=Path, help="write everything printed, with the device, date and commit, to this file")
    options = parser.parse_args()
    began = datetime.datetime.now(datetime.UTC)
    results = {path.stem: run(path, options.quick) for path in benches()}
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        record = {"device": device, "date": f"{began:%Y-%m-%d}", "commit": commit(), "torch": torch.__version__, "benches": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(options.json)


if __name__ == "__main__":
    main()
