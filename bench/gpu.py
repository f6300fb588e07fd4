"""Everything that needs a GPU, in one command on a bare machine: native build, `gpu` tests, benches; one JSON file at the end.

    make gpu [PYTHON=python3] [WHEELS=folder]
    python -m bench.gpu [--wheels FOLDER] [--out FILE] [--budget_s 540] [--dry_run]

It uses the Python that runs it as it is: nothing is downloaded, no environment is made, torch is not touched. Needed there: torch with
CUDA, pybind11, cmake, ninja, pytest, nvcc (CUDACXX, on PATH, or in CUDA_HOME). Wheels of peers (liger-kernel, pytest-benchmark ...)
go to a folder beside the build with `pip install --no-index --no-deps --target`.

Each phase has a time limit, and what it has found so far is in the file whatever becomes of the next one. Exit status: 0 when all went
well, 1 when a phase failed or ran out of time (the file says which), 2 when nothing could be started.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
PEERS = WORK / "peers"
BUILD_S, TESTS_S = 240.0, 180.0  # at most; benches get what is left of the budget
SHARES = {"bench_decode": 5, "bench_linear_logp": 4, "bench_linear_kl": 2}  # torch.compile alone takes a quarter of a minute
OF_CPUS = {f"bench_{name}" for name in ("adapters", "backbone", "decode_floor", "gemm", "generation", "int8", "search")}
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "pytest-benchmark")
REQUIRED = {"torch": "torch", "pybind11": "pybind11", "pytest": "pytest"}  # module -> package


@dataclass(frozen=True)
class Outcome:
    """How a command ended: "ok", "failed" or "out of time"; its lines."""

    status: str
    seconds: float
    lines: list[str]

    def record(self, tail: int = 40) -> dict[str, Any]:
        return {"status": self.status, "seconds": round(self.seconds, 1), **({} if self.status == "ok" else {"tail": self.lines[-tail:]})}


def run(command: list[str], limit_s: float, log: Path, env: dict[str, str] | None = None, *, interrupt_s: float = 0.0) -> Outcome:
    """Runs a command in a process group of its own, that is killed as a whole when the limit has passed; its output goes to `log`.

    interrupt_s: at the limit it is interrupted (SIGINT) first and has so long to end by itself: pytest then writes its report.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    if interrupt_s and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; a child would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True)
        try:
            status = "ok" if process.wait(timeout=max(limit_s, 1.0)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            if interrupt_s:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=interrupt_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(lines[-60:]), flush=True)
    print(f"-- {status} after {time.monotonic() - began:.1f} s", flush=True)
    return Outcome(status, time.monotonic() - began, lines)


def nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, else on PATH, else in CUDA_HOME or where it is usually installed."""
    for candidate in (os.environ.get("CUDACXX"), "nvcc", f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def cmake_and_ninja() -> list[str]:
    """The cmake command and its generator options, from the Python packages of that name or from PATH."""
    cmake: list[str] = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
    if importlib.util.find_spec("ninja"):
        import ninja

        return [*cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
    return [*cmake, *(["-G", "Ninja"] if shutil.which("ninja") else [])]


def gpu_test_files() -> list[str]:
    """Test files that hold a test marked `gpu`; the others are not even imported."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py")) if "@pytest.mark.gpu" in path.read_text()]


def bench_files() -> list[Path]:
    """Those that measure a GPU where there is one."""
    return sorted(path for path in (ROOT / "bench").glob("bench_*.py") if path.stem not in OF_CPUS)


def shares(path: Path) -> int:
    """Of the time that is left; whole generators take longer than an op."""
    return SHARES.get(path.stem, 1)


def missing() -> list[str]:
    """What a run needs and this machine lacks."""
    lacking = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if importlib.util.find_spec("cmake") is None and not shutil.which("cmake"):
        lacking.append("cmake")
    return lacking + ([] if nvcc() else ["nvcc (set CUDACXX)"])


def device() -> tuple[str, str] | None:
    """Name and architecture ("90") of the first CUDA device that torch sees; None without one."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}{minor}"


def environment() -> dict[str, str]:
    """What the phases run under: the source tree, the peers, no network, Triton compiled."""
    paths = [str(ROOT), str(PEERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("TRITON_INTERPRET", None)
    return env


def build_commands(architecture: str) -> list[list[str]]:
    """CMake straight into the source tree, for this device alone: no setuptools, no pip."""
    cmake = cmake_and_ninja()
    options = {
        "Python_EXECUTABLE": sys.executable,
        "FASTALIGN_OUTPUT": str(ROOT / "fastalign"),
        "FASTALIGN_CUDA": "on",
        "FASTALIGN_CUDA_ARCHITECTURES": architecture,
        "CMAKE_CUDA_COMPILER": nvcc() or "nvcc",
    }
    folder = str(WORK / f"native-{sys.version_info.major}{sys.version_info.minor}-sm_{architecture}")
    configure = [*cmake, "-S", str(ROOT), "-B", folder, *(f"-D{name}={value}" for name, value in options.items()), "--log-level=WARNING"]
    launcher = cmake[:3] if cmake[0] == sys.executable else cmake[:1]
    return [configure, [*launcher, "--build", folder, "--parallel", str(os.cpu_count() or 1)]]


def test_command() -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        f"--junitxml={WORK / 'tests.xml'}",
        *gpu_test_files(),
    ]


def bench_command(path: Path, limit_s: float = 150.0) -> list[str]:
    """limit_s: of the whole command; no side of the decode bench begins in its last third."""
    text = path.read_text()
    takes_results = any(sign in text for sign in ("run_file(", '"--results"'))
    results = ["--results", str(WORK / f"{path.stem}.json")] if takes_results else []
    budget = ["--budget_s", f"{limit_s * 2 / 3:.0f}"] if '"--budget_s"' in text else []
    return [sys.executable, "-u", str(path), *budget, *results]


def wheel_command(wheels: Path) -> list[str]:
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    options = ["--no-index", "--no-deps", "--upgrade", "--quiet", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "install", *options, "--target", str(PEERS), *found]


def plan(options: argparse.Namespace, architecture: str) -> str:
    """Every command of a run with its time limit."""
    lines = [f"# at most {options.budget_s:.0f} s; results go to {options.out}"]
    if options.wheels:
        lines.append(shlex.join(wheel_command(options.wheels)))
    lines += [f"# build, at most {BUILD_S:.0f} s", *map(shlex.join, build_commands(architecture))]
    lines += [f"# gpu tests, at most {TESTS_S:.0f} s", shlex.join(test_command())]
    lines += ["# benches share what is left", *(shlex.join(bench_command(path)) for path in bench_files())]
    return "\n".join(lines)


class Campaign:
    """One run: what is left of the time, and the record, which is written after every step."""

    def __init__(self, out: Path, budget_s: float, name: str) -> None:
        from bench.harness import commit

        self.out, self.end, self.env = out, time.monotonic() + budget_s, environment()
        self.date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        self.record: dict[str, Any] = {"device": name, "date": self.date, "commit": commit(), "python": sys.version.split()[0]}
        self.record |= {"packages": versions(), "nvcc": nvcc_version(), "phases": {}, "tests": {}, "benches": {}}

    def left(self) -> float:
        return self.end - time.monotonic()

    def note(self, phase: str, outcome: Outcome) -> None:
        self.record["phases"][phase] = outcome.record()
        self.write()

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.out)

    def failed(self) -> list[str]:
        steps = {**self.record["phases"], **self.record["benches"]}
        return [name for name, step in steps.items() if step["status"] != "ok"]

    def wheels(self, folder: Path) -> None:
        self.note("wheels", run(wheel_command(folder), min(60.0, self.left()), WORK / "wheels.log", self.env))
        self.record["packages"] = versions()

    def build(self, architecture: str) -> None:
        for command in build_commands(architecture):
            outcome = run(command, min(BUILD_S, self.left()), WORK / "build.log", self.env)
            if outcome.status != "ok":
                break
        self.note("build", outcome)
        check = "from fastalign.ops.backend import load_native as l; print(l()[0].cuda_ops if l()[0] else l()[1])"
        self.record["cuda_ops"] = run([sys.executable, "-c", check], min(60.0, self.left()), WORK / "import.log", self.env).lines[-1:]

    def tests(self) -> None:
        (WORK / "tests.xml").unlink(missing_ok=True)
        outcome = run(test_command(), min(TESTS_S, self.left()), WORK / "tests.log", self.env, interrupt_s=15.0)
        self.record["tests"] = counts(WORK / "tests.xml")
        self.note("tests", outcome)

    def benches(self) -> None:
        files = bench_files()
        for number, path in enumerate(files):
            results = WORK / f"{path.stem}.json"
            results.unlink(missing_ok=True)
            limit = self.left() * shares(path) / sum(map(shares, files[number:]))
            outcome = run(bench_command(path, limit), limit, WORK / f"{path.stem}.log", self.env)
            rows = json.loads(results.read_text())["results"] if results.exists() else []
            self.record["benches"][path.stem] = {**outcome.record(), "results": rows, **({} if rows else {"lines": outcome.lines[-200:]})}
            self.write()


def counts(junit: Path) -> dict[str, Any]:
    """passed, failed and skipped tests, the failures by name, and why tests were skipped; {} without a report."""
    if not junit.exists():
        return {}
    cases = list(ElementTree.parse(junit).iter("testcase"))
    failures = [f"{c.get('classname')}::{c.get('name')}" for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skips = [skip.get("message", "") for c in cases for skip in c.findall("skipped")]
    return {
        "passed": len(cases) - len(failures) - len(skips),
        "failed": failures,
        "skipped": {why: skips.count(why) for why in sorted(set(skips))},
    }


def versions() -> dict[str, str]:
    """Installed versions of torch, Triton and the peers."""
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions(path=[str(PEERS), *sys.path])}
    return {name: found.get(name, "not installed") for name in PACKAGES}


def nvcc_version() -> str:
    compiler = nvcc()
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else ""
    return (re.findall(r"release ([\d.]+)", text) or ["not found"])[0]


def default_out(name: str) -> Path:
    """bench/results/gpu-<device>-<date>.json, as in gpu-h200-2026-11-20.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-") or "none"
    return ROOT / "bench" / "results" / f"gpu-{slug}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of peers, installed beside the build (default: $WHEELS)")
    parser.add_argument("--out", type=Path, help="default bench/results/gpu-<device>-<date>.json")
    parser.add_argument("--budget_s", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, and what is missing here")
    options = parser.parse_args(argv)
    if options.wheels is None and os.environ.get("WHEELS"):
        options.wheels = Path(os.environ["WHEELS"])
    if options.wheels and not list(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: expected a folder with .whl files, there are none in {options.wheels}")
    if options.budget_s < 30:
        parser.error(f"--budget_s: expected at least 30 seconds, got {options.budget_s:g}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    lacking, found = missing(), device()
    name, architecture = found or ("none", "90")
    options.out = options.out or default_out(name)
    if not found:
        lacking.append("a CUDA device that torch can use")
    if options.dry_run:
        print(plan(options, architecture))
    for what in lacking:
        print(f"make gpu: missing here: {what}", file=sys.stderr)
    if options.dry_run:
        return 0
    if lacking:
        return 2
    campaign = Campaign(options.out, options.budget_s, name)
    if options.wheels:
        campaign.wheels(options.wheels)
    campaign.build(architecture)
    campaign.tests()
    campaign.benches()
    campaign.write()
    print(f"wrote {options.out}" + (f"; not ok: {', '.join(campaign.failed())}" if campaign.failed() else ""))
    return 1 if campaign.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
