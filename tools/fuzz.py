"""Every raw operator under AddressSanitizer and UBSan, with right and wrong operands: python tools/fuzz.py (make fuzz)

Builds the CPU module with the sanitizers in build/sanitized, and runs tests/ops/fuzz_schemas.py on it. Exit status: 0
no fault, 1 a fault (reported with the call that made it), 2 this machine cannot build the module.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "emulator"))

from build_emulator import SANITIZER_OPTIONS, TOOL_PATH, Unavailable, preloaded  # noqa: E402
from filelock import FileLock  # noqa: E402

FUZZER = ROOT / "tests" / "ops" / "fuzz_schemas.py"
FOLDER = ROOT / "build" / "sanitized"


def build() -> Path:
    """The module; raises Unavailable where tools are missing, RuntimeError with a compiler's words."""
    from torch.version import __version__ as torch_version

    try:
        import pybind11
    except ModuleNotFoundError:
        raise Unavailable("no pybind11: pip install pybind11") from None
    for name in ("g++", "cmake", "ninja"):
        if not shutil.which(name, path=TOOL_PATH):
            raise Unavailable(f"no {name}: apt-get install g++; pip install cmake ninja")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    options = {
        "CMAKE_CXX_COMPILER": "g++",
        "CMAKE_CXX_COMPILER_LAUNCHER": shutil.which("ccache") or "",
        "CMAKE_CXX_FLAGS": "",
        "CMAKE_HOME_DIRECTORY": str(ROOT),
        "FASTDIFF_CUDA": "OFF",
        "FASTDIFF_SANITIZE": "ON",
        "FASTDIFF_TORCH_DIR": str(torch_folder),
        "FASTDIFF_TORCH_VERSION": str(torch_version),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER.with_suffix(".lock")):
        settings = [f"-D{name}={value}" for name, value in options.items()]
        _run(["cmake", "--fresh", "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", *settings])
        _run(["cmake", "--build", str(FOLDER)])
    return FOLDER / "modules" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _run(command: list[str]) -> None:
    environment = {"CCACHE_BASEDIR": str(ROOT)} | os.environ | {"PATH": TOOL_PATH}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")


def fuzz(library: Path, calls: int, seed: int, isa: str) -> int:
    """Runs the fuzzer in a process of its own. Where that dies, the call is shown."""
    options = {"ASAN_OPTIONS": SANITIZER_OPTIONS["ASAN_OPTIONS"] + ":allocator_may_return_null=1"}
    environment = preloaded() | options | {"FASTDIFF_CPU_ISA": isa}
    place = FOLDER / f"call-{os.getpid()}"
    command = [sys.executable, str(FUZZER), str(library), "--seed", str(seed)]
    try:
        status = subprocess.run([*command, "--calls", str(calls), "--place", str(place)], env=environment).returncode
        if status:
            index = place.read_text().strip()
            print(f"FAILED with status {status} at call {index}:", flush=True)
            subprocess.run([*command, "--only", index], env=environment)
            print(f"{FUZZER.name} --seed {seed} --only {index} makes that call again", flush=True)
        return 1 if status else 0
    finally:
        place.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", default="", help="baseline or avx512; the best of this CPU without it")
    options = parser.parse_args()
    try:
        library = build()
    except Unavailable as reason:
        print(f"the operators cannot be fuzzed: {reason}", file=sys.stderr)
        return 2
    return fuzz(library, options.calls, options.seed, options.isa)


if __name__ == "__main__":
    sys.exit(main())
