"""Registers, spills and shared memory of every GPU kernel, from a compilation for sm_80 and sm_90; needs no GPU.

    python -m bench.resources [--arch 80 90] [--write]

Triton kernels: each entry of `variants()` in kernels/*.py, compiled ahead of time as the JIT would for arguments that are multiples of
16. CUDA kernels: csrc/cuda/*.cu where nvcc is found. Both are read with cuobjdump. `--write` leaves bench/results/resources.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.harness import commit  # noqa: E402

COLUMNS = ("kernel", "variant", "sm", "registers", "spill bytes", "shared bytes", "threads")
LISTED = re.compile(r"Function (?P<name>\S+?):\s*\n?\s*REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes; None: it could not be read. spill_bytes: the stack a thread has in local memory."""

    kernel: str
    variant: str
    arch: int
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    threads: int | None

    def cells(self) -> tuple[str, ...]:
        return tuple("-" if cell is None else str(cell) for cell in vars(self).values())


def triton_stems() -> list[str]:
    """Names of the kernels/*.py that list their variants."""
    return sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if "def variants(" in path.read_text(encoding="utf-8"))


def triton_usages(stem: str, archs: tuple[int, ...], at_most: int | None = None) -> Iterator[Usage]:
    """Compiles the variants of one file, or at most so many, spread over them; a variant that does not compile raises."""
    variants = importlib.import_module(f"fastalign.kernels.{stem}").variants()
    every = 1 if at_most is None else -(-len(variants) // at_most)
    for kernel, signature, constexprs, *rest in variants[::every]:
        options = rest[0] if rest else {}
        told = {**constexprs, **options}
        variant = ", ".join([signature[next(iter(signature))].lstrip("*"), *(f"{name}={value}" for name, value in told.items())])
        for arch in archs:
            compiled = compile_variant(kernel, signature, constexprs, options, arch)
            usage = Usage(
                f"{stem}.{kernel.__name__}", variant, arch, None, None, compiled.metadata.shared, 32 * compiled.metadata.num_warps
            )
            found = list(read_cubin(compiled.asm["cubin"]))
            yield replace(usage, registers=found[0][1], spill_bytes=found[0][2]) if found else usage


def compile_variant(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], options: dict[str, Any], arch: int) -> Any:
    """One variant for one architecture, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    known = [(["tt.divisibility", 16], at) for at, name in enumerate(types) if types[name][0] in "*i" and name not in general]
    source = ASTSource(kernel, types, constexprs, {(at,): [what] for what, at in known})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton brings."""
    beside = shutil.which("nvcc")
    spec = importlib.util.find_spec("triton")
    candidates = [shutil.which("cuobjdump"), beside and str(Path(beside).resolve().parent / "cuobjdump")]
    if spec and spec.origin:
        candidates.append(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def read_object(path: str) -> Iterator[tuple[str, int, int, int]]:
    """(mangled name, registers, spill bytes, static shared bytes) of the kernels in an object or cubin; nothing without cuobjdump."""
    tool = cuobjdump()
    if tool is None:
        return
    listing = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    for match in LISTED.finditer(listing):
        spilled = int(match["stack"]) + int(match["local"])
        yield match["name"], int(match["reg"]), spilled, int(match["shared"])


def read_cubin(cubin: bytes) -> list[tuple[str, int, int, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return list(read_object(file.name))


def cuda_usages(source: Path, archs: tuple[int, ...]) -> Iterator[Usage]:
    """Compiles one .cu an architecture; nothing without nvcc."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        return
    for arch in archs:
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "kernel.o")
            flags = ["-O3", "-std=c++20", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}"]
            subprocess.run([nvcc, *flags, "-c", str(source), "-o", target], check=True)
            for name, registers, spilled, shared in read_object(target):
                kernel, variant = readable(name)
                yield Usage(f"{source.stem}.{kernel}", variant, arch, registers, spilled, shared, None)


def readable(mangled: str) -> tuple[str, str]:
    """(kernel's name, its template arguments) of a mangled name; the name as it is where c++filt is missing."""
    tool = shutil.which("c++filt")
    name = mangled if tool is None else subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout.strip()
    match = re.search(r"(?:.*::)?(\w+)(?:<(.*?)>)?\((?!anonymous)", name.replace("(anonymous namespace)::", ""))
    return (match[1], match[2] or "") if match else (name, "")


def versions() -> str:
    found = []
    if importlib.util.find_spec("triton"):
        import triton

        found.append(f"triton {triton.__version__}")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc:
        release = re.search(r"release [\d.]+, (V[\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
        found.append(f"nvcc {release[1] if release else ''}".strip())
    return ", ".join(found)


def table(usages: list[Usage]) -> str:
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(usage.cells() for usage in usages)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--write", action="store_true", help="write bench/results/resources.md")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels do not compile
    archs, usages = tuple(arguments.arch), []
    if importlib.util.find_spec("triton"):
        usages += [usage for stem in triton_stems() for usage in triton_usages(stem, archs)]
    usages += [usage for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) for usage in cuda_usages(source, archs)]
    print(table(usages))
    if arguments.write:
        date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        head = f"# Resources of the GPU kernels\n\n`python -m bench.resources --write`, {date}, commit {commit()}, {versions()}.\n"
        note = "Compiled, not run: registers a thread, local memory a thread (spills and stack), static shared memory a CTA."
        (ROOT / "bench/results/resources.md").write_text(f"{head}{note}\n\n{table(usages)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
