"""Builds the native core with CMake and Ninja, and lists the packages. Everything else is in pyproject.toml.

Environment:
    FASTALIGN_NATIVE=off   leave the native core out; =later: the same without a notice, for a caller who builds it next
    FASTALIGN_CUDA=off|on  never / always build the CUDA kernels (default: when a working nvcc is found)
    FASTALIGN_WERROR=on    warnings are errors
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NOTICE = """
fastalign: {reason}: installing without the native core.
fastalign: every op then runs on its plain torch reference, which is correct and slower; `fastalign env` shows it.
fastalign: for the native core install a C++20 compiler (g++ >= 11 or clang++ >= 14) and run `make build`, or install again.
"""


def missing_compiler() -> str:
    """Why no C++20 compiler can be used; empty when one works."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for compiler in candidates:
        words = compiler.split()
        if not shutil.which(words[0]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <string>\nstatic_assert(__cplusplus > 201703L);\nstd::string probe() { return {}; }\n")
            command = [*words, "-std=c++20", "-fPIC", "-c", str(source), "-o", str(source.with_suffix(".o"))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0 and source.with_suffix(".o").exists():
                return ""
    return f"no working C++20 compiler (tried {', '.join(candidates)})"


def cmake_command() -> str:
    """The cmake of the build environment, else the one on PATH."""
    try:
        import cmake

        return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        return shutil.which("cmake") or "cmake"


def ninja_command() -> str | None:
    """The ninja of the build environment, else the one on PATH; None leaves CMake its default."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja")


class CMakeBuild(build_ext):
    """Runs CMake and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("FASTALIGN_NATIVE") == "later":
            return
        reason = "FASTALIGN_NATIVE=off" if os.environ.get("FASTALIGN_NATIVE") == "off" else missing_compiler()
        if reason:
            # Straight to stderr: a warning would be lost between pip's own lines.
            print(NOTICE.format(reason=reason), file=sys.stderr, flush=True)
            return
        cuda = os.environ.get("FASTALIGN_CUDA", "auto")
        try:
            self.run_cmake(ext, cuda)
        except subprocess.CalledProcessError:
            if cuda != "auto":
                raise
            print("fastalign: the build with CUDA kernels failed; building the CPU kernels alone.", file=sys.stderr, flush=True)
            self.run_cmake(ext, "off")

    def run_cmake(self, ext: Extension, cuda: str) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(self.build_temp).resolve() / f"native-{cuda}"
        folder.mkdir(parents=True, exist_ok=True)
        cmake = cmake_command()
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTALIGN_OUTPUT={output}",
            f"-DFASTALIGN_CUDA={cuda}",
            f"-DFASTALIGN_WERROR={os.environ.get('FASTALIGN_WERROR', 'off')}",
            "--log-level=WARNING",
        ]
        ninja = ninja_command()
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *options], check=True)
        subprocess.run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)


setup(
    # kernels/ has no __init__.py (see kernels/README.md), so it is named here.
    packages=[*find_packages(include=["fastalign", "fastalign.*"]), "fastalign.kernels"],
    package_data={"fastalign.training": ["*.html"]},
    ext_modules=[Extension("fastalign._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
