"""Settings of the benchmarks: threads, the machine in the JSON, one table at the end.

FASTDIFF_BENCH_DEVICE=cuda runs them on a GPU; FASTDIFF_BENCH_THREADS (2) sets the CPU threads;
FASTDIFF_BENCH_ALLOCATOR=default leaves the C library's settings alone, kept (the default) keeps freed memory.
"""

import datetime
import os
import platform
from pathlib import Path

import measure
import pytest
import torch

import fastdiff
from fastdiff.ops import _native
from fastdiff.training.setup import keep_freed_memory

_allocator: list[str] = []
_tables: dict[str, list[measure.Row]] = {}  # by benchmark file, in the order of the run


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_info() -> dict[str, object]:
    """What a reader needs to judge the numbers."""
    info = {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "isa": _native.cpu_module.isa() if _native.cpu_module else None,
        "threads": torch.get_num_threads(),
        "allocator": _allocator[0] if _allocator else None,
        "torch": torch.__version__,
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
    }
    if measure.DEVICE == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return info


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(measure.THREADS)
    allocator = os.environ.get("FASTDIFF_BENCH_ALLOCATOR", "kept")
    if allocator not in ("kept", "default"):
        raise pytest.UsageError(f"FASTDIFF_BENCH_ALLOCATOR is {allocator!r}; expected kept or default")
    if measure.DEVICE == "cpu":
        # as fastdiff's trainer does, for all contenders: else page faults of fresh outputs hide the arithmetic
        kept = allocator == "kept" and keep_freed_memory()
        _allocator.append("glibc, freed memory kept" if kept else "the C library's default")
    if measure.DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"FASTDIFF_BENCH_DEVICE is {measure.DEVICE!r}; expected cpu or cuda")
    if measure.DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("FASTDIFF_BENCH_DEVICE is 'cuda', but torch sees no GPU here; unset it")
    config.option.benchmark_quiet = True  # its own table would show whole rounds, all contenders together


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.update(globals()["machine_info"]())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture
def report(request: pytest.FixtureRequest):
    """report(row) puts a line into the table and the JSON of this benchmark file."""
    return _tables.setdefault(request.path.stem.removeprefix("test_"), []).append


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield


def pytest_terminal_summary(terminalreporter) -> None:
    machine = machine_info()
    for name, rows in _tables.items():
        if not rows:  # all failed
            continue
        path = measure.write_json(name, rows, machine)
        terminalreporter.section(f"{name}: medians; {machine['cpu']}, {machine['isa']}, {machine['threads']} threads")
        for line in measure.table_lines(rows):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"written to {path}")
