"""What a GPU makes of fastdiff, in minutes: python tools/gpu_report.py --minutes 8 (make gpu)

Builds both modules for the GPU's own architecture, then checks every operator against fp64, times them beside eager,
torch.compile and what was predicted, runs compute-sanitizer, whole models and the operators' tests. Each step is a
process of its own with its own share of the time; the report is written again after each, so that what was measured
stays, whatever happens. Needs nvcc, g++, torch with CUDA and Triton; nothing is installed or downloaded, and nothing
outside build/ is written.

Writes build/gpu_report.md and build/gpu_report.json. Exit status: 0 all passed, 1 something failed or was cut short
(the report says what), 2 there is no GPU. `--device cpu` is a dry run: every step on small shapes with the CPU in the
GPU's place, with the modules that are built already; its times mean nothing.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path.insert(0, str(TOOLS))

from gpu_steps import build, report  # noqa: E402
from gpu_steps.plan import BUILD_WEIGHT, STEPS, Step  # noqa: E402
from gpu_steps.runner import CUT, FAILED, NOT_RUN, PASSED, Outcome, run_steps  # noqa: E402

BUILD = Step("build", "Build", "", BUILD_WEIGHT, timed=False)
PACKAGES = ("numpy", "triton", "transformers", "safetensors", "pytest", "pybind11", "setuptools")

# Run in a process of its own: a CUDA context must not stay open in this one.
PROBE = """
import json, torch
p = torch.cuda.get_device_properties(0)
arch = 10 * p.major + p.minor
print(json.dumps({"arch": arch, "name": p.name, "sms": p.multi_processor_count, "memory": p.total_memory / 2**30,
                  "count": torch.cuda.device_count(), "l2": getattr(p, "L2_cache_size", 0) / 2**20}))
"""


def why_no_gpu() -> str | None:
    """One sentence, or None where there is a GPU."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    question = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if done.returncode:
        return f"torch does not import: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
    version, cuda, available = done.stdout.split()[-3:]
    if cuda == "None":
        return f"torch {version} is built without CUDA"
    return None if available == "True" else f"torch {version} finds no CUDA GPU"


def versions() -> list[str]:
    """What the numbers were measured with."""
    from importlib import metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    found = ", ".join(f"{name} {version(name)}" for name in ("torch", *PACKAGES))
    tools = ", ".join(
        f"{name} {'found' if shutil.which(name) else 'not found'}"
        for name in ("nvcc", "g++", "cmake", "ninja", "ncu", "compute-sanitizer", "nvidia-smi")
    )
    return [f"- Python {sys.version.split()[0]} on {os.cpu_count()} cores: {found}", f"- {tools}"]


def machine(device: str) -> tuple[list[str], int | None]:
    """Lines about this machine, and the GPU's architecture (90 of sm_90)."""
    if device == "cpu":
        return [
            "- **Dry run**: the CPU in place of a GPU, small shapes. No time here means anything.",
            *versions(),
        ], None
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the GPU does not answer: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    line = f"- {facts['count']} × {facts['name']}, sm_{facts['arch']}, {facts['sms']} SMs, {facts['memory']:.0f} GiB, "
    return [line + f"{facts['l2']:.0f} MiB of L2", *versions()], facts["arch"]


class Clocks:
    """Reads clocks, power and temperature with nvidia-smi, twice a second, until it is stopped."""

    QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    UNITS = ("MHz SM", "MHz memory", "W", "°C")

    def __init__(self) -> None:
        command = [
            "nvidia-smi",
            "-i",
            "0",
            f"--query-gpu={','.join(self.QUERY)}",
            "--format=csv,noheader,nounits",
            "-lms",
            "500",
        ]
        self.process, self.lines = None, []
        if shutil.which("nvidia-smi"):
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
            self.reader.start()

    def stop(self) -> str:
        """Lowest, middle and highest of each; empty where nothing was read."""
        if self.process is None:
            return ""
        self.process.terminate()
        self.process.wait()
        self.reader.join(2)
        columns: list[list[float]] = [[] for _ in self.QUERY]
        for line in self.lines:
            for column, text in zip(columns, line.split(","), strict=False):
                try:
                    column.append(float(text))
                except ValueError:  # [N/A]
                    continue
        parts = []
        for column, unit in zip((sorted(c) for c in columns), self.UNITS, strict=True):
            if column:
                parts.append(f"{column[0]:.0f} – {column[len(column) // 2]:.0f} – {column[-1]:.0f} {unit}")
        return f"nvidia-smi while it ran (lowest – middle – highest): {', '.join(parts)}" if parts else ""


def build_modules(folder: Path, device: str, arch: int | None, limit: float) -> Outcome:
    """The modules in folder/modules, built in a process with a time limit; in a dry run those that are there."""
    start, modules = time.monotonic(), folder / "modules"
    if device == "cpu":
        shutil.rmtree(modules, ignore_errors=True)
        modules.mkdir(parents=True)
        found = sorted((ROOT / "fastdiff").glob(f"_C*{build.SUFFIX}"))
        for module in found:
            (modules / module.name).symlink_to(module)
        if found:
            return Outcome(BUILD, PASSED, "a dry run takes the modules that are built already")
        return Outcome(BUILD, FAILED, "no module is built in fastdiff/: run make venv first")
    question = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r})\nfrom pathlib import Path\nfrom gpu_steps import build\n"
        f"try:\n    print(build.build(Path({str(folder)!r}), {arch}, {os.cpu_count() or 1}))\n"
        "except build.BuildError as error:\n    sys.exit(str(error))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", question], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return Outcome(BUILD, CUT, f"after {limit:.0f} s", limit)
    seconds, lines = time.monotonic() - start, [line for line in output.splitlines() if line.strip()]
    if process.returncode:
        return Outcome(BUILD, FAILED, "see the end of its output", seconds, tail=lines[-25:])
    return Outcome(BUILD, PASSED, lines[-1] if lines else "", seconds)


def environment_of(site: Path, device: str) -> dict[str, str]:
    """What the steps' processes run with: the assembled package first, and nothing of the current folder."""
    paths = [site, TOOLS, ROOT / "benchmarks", ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("FASTDIFF_BACKEND", None)
    return environment | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    names = ", ".join(step.name for step in STEPS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"Steps: {names}.")
    parser.add_argument("--minutes", type=float, default=8.0, help="all together, the build included (8)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_report.md", help="a .json lies beside it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--only", default="", metavar="STEPS", help="names of steps, with commas between them")
    parser.add_argument("--step-seconds", type=float, default=float("inf"), help="no step may take longer")
    options = parser.parse_args(arguments)
    wanted = [name for name in options.only.split(",") if name]
    unknown = [name for name in wanted if name not in {step.name for step in STEPS}]
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}; expected some of {names}")
    options.steps = [step for step in STEPS if not wanted or step.name in wanted]
    return options


def main(arguments: list[str] | None = None) -> int:
    start, options = time.monotonic(), options_of(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes of steps are ended, too
    reason = why_no_gpu() if options.device == "cuda" else None
    if reason:
        print(f"this needs a machine with an NVIDIA GPU: {reason}; nothing was run", file=sys.stderr)
        return 2
    deadline = start + 60 * options.minutes
    lines, arch = machine(options.device)
    steps = [BUILD, *options.steps]
    folder = ROOT / "build" / "gpu_report" if options.device == "cuda" else Path(tempfile.mkdtemp(prefix="gpu_report-"))

    def write(outcomes: list[Outcome]) -> None:
        report.write(options.output, report.markdown(lines, outcomes, steps))
        data = json.dumps(report.as_json(lines, outcomes, steps), indent=1, ensure_ascii=False) + "\n"
        report.write(options.output.with_suffix(".json"), data)

    try:
        limit = (
            (deadline - time.monotonic()) * BUILD.weight / (BUILD.weight + sum(s.weight for s in options.steps)) * 1.3
        )
        print(f"Build ({limit:.0f} s at most) …", flush=True)
        built = build_modules(folder, options.device, arch, limit)
        print(f"  {built.verdict} in {built.seconds:.0f} s {built.reason}".rstrip(), flush=True)
        write([built])
        outcomes = [built]
        if built.verdict == PASSED:
            environment = environment_of(build.assemble(folder, folder / "modules"), options.device)
            logs = folder / "steps"
            logs.mkdir(exist_ok=True)
            outcomes += run_steps(
                options.steps, deadline, logs, options.device, environment, lambda done: write([built, *done]),
                Clocks if options.device == "cuda" else None, options.step_seconds,
            )  # fmt: skip
        else:
            outcomes += [Outcome(step, NOT_RUN, "the modules were not built") for step in options.steps]
            write(outcomes)
    finally:
        if options.device == "cpu":
            shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {options.output} and {options.output.with_suffix('.json').name}")
    return 0 if all(outcome.verdict in (PASSED, NOT_RUN) for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
