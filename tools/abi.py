"""`make abi [OTHER="torch==2.11.0 …"]`: one binary for torch 2.10 to 2.14.

Runs the operators' tests on this checkout's modules, built against the torch of .venv, in a fresh environment of each
other torch. Nothing else is installed there but NumPy and pytest, so it also shows that the operators need no more.

Not in CI: PyPI's wheels bring CUDA. Each environment is a download of 2 to 3 GB and 5 to 7 GB on the disk, removed when
its tests have run (--keep leaves it); the tests take some ten minutes on two cores. What passed is written into
fastdiff/tested.json, which `fastdiff info` prints. Exit status: 0 all passed, 1 one did not.

    python tools/abi.py [torch==2.11.0 ...] [--keep] [-- arguments of pytest]
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = ROOT / "fastdiff" / "tested.json"
# The checkout is not to be imported, and what is not installed is skipped, as it is not in CI.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTHONPATH")}
ENVIRONMENT |= {"PYTHONSAFEPATH": "1"}
OTHERS = ("torch==2.10.0", "torch==2.11.0", "torch==2.14.1")
_ABOUT = """
import json, torch
from fastdiff.ops import _native
assert _native.cpu_missing is None, _native.cpu_missing
cuda = _native.cuda_module
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
                  "built": _native.cpu_module.build_info()["torch_at_build"],
                  "stream": cuda and cuda.finds_stream()}))
"""


def install(other: str, environment: Path) -> Path:
    """A fresh environment with the other torch, NumPy, pytest, and the package as it lies here; its Python."""
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--no-cache-dir", "--no-compile"]
    subprocess.run([*pip, other, "numpy", "pytest", "pytest-timeout"], check=True)
    site = subprocess.check_output([str(python), "-c", "import site; print(site.getsitepackages()[0])"], text=True)
    target = Path(site.strip()) / "fastdiff"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "fastdiff", target, ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return python


def run_tests(python: Path, arguments: list[str]) -> tuple[bool, str]:
    """Whether the operators' tests pass, and pytest's last line."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or ["tests/ops"])]
    lines, process = [""], subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    return process.wait() == 0, lines[-1].strip("= ")


def facts(python: Path) -> dict:
    """The torch of an environment and the one that its modules were built against; they must be two."""
    found = json.loads(subprocess.check_output([str(python), "-c", _ABOUT], text=True, env=ENVIRONMENT))
    if found["built"] == found["torch"]:
        raise SystemExit(f"torch: got {found['torch']}, which the modules were built against; expected another")
    return found


def gigabytes(folder: Path) -> float:
    """What a folder takes on the disk."""
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*") if not file.is_dir()) / 1e9


def check(other: str, keep: bool, arguments: list[str]) -> tuple[str, bool]:
    """The table's row of one torch, and whether its tests passed."""
    environment = ROOT / "build" / "abi" / re.sub(r"\W+", "_", other)
    print(f"{other}: installing into {environment}", flush=True)
    start = time.monotonic()
    python = install(other, environment)
    installed, size = time.monotonic() - start, gigabytes(environment)
    try:
        about = facts(python)
        passed, last = run_tests(python, arguments)
    finally:
        if not keep:
            shutil.rmtree(environment)
    stream = {None: "not built", True: "finds torch's stream", False: "finds no stream"}[about["stream"]]
    if passed and not arguments:
        record(about["torch"])
    wrong = about["cuda"] is not None and about["stream"] is False
    cells = (about["torch"], about["built"], last, stream, f"{installed:.0f} s, {size:.1f} GB")
    return f"| {' | '.join(cells)} |", passed and not wrong


def record(version: str, machine: str | None = None) -> None:
    """Adds a torch to those that were tested, on this machine or one of another name."""
    tested, machine = json.loads(TESTED.read_text()), machine or platform.machine()
    machines = tested["torch"].setdefault(version.partition("+")[0], [])
    if machine not in machines:
        machines.append(machine)
        tested["torch"] = dict(sorted(tested["torch"].items(), key=lambda pair: [*map(int, pair[0].split("."))]))
        TESTED.write_text(json.dumps(tested, indent=2) + "\n")


def main() -> int:
    argv = sys.argv[1:]
    mine, arguments = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("others", nargs="*", default=OTHERS, metavar="torch==VERSION")
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/abi")
    options = parser.parse_args(mine)
    rows = [check(other, options.keep, arguments) for other in options.others]
    print("\n| torch | built against | operators' tests | CUDA module | installed |\n|---|---|---|---|---|")
    print("\n".join(row for row, _ in rows))
    return 0 if all(passed for _, passed in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
