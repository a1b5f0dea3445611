"""Tests, sanitizers and benchmarks on a machine with a GPU, in one report: python tools/gpu_report.py (make gpu)

Writes build/gpu_report.md. Exit status: 0 all passed, 1 something failed (the report says what), 2 there is no GPU.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")  # initcheck would report torch's own kernels too
SANITIZER_FAILURE = 86  # the exit status that compute-sanitizer is asked to give
TAIL_LINES = 40  # of a failing command, in the report


@dataclass(frozen=True)
class Step:
    """One command of the report. `missing`: why it was not run."""

    title: str
    status: int | None = None
    seconds: float = 0.0
    output: str = ""
    missing: str = ""

    @property
    def failed(self) -> bool:
        return self.status not in (None, 0)

    @property
    def verdict(self) -> str:
        if self.status is None:
            return f"not run: {self.missing}"
        return f"{'FAILED' if self.failed else 'passed'} in {self.seconds:.0f} s"


def run(title: str, command: list[str], **environment: str) -> Step:
    """Runs a command in the repository's root, its output kept."""
    print(f"{title}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    step = Step(title, done.returncode, time.monotonic() - start, done.stdout)
    print(f"  {step.verdict}", flush=True)
    return step


def sanitizer_workload() -> None:
    """What compute-sanitizer watches: both operators forward and backward, in each kind of kernel, at small sizes."""
    import torch

    from fastdiff import ops
    from fastdiff.backends import use_backend

    torch.manual_seed(0)
    for dim in (7, 64, 1152, 3072, 8200):  # scalar; many rows per block; registers, small and large; streamed
        for dtype in (torch.float32, torch.bfloat16):
            x, branch = (torch.randn(2, 6, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
            modulation = torch.randn(2, 3, 3 * dim, device="cuda", dtype=dtype, requires_grad=True)
            gate, shift, scale = modulation.chunk(3, dim=-1)
            weight, bias = (torch.randn(dim, device="cuda", requires_grad=True) for _ in range(2))
            with use_backend("cuda"):
                plain = ops.adaln(x, shift, scale, weight=weight, bias=bias, norm="rms")
                residual, out = ops.gated_residual_adaln(x, branch, gate, shift, scale, weight=weight, bias=bias)
                (plain.float().sum() + residual.float().sum() + out.float().square().sum()).backward()
    torch.cuda.synchronize()


def sanitizer_steps() -> list[Step]:
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return [Step("compute-sanitizer", missing="compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")]
    workload = [sys.executable, str(Path(__file__).resolve()), "--sanitizer-workload"]
    steps = []
    for name in SANITIZER_TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_FAILURE), *workload]
        # without torch's allocator cache, reads beyond one tensor do not land in another
        steps.append(run(f"compute-sanitizer {name}", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return steps


def benchmark_step(results: Path) -> Step:
    if not list(ROOT.glob("benchmarks/*.py")):
        return Step("benchmarks", missing="there are no files in benchmarks/")
    results.unlink(missing_ok=True)
    return run("benchmarks", [sys.executable, "-m", "pytest", "benchmarks", "-q", f"--benchmark-json={results}"])


def machine() -> list[str]:
    """What the numbers were measured on."""
    import torch

    lines = [f"- Python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda})"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = p.total_memory / 2**30
        lines.append(f"- cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {memory:.0f} GiB")
    for name in ("triton", "diffusers"):
        try:
            lines.append(f"- {name} {__import__(name).__version__}")
        except ImportError:
            lines.append(f"- {name}: not installed")
    if shutil.which("nvidia-smi"):
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout.strip()
        lines += ["", "```", smi, "```"]
    return lines


def benchmark_table(results: Path) -> list[str]:
    """Medians of pytest-benchmark's JSON, in microseconds."""
    if not results.is_file() or not results.stat().st_size:
        return ["No results."]
    entries = json.loads(results.read_text())["benchmarks"]
    lines = ["| benchmark | median, us | rounds |", "|---|---|---|"]
    for e in sorted(entries, key=lambda e: e["fullname"]):
        lines.append(f"| `{e['name']}` | {e['stats']['median'] * 1e6:.1f} | {e['stats']['rounds']} |")
    return lines


def report(steps: list[Step], machine_lines: list[str], benchmarks: list[str]) -> str:
    """The Markdown report: what ran on what, how it went, the numbers, and the end of everything that failed."""
    lines = ["# fastdiff on a GPU", "", time.strftime("%Y-%m-%d %H:%M"), "", *machine_lines, ""]
    lines += ["| step | result |", "|---|---|", *(f"| {s.title} | {s.verdict} |" for s in steps), ""]
    for step in steps:
        summary = [line for line in step.output.splitlines() if line.strip()]
        if step.failed:
            lines += [f"## {step.title}: FAILED", "", "```", *summary[-TAIL_LINES:], "```", ""]
        elif summary:
            lines += [f"- {step.title}: `{summary[-1].strip('= ')}`"]
    return "\n".join([*lines, "", "## Benchmarks", "", *benchmarks, ""])


def why_no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA GPU"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_report.md")
    parser.add_argument("--sanitizer-workload", action="store_true", help="only what compute-sanitizer is to watch")
    options = parser.parse_args(arguments)
    reason = why_no_gpu()
    if reason:
        print(f"make gpu needs a machine with an NVIDIA GPU: {reason}; nothing was run", file=sys.stderr)
        return 2
    if options.sanitizer_workload:
        sanitizer_workload()
        return 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = options.output.with_name("gpu_benchmarks.json")
    steps = [run("which backends run here", [sys.executable, "-m", "fastdiff.info"])]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not exhaustive"]
    # the harness has a row for each of cuda, triton and cpu; the names of the tests say which ran
    steps.append(run("operators on cuda, triton and cpu", [*pytest, "tests/ops"]))
    steps += sanitizer_steps()
    steps.append(benchmark_step(results))
    options.output.write_text(report(steps, machine(), benchmark_table(results)))
    print(f"wrote {options.output}")
    return 1 if any(step.failed for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
