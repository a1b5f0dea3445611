"""Hardware counters of four kernels, by ncu, where this machine lets one read them.

`python -m gpu_steps.counters` is the program that ncu watches.
"""

import csv
import io
import shutil
import subprocess
import sys

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
    for kernel in KERNELS:
        command = [ncu, "--clock-control", "none", "--csv", "--page", "details", "--kernel-name", f"regex:{kernel}"]
        command += ["--launch-skip", "1", "--launch-count", "1"]
        for section in SECTIONS:
            command += ["--section", section]
        command += [sys.executable, "-m", "gpu_steps.counters", kernel, bench.on.name]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
        values = metrics(done.stdout)
        if not values:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip().startswith("==")]
            why = next((line for line in lines if "ERR" in line or "rror" in line), (lines or ["no output"])[-1])
            bench.record.note(f"{kernel}: ncu gave no counters: {why.strip('= ')[:200]}")
        for name, unit, value in values:
            bench.record.value(f"{kernel}: {name}", value, unit)


def metrics(output: str) -> list[tuple[str, str, float]]:
    """(metric, unit, value) of ncu's CSV, those that are of use here; what stands before its header is skipped."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue
        if row.get("Metric Name") in KEPT:
            found.append((row["Metric Name"], row.get("Metric Unit") or "", value))
    return found


def workload(kernel: str, device: str) -> None:
    """Two launches of the kernel at the shape that its prediction is of; the second is the one to be watched."""
    import torch

    from fastdiff import ops
    from fastdiff.backends import use_backend

    bench = Bench(device, Record(sys.stdout), {})
    small = bench.small
    with use_backend(bench.on.backends["cuda"]), torch.no_grad():
        if kernel == "adaln_forward_kernel":
            x = bench.randn(*((2, 8, 64) if small else (32, 256, 1152)))
            rows = [bench.randn(x.shape[0], x.shape[2], dtype=torch.float32) for _ in range(2)]
            call = lambda: ops.adaln(x, *rows)  # noqa: E731
        elif kernel == "pass_kernel":
            q, k, v = (bench.randn(*((1, 2, 70, 16) if small else (1, 16, 4096, 64))) for _ in range(3))
            call = lambda: ops.qgfd_attention(q, k, v)  # noqa: E731
        else:
            logits = bench.randn(*((2, 2100) if small else (1024, 126_464)), scale=8.0)
            top_p = 0.9 if kernel == "sample_threshold_kernel" else None
            call = lambda: ops.sample_tokens(logits, temperature=1.0, top_p=top_p, seed=7, invalid="flag")  # noqa: E731
        for _ in range(3):
            call()
        bench.on.synchronize()


if __name__ == "__main__":
    workload(*sys.argv[1:3])
