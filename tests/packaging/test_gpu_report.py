"""tools/gpu_report.py without a GPU: its control flow with steps made for it, its build, the command."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tools", "benchmarks"):
    sys.path.append(str(ROOT / folder))

import gpu_report  # noqa: E402
from gpu_steps import build, plan, report, runner  # noqa: E402

# ------------------------------------------------------------------------------------------------ control flow

FAKE_HEADER = """
import json, os, subprocess, time

class Bench:
    def __init__(self, device, record, state):
        self.record, self.state = record, state

def run(bench):
"""
FAKES = {
    "good": """
        bench.record.value("copy of 1 GB, read and written", 4e12, "B/s", "copy")
        times = dict(bytes=56.6e6, flops=0, note="")
        bench.record.row("time", case="adaln forward, Flux", contender="cuda", seconds=30e-6, **times)""",
    "wrong": """
        for backend, error in (("cuda", 7.5), ("triton", 0.5)):
            row = dict(operator="adaln", case="at Flux", contender=backend, ok=error <= 1, error=error, note="")
            bench.record.row("check", **row)""",
    "told": "bench.record.note(json.dumps(bench.state))",
    "raises": """
        raise RuntimeError("the kernel broke")""",
    "crashes": """
        bench.record.note("before the crash")
        os.kill(os.getpid(), 11)""",
    "missing": """bench.record.row("missing", text="ncu is not on PATH")""",
    "hangs": """
        child = subprocess.Popen(["sleep", "600"])
        bench.record.note(f"child {child.pid}")
        time.sleep(600)""",
}


@pytest.fixture(scope="module")
def fake_run(tmp_path_factory):
    """The outcomes of one run of all fake steps, and every report that was written on the way."""
    folder = tmp_path_factory.mktemp("fakes")
    for name, body in FAKES.items():
        code = FAKE_HEADER + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n"
        (folder / f"fake_{name}.py").write_text(code)
    steps = [plan.Step(name, f"Step {name}", f"fake_{name}", 1.0, timed=False) for name in FAKES]
    paths = os.pathsep.join((str(folder), str(ROOT / "tools")))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    written = []

    def write(outcomes):
        report.write(folder / "report.md", report.markdown(["- a machine"], outcomes, steps))
        written.append((folder / "report.md").read_text())

    # "hangs" is the last: whatever the machine does beside, the others have their time
    outcomes = runner.run_steps(steps, time.monotonic() + 300, folder, "cpu", environment, write, longest=20)
    return {outcome.step.name: outcome for outcome in outcomes}, written, steps


@pytest.fixture(scope="module", autouse=True)
def short_hang():
    """A hanging step is given a second, all others their whole share."""
    original = runner.Worker.run

    def run(self, limit, state):
        return original(self, 1.0 if self.step.name == "hangs" else limit, state)

    runner.Worker.run = run
    yield
    runner.Worker.run = original


def test_every_way_in_which_a_step_can_end(fake_run):
    outcomes, _, _ = fake_run
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == {
        "good": "passed", "wrong": "failed", "told": "passed", "raises": "failed", "crashes": "failed",
        "missing": "not run", "hangs": "cut short",
    }  # fmt: skip
    assert "the kernel broke" in "\n".join(outcomes["raises"].tail)
    assert "SIGSEGV" in outcomes["crashes"].reason and outcomes["crashes"].rows[0]["text"] == "before the crash"
    assert outcomes["missing"].reason == "ncu is not on PATH"
    child = int(outcomes["hangs"].rows[0]["text"].split()[1])  # written before it was cut short
    status = Path(f"/proc/{child}/stat")  # ended, if nobody has waited for it yet
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_later_steps_are_told_the_rates_and_what_is_wrong(fake_run):
    told = json.loads(fake_run[0]["told"].rows[0]["text"])
    assert told == {"rates": {"copy": 4e12}, "wrong": [["adaln", "cuda"]]}


def test_the_report_is_whole_after_every_step(fake_run):
    outcomes, written, steps = fake_run
    assert len(written) == len(steps)
    assert "Step hangs | not run yet" in written[0] and "Step good | passed" in written[0]
    last = written[-1]
    assert "| adaln forward, Flux | 30 (predicted 29) | 14.2 | cuda 47% |" in last  # 56.6 MB at 4 TB/s
    assert "| copy of 1 GB, read and written | 4 TB/s | 4.3 TB/s |" in last
    assert "| adaln | at Flux | cuda | 7.5 | **WRONG** |" in last and "| triton | 0.5 | right |" in last
    assert "Step crashes | **FAILED** in" in last and "Step missing | not run: ncu is not on PATH |" in last
    assert re.search(r"Step hangs \| \*\*cut short\*\*: after \d+ s", last)
    data = report.as_json(["- a machine"], list(outcomes.values()), steps)
    (row,) = [row for row in data["steps"][0]["rows"] if row["kind"] == "time"]
    assert row["predicted"] == (29e-6, 29e-6) and row["floor"] == pytest.approx(56.6e6 / 4e12)
    assert json.loads(json.dumps(data, allow_nan=False)) and data["not_run_yet"] == []


def test_without_time_nothing_begins_and_every_step_is_named(tmp_path):
    steps = list(plan.STEPS[:2])
    outcomes = runner.run_steps(steps, time.monotonic(), tmp_path, "cpu", dict(os.environ), lambda done: None)
    assert [(outcome.verdict, outcome.reason) for outcome in outcomes] == [("not run", "no time was left")] * 2


# ------------------------------------------------------------------------------------------------ clocks


def test_clocks_are_summed_up(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor i in 1 3 2; do echo ${i}00, 3201, [N/A], 4$i; done; exec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    clocks = gpu_report.Clocks()
    while len(clocks.lines) < 3:
        time.sleep(0.01)
    text = clocks.stop()
    assert "100 – 200 – 300 MHz SM, 3201 – 3201 – 3201 MHz memory, 41 – 42 – 43 °C" in text and " W" not in text


# ------------------------------------------------------------------------------------------------ building


def test_the_build_without_cmake_has_the_same_sources(tmp_path):
    units = list(build.units(tmp_path, 90, "13.0"))
    cmake = {name: (ROOT / name / "CMakeLists.txt").read_text() for name in ("", "kernels")}
    binding = set(re.findall(r"csrc/(\w+\.cpp)", cmake[""]))
    assert {u.source.name for u in units if u.source.parent.name == "csrc"} == binding
    device = set(re.findall(r"(\w+\.cu)\b", cmake["kernels"]))
    assert {u.source.name for u in units if u.source.suffix == ".cu"} == device
    operators = set(re.findall(r"^fastdiff_cpu_kernel\((\w+)", cmake["kernels"], re.MULTILINE))
    isas = {operator: build.isa_flags(cmake["kernels"], operator) for operator in operators}
    assert {u.source.name for u in units if u.source.parent == tmp_path} == {
        f"{operator}_cpu_{isa}.cpp" for operator in operators for isa in isas[operator]
    }
    common = set(re.findall(r"common/(\w+\.cpp)", cmake["kernels"]))
    assert {u.source.name for u in units if u.source.parent.name == "common"} == common
    assert len({u.object for u in units}) == len(units)
    if os.uname().machine == "x86_64":
        flags = isas["qgfd"]
        assert list(flags) == [*isas["adaln"], "amx_bf16"] == ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
        assert flags["avx512_bf16"][:3] == flags["avx2"] and flags["avx512_bf16"][-1] == "-mavx512bf16"
    commands = [" ".join(u.command("/cuda/bin/nvcc")) for u in units]
    assert all("arch=compute_90,code=sm_90" in c for c in commands if c.startswith("/cuda/bin/nvcc"))
    assert not any("pybind11" in c for c in commands)  # torch's include folder has its headers
    assert (build.torch_folder() / "include" / "pybind11" / "pybind11.h").is_file()


def test_a_source_of_both_builds_is_compiled_directly(tmp_path):
    unit = next(u for u in build.units(tmp_path, None) if u.source.name == "scale_shift_cpu_baseline.cpp")
    build._checked(unit.command(None))
    assert unit.object.stat().st_size > 0
    with pytest.raises(build.BuildError, match=r"g\+\+ ended with status"):
        build._checked(["g++", "-c", str(tmp_path / "nothing.cpp"), "-o", str(tmp_path / "nothing.o")])


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build.missing_tools() == ["cmake", "ninja or make", "Python.h (python3-dev)", "pybind11", "setuptools"]


# ------------------------------------------------------------------------------------------------ the command


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_report.py"), *arguments], capture_output=True, text=True
    )


def test_without_a_gpu_one_line_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: make gpu runs in full")
    done = command()
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1 and "NVIDIA GPU" in done.stderr


def test_unknown_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(["--only", "adaln,nothing"])
    assert "got nothing; expected some of constants, correctness" in capsys.readouterr().err


def dry_run(output: Path, *arguments: str) -> tuple[int, dict[str, str]]:
    """Exit status, and the verdict of every step of a run on the CPU."""
    done = command("--device", "cpu", "--output", str(output), *arguments)
    steps = json.loads(output.with_suffix(".json").read_text())["steps"]
    return done.returncode, {step["step"]: step["verdict"] for step in steps}


def test_every_real_step_cut_short_leaves_its_report(tmp_path):
    status, verdicts = dry_run(tmp_path / "report.md", "--step-seconds", "0.05")
    assert verdicts == {"build": "passed"} | {step.name: "cut short" for step in plan.STEPS} and status == 1
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {step.title} | **cut short**: after" in text for step in plan.STEPS)


def test_models_are_made_where_safetensors_is_not_installed():
    program = """
import sys
class Missing:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("safetensors", "huggingface_hub", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
from fastdiff.models import DiT
DiT.from_preset("DiT-S/2", depth=1, hidden_size=32, num_heads=2)
import fastdiff.nn.transformer"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.exhaustive
def test_dry_run(tmp_path):
    """All steps as on a GPU, with Triton's interpreter and torch.compile, each a process, within its minutes."""
    start = time.monotonic()
    status, verdicts = dry_run(tmp_path / "report.md", "--minutes", "10")
    assert time.monotonic() - start < 10 * 60
    assert status == 0 and set(verdicts.values()) <= {"passed", "not run"}, (tmp_path / "report.md").read_text()
