"""compute-sanitizer over every operator's CUDA kernels on small shapes: its tools side by side, each a process.

`python -m gpu_steps.sanitizer DEVICE` is the program that it watches. initcheck is left out: it would report torch's
own kernels, too.
"""

import os
import shutil
import subprocess
import sys

from gpu_steps.bench import Bench
from gpu_steps.record import Record

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86  # the exit status that compute-sanitizer is asked to give


def run(bench: Bench) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        bench.record.row("missing", text="compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
        return
    # without torch's allocator cache, reads beyond one tensor do not land in another
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for name in TOOLS:
        command = [
            sanitizer,
            "--tool",
            name,
            "--error-exitcode",
            str(FOUND),
            sys.executable,
            "-m",
            "gpu_steps.sanitizer",
        ]
        running[name] = subprocess.Popen(
            [*command, bench.on.name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for name, process in running.items():
        output = process.communicate()[0]
        print(f"{name}:\n{output[-6000:]}", flush=True)
        if "Device not supported" in output:
            bench.record.row(
                "missing", text=f"{name}: this machine's driver does not let it watch (Device not supported)"
            )
            continue
        lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
        summary = next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1] if lines else "no output")
        bench.record.row(
            "check", operator="every operator", case=f"{name}: {summary[:200]}", contender="sanitizer",
            ok=process.returncode == 0, error=float(process.returncode != 0), note="",
        )  # fmt: skip
        if process.returncode:  # whose kernels: ours, or those of torch's libraries
            found = dict.fromkeys(line for line in lines if " in " in line or line.startswith(("Error", "Warning")))
            bench.record.note(f"{name} says: {'; '.join(list(found)[:6])[:1500]}")


def workload(device: str) -> None:
    """Every case at its small shapes, and each kind of adaln kernel, on the CUDA backend; results are not looked at."""
    from fastdiff import ops
    from fastdiff.backends import use_backend
    from gpu_steps.cases import all_cases

    bench = Bench(device, Record(sys.stdout), {})
    bench.small = True
    with use_backend(bench.on.backends["cuda"]):
        for dim in (7, 1152, 3072, 8200):  # scalar; registers, small and large; streamed
            x, branch = (bench.randn(2, 6, dim).requires_grad_(True) for _ in range(2))
            gate, shift, scale = bench.randn(2, 3, 3 * dim).requires_grad_(True).chunk(3, dim=-1)
            residual, out = ops.gated_residual_adaln(x, branch, gate, shift, scale, norm="rms")
            (residual.float().sum() + out.float().square().sum()).backward()
        for case in all_cases(bench):
            case.run(case.make())
    bench.on.synchronize()
    print("all operators ran")


if __name__ == "__main__":
    workload(sys.argv[1])
