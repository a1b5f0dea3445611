"""A short selection of the operators' own tests, on this device's backends, in the time that is left."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from gpu_steps.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
SELECTION = {
    "cuda": "(cuda or triton) and test_values and (f32-f32 or bf16-bf16) and not autocast",
    "cpu": "cpu-baseline and test_values and f32-f32 and scale_shift",
}


def run(bench: Bench) -> None:
    absent = [name for name in ("pytest",) if importlib.util.find_spec(name) is None]
    if absent:
        bench.record.row("missing", text=f"{', '.join(absent)} is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "20"]
    command += ["-m", "not exhaustive", "tests/ops/test_operators.py", "-k", SELECTION[bench.on.name]]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = ""
    for line in process.stdout:  # into the log as it comes: a run cut short shows how far it was
        print(line, end="", flush=True)
        last = line.strip("= \n") or last
    status = process.wait()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    bench.record.row(
        "check", operator="tests/ops/test_operators.py", case=last[:200], contender="pytest", error=float(status),
        ok=status == 0 and counts.get("passed", 0) > 0, note="",
    )  # fmt: skip
