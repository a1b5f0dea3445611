"""Builds the emulator's test library and the race check; by hand: python tests/emulator/build_emulator.py VARIANT"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RACE_COMPILERS = ("clang++-19", "clang++")
# cmake and ninja may be in a virtual environment that is not activated
TOOL_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


class Unavailable(RuntimeError):
    """This machine cannot build a variant; the message says what to install."""


def cuda_include() -> Path:
    """The folder of CUDA's headers: CUDA_HOME's, nvcc's, or the one that comes with the triton package."""
    candidates = [Path(os.environ[v]) / "include" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    if nvcc := shutil.which("nvcc"):
        dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        candidates += [Path(p) for p in re.findall(r'"?-I([^"\s]+)', dry_run.stderr)]
    for folder in map(Path, sys.path):
        candidates += [folder / "triton/backends/nvidia/include", *folder.glob("nvidia/cu*/include")]
    for candidate in candidates:
        if (candidate / "cuda_bf16.h").is_file() and (candidate / "vector_types.h").is_file():
            return candidate.resolve()
    raise Unavailable("no CUDA headers (cuda_bf16.h): install the CUDA toolkit, set CUDA_HOME, or pip install triton")


def race_compiler() -> str:
    """A clang++ that links with ThreadSanitizer, whose runtime knows fibers."""
    for name in RACE_COMPILERS:
        compiler = shutil.which(name)
        trial = [compiler, "-fsanitize=thread", "-x", "c++", "-", "-o", os.devnull]
        if compiler and not subprocess.run(trial, input="int main() {}", text=True, capture_output=True).returncode:
            return compiler
    raise Unavailable("no clang++-19 with ThreadSanitizer: apt-get install clang-19 libclang-rt-19-dev")


def _run(command: list[str], check: bool = True) -> int:
    environment = {"CCACHE_BASEDIR": str(ROOT)} | os.environ | {"PATH": TOOL_PATH}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    return done.returncode


def build(variant: str) -> Path:
    """Builds `plain` or `asan` (a shared library) or `race` (a program) where it is out of date; returns its path.

    Raises Unavailable where headers or compilers are missing, RuntimeError with the compiler's words where it fails.
    """
    if platform.machine() != "x86_64":
        raise Unavailable(f"the emulator switches stacks in x86-64 assembly; this is {platform.machine()}")
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool, path=TOOL_PATH):
            raise Unavailable(f"no {tool}: pip install cmake ninja")
    compiler = race_compiler() if variant == "race" else shutil.which("g++")
    if not compiler:
        raise Unavailable("no g++: apt-get install g++")
    folder = ROOT / "build" / "emulator" / variant
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # several processes of the test suite ask at once
        _build(variant, compiler, folder)
    return folder / ("emulator" if variant == "race" else "libemulator.so")


def _build(variant: str, compiler: str, folder: Path) -> None:
    configure = ["cmake", "-G", "Ninja", "-S", str(HERE), "-B", str(folder), f"-DVARIANT={variant}"]
    configure += [f"-DFASTDIFF_CUDA_INCLUDE={cuda_include()}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    # as in setup.py: flags of the environment stay out, and ccache goes first where it is installed
    configure += ["-DCMAKE_BUILD_TYPE=", "-DCMAKE_CXX_FLAGS="]
    configure += [f"-DCMAKE_CXX_COMPILER_LAUNCHER={shutil.which('ccache') or ''}"]
    if _run(configure, check=False):  # CMake forgets its settings where a folder was made with another compiler
        shutil.rmtree(folder, ignore_errors=True)
        _run(configure)
    _run(["cmake", "--build", str(folder)])


def race(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the race check: every launch function, or `fault NAME`. ThreadSanitizer's exit status for a race is 66."""
    options = "halt_on_error=0:report_signal_unsafe=0"
    # addr2line comes with every compiler; the symbolizer that Debian's clang asks for only with a further package
    if symbolizer := shutil.which("addr2line"):
        options += f":allow_addr2line=1:external_symbolizer_path={symbolizer}"
    environment = os.environ | {"TSAN_OPTIONS": options}
    return subprocess.run([build("race"), *arguments], capture_output=True, text=True, env=environment)


SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def preloaded() -> dict[str, str]:
    """The environment of a Python process whose libraries are built with the address and undefined sanitizers."""
    names = ("libasan.so", "libubsan.so")
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return os.environ | SANITIZER_OPTIONS | {"LD_PRELOAD": " ".join(paths)}


def sanitized_tests(file: str, chosen: list[str], library: Path) -> subprocess.CompletedProcess:
    """Runs the tests of a file that match one of the `-k` expressions, with the library of variant `asan`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    command += ["-k", " or ".join(f"({k})" for k in chosen)]
    environment = preloaded() | {"FASTDIFF_EMULATOR": str(library)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "plain"))
