"""Hardware counters of four kernels, by ncu, where this machine lets one read them.

`python -m gpu_steps.counters DEVICE` is the program that ncu watches.
"""

import contextlib
import csv
import io
import shutil
import subprocess
import sys

import torch

from fastdiff import ops
from fastdiff.backends import use_backend
from gpu_steps.bench import Bench
from gpu_steps.record import Record

KERNELS = ("adaln_forward_kernel", "sample_blocks_kernel", "sample_threshold_kernel", "pass_kernel")
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")
KEPT = (
    "Duration", "Memory Throughput", "DRAM Throughput", "Compute (SM) Throughput", "SM Frequency",
    "Issued Warp Per Scheduler", "No Eligible", "One or More Eligible", "Warp Cycles Per Issued Instruction",
    "Achieved Occupancy", "Theoretical Occupancy", "Registers Per Thread", "Grid Size", "Waves Per SM",
)  # fmt: skip


def run(bench: Bench) -> None:
    ncu = shutil.which("ncu")
    if ncu is None:
        bench.record.row("missing", text="ncu is not on PATH (it comes with Nsight Compute)")
        return
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    command += ["--kernel-name", f"regex:{'|'.join(KERNELS)}"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, "-m", "gpu_steps.counters", bench.on.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout[-8000:], flush=True)
    found = metrics(done.stdout)
    for kernel in KERNELS:
        for name, unit, value in found.get(kernel, ()):
            bench.record.value(f"{kernel}: {name}", value, unit)
    if unread := [kernel for kernel in KERNELS if kernel not in found]:
        said = [line.strip("= ") for line in done.stdout.splitlines() if "ERR" in line or "rror" in line]
        bench.record.note(f"ncu gave no counters of {', '.join(unread)}: {(said or ['no error was named'])[0][:200]}")


def metrics(output: str) -> dict[str, list[tuple[str, str, float]]]:
    """(metric, unit, value) of the first launch of each kernel in ncu's CSV, which begins after other output."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, list[tuple[str, str, float]]] = {}
    launches: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        kernel = next((kernel for kernel in KERNELS if kernel in (row.get("Kernel Name") or "")), None)
        if kernel is None or row["ID"] != launches.setdefault(kernel, row["ID"]):
            continue
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue
        if row.get("Metric Name") in KEPT:
            found.setdefault(kernel, []).append((row["Metric Name"], row.get("Metric Unit") or "", value))
    return found


def workload(device: str) -> None:
    """The operators of the four kernels at the shapes of their predictions: twice, the second time to be watched."""
    bench = Bench(device, Record(sys.stdout), {})
    small = bench.small
    x = bench.randn(*((2, 8, 64) if small else (32, 256, 1152)))
    shift, scale = (bench.randn(x.shape[0], x.shape[2], dtype=torch.float32) for _ in range(2))
    q, k, v = (bench.randn(*((1, 2, 70, 16) if small else (1, 16, 4096, 64))) for _ in range(3))
    logits = bench.randn(*((2, 2100) if small else (1024, 126_464)), scale=8.0)

    def calls() -> None:
        ops.adaln(x, shift, scale)
        ops.qgfd_attention(q, k, v)
        ops.sample_tokens(logits, temperature=1.0, top_p=0.9, seed=7, invalid="flag")
        bench.on.synchronize()

    with use_backend(bench.on.backends["cuda"]), torch.no_grad():
        calls()
        with torch.cuda.profiler.profile() if bench.on.name == "cuda" else contextlib.nullcontext():
            calls()


if __name__ == "__main__":
    workload(sys.argv[1])
