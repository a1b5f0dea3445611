"""`make abi-aarch64 [OTHER=torch==2.11.0]`: the operators' tests on aarch64, on a machine that is not.

The CPU module is cross-compiled against the headers of .venv's torch, and tests/ops run under qemu on another torch's
aarch64 wheel, with NumPy and pytest alone. So one run shows two things: the NEON kernels through every public function,
and one binary for several torch, as `make abi` does. Python comes from Debian's arm64 packages; nothing is installed on
the machine: all lies in build/abi_aarch64 (1 GB, of which 200 MB are downloaded), and what is there is taken again.

Needs Debian, and: apt-get install g++-aarch64-linux-gnu qemu-user-static. Not in CI: qemu runs torch 10 to 30 times
slower, so every test of tests/ops takes hours. --every 10 takes the first case of each test and one in ten of the
others. A whole run that passed is written into fastdiff/tested.json. Exit status: 0 all passed, 1 one did not, 2 this
machine cannot.

    python tools/abi_aarch64.py [torch==2.10.0] [tests/ops/test_adaln.py ...] [--every N] [--minutes M]
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import abi
import pybind11
import torch
from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
HOME = (ROOT / "build" / "abi_aarch64").resolve()
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64-static", "apt-get", "dpkg-deb", "cmake", "ninja")
DEBIAN = "g++-aarch64-linux-gnu qemu-user-static"
PACKAGES = ("python3", "libpython3-dev", "libgomp1", "libstdc++6")
# A CPU without SVE and bf16, as many servers' and Jetson's: torch takes its NEON paths, and qemu is quickest with them.
CPU = "neoverse-n1"
# Started as a program, it is an ordinary Python to all that call it: to CMake, to pip, to tests that start another.
_PYTHON = """#!/bin/sh
exec qemu-aarch64-static -cpu {cpu} -L {system} -0 "$0" {system}/usr/bin/{name} "$@"
"""
# For Inductor, which knows of no other machine than its own: this one's compiler for that one.
_COMPILER = """#!/bin/sh
for word; do shift; [ "$word" = -march=native ] || set -- "$@" "$word"; done
exec aarch64-linux-gnu-g++ -I{system}/usr/include/{name} "$@"
"""
_PLUGIN = """
import collections
import zlib
import pytest

def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1)

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    seen, kept, left = set(), [], []
    for item in items:  # by a hash: a stride would meet the same column of a grid again and again
        first = item.originalname not in seen
        seen.add(item.originalname)
        chosen = first or zlib.crc32(item.nodeid.encode()) % config.getoption("every") == 0
        (kept if chosen else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept

def pytest_terminal_summary(terminalreporter):
    counts = collections.defaultdict(collections.Counter)
    for kind in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(kind, ()):
            counts[report.nodeid.partition("::")[0]][kind] += 1
    terminalreporter.write_line("")
    for file, kinds in counts.items():
        terminalreporter.write_line(f"{file}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
"""


def run(*command: object, **options) -> None:
    """Runs a program that must succeed."""
    subprocess.run([str(word) for word in command], check=True, **options)


def debian(system: Path) -> None:
    """Debian's Python for arm64 with what it needs, unpacked into a folder."""
    state, part = HOME / "apt", system.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    for folder in (state / "lists" / "partial", state / "cache" / "archives" / "partial", part / "usr"):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()  # nothing counts as installed
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    run("apt-get", *options, "-qq", "update")
    run("apt-get", *options, "-qq", "-y", "--download-only", "install", *PACKAGES)
    for name in ("bin", "lib", "sbin"):  # packages of Debian 12 still have files in /lib
        (part / "usr" / name).mkdir()
        (part / name).symlink_to(f"usr/{name}")
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacked:
            run("tar", "-x", "--keep-directory-symlink", "-C", part, stdin=unpacked.stdout)
    # Debian's pyconfig.h asks which machine is meant and includes that one's by a path of the system's
    include = part / "usr" / "include"
    shutil.copy(next((include / "aarch64-linux-gnu").glob("python3.*/pyconfig.h")), next(include.glob("python3.*")))
    part.rename(system)


def environment(system: Path, name: str, folder: Path) -> None:
    """Makes a folder with packages in it a virtual environment of that Python."""
    (folder / "bin").mkdir()
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    for program, text in (("python", _PYTHON), ("g++", _COMPILER)):
        (folder / "bin" / program).write_text(text.format(cpu=CPU, system=system, name=name))
        (folder / "bin" / program).chmod(0o755)


def install(other: str, name: str, site: Path) -> None:
    """torch's aarch64 wheel, what it asks for, NumPy and pytest. By this machine's pip: under qemu it takes an hour."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-cache-dir", "--no-compile", "--only-binary=:all:"]
    pip += ["--target", str(site), "--python-version", name.removeprefix("python")]
    pip += [word for tag in ("2_28", "2_17") for word in ("--platform", f"manylinux_{tag}_aarch64")]
    run(*pip, "--no-deps", other)  # pip would ask what torch needs on x86-64: CUDA
    (about,) = site.glob("torch-*.dist-info/METADATA")
    lines = about.read_text().partition("\n\n")[0].splitlines()
    needed = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]
    there = {"platform_machine": "aarch64", "python_version": name.removeprefix("python"), "extra": ""}
    wanted = [f"{need.name}{need.specifier}" for need in needed if need.marker is None or need.marker.evaluate(there)]
    run(*pip, *wanted, "numpy", "pytest", "pytest-timeout")


def build(system: Path, name: str, folder: Path, site: Path) -> Path:
    """The CPU module for aarch64, built against the headers of this environment's torch; its file."""
    linked, modules = HOME / "torch_link", HOME / "build" / "modules"
    linked.mkdir(exist_ok=True)
    for part, target in (("include", Path(torch.__file__).with_name("include")), ("lib", site / "torch" / "lib")):
        (linked / part).unlink(missing_ok=True)
        (linked / part).symlink_to(target)
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": TOOLS[0],
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        "FASTDIFF_TORCH_DIR": linked,
        "FASTDIFF_TORCH_VERSION": torch.__version__,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": folder / "bin" / "python",
        "Python_INCLUDE_DIR": system / "usr" / "include" / name,
    }
    options = [f"-D{key}={value}" for key, value in settings.items()]
    run("cmake", "-S", ROOT, "-B", HOME / "build", "-G", "Ninja", *options)
    run("cmake", "--build", HOME / "build", "--parallel", os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    (module,) = modules.glob("_C.*.so")
    return module


def copy_package(site: Path, module: Path) -> None:
    """The package as it lies here, with the module for aarch64 in the place of this machine's."""
    target = site / "fastdiff"
    shutil.rmtree(target, ignore_errors=True)
    ignored = shutil.ignore_patterns("kernels", "__pycache__", "*.so")
    shutil.copytree(ROOT / "fastdiff", target, ignore=ignored)
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(module, target)
    (site / "fastdiff_aarch64.py").write_text(_PLUGIN)


def run_tests(python: Path, files: list[str], every: int, minutes: float) -> bool:
    """Whether the tests passed, all of those that were to run. One process: its start takes minutes."""
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "fastdiff_aarch64",
        "--timeout",
        7200,
        "--continue-on-collection-errors",
    ]
    process = subprocess.Popen(
        [str(word) for word in (*command, "--every", every, *files)],
        cwd=ROOT,
        env=abi.ENVIRONMENT | {"CXX": str(python.with_name("g++"))},
        stdin=subprocess.DEVNULL,
    )
    try:
        return process.wait(60 * minutes) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest says what it did until then
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(300)
    finally:
        process.kill()
    print(f"cut off after {minutes:g} minutes", file=sys.stderr)
    return False


def missing() -> list[str]:
    """What is not on this machine."""
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def prepare(other: str) -> Path:
    """The environment of a torch with the package as it lies here, made or brought up to date; its Python."""
    system, folder = HOME / "root", HOME / re.sub(r"\W+", "_", other)
    if not system.exists():
        debian(system)
    name = next((system / "usr" / "include").glob("python3.*")).name
    site = folder / "lib" / name / "site-packages"
    if not (folder / "bin" / "python").exists():
        shutil.rmtree(folder, ignore_errors=True)
        install(other, name, site)
        environment(system, name, folder)
    copy_package(site, build(system, name, folder, site))
    return folder / "bin" / "python"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("what", nargs="*", help="torch==VERSION (default: 2.10.0), files of tests (default: tests/ops)")
    parser.add_argument("--every", type=int, default=1, help="the first case of each test, and one in so many others")
    parser.add_argument("--minutes", type=float, default=600.0, help="time limit of the tests")
    options = parser.parse_args()
    if missing():
        print(f"cannot run: no {', no '.join(missing())}; run: apt-get install {DEBIAN}", file=sys.stderr)
        return 2
    (*_, other) = ("torch==2.10.0", *(word for word in options.what if word.startswith("torch==")))
    chosen = [word for word in options.what if not word.startswith("torch==")]
    files = chosen or sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "ops").glob("test_*.py"))
    python = prepare(other)
    about = abi.facts(python)
    print(f"torch {about['torch']} on aarch64 under qemu; built against {about['built']}", flush=True)
    passed = run_tests(python, files, options.every, options.minutes)
    if passed and not chosen and options.every == 1:
        abi.record(about["torch"], "aarch64")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
