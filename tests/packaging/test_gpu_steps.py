"""The steps of tools/gpu_report.py, each run here: on small shapes with the CPU in a GPU's place."""

import contextlib
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tools", "benchmarks"):
    sys.path.append(str(ROOT / folder))

from gpu_steps import bench as benches  # noqa: E402
from gpu_steps import counters, plan, report, runner, sanitizer  # noqa: E402
from gpu_steps.device import StandIn, device_named  # noqa: E402
from gpu_steps.record import Record  # noqa: E402

from fastdiff import backends  # noqa: E402


def record_rows(step: plan.Step, state: dict | None = None) -> list[dict]:
    """Runs a step in this process on the CPU, and gives its rows."""
    module, file = importlib.import_module(step.module), io.StringIO()
    module.run(module.Bench("cpu", Record(file), state or {}))
    return [json.loads(line) for line in file.getvalue().splitlines()]


IN_PROCESS = [step for step in plan.STEPS if step.name not in ("suite", "counters", "sanitizer")]


@pytest.mark.parametrize("step", IN_PROCESS, ids=lambda step: step.name)
def test_every_workload_runs(step, monkeypatch):
    if step.name in ("adaln", "dit", "decoding"):  # compiling takes seconds: test-all does it
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        monkeypatch.setattr(torch.compiler, "reset", lambda: None)
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    rows = record_rows(step)
    assert [row for row in rows if runner.is_failure(row)] == []
    assert {row["kind"] for row in rows} & {"time", "check", "value"}
    notes = [row["text"] for row in rows if row["kind"] == "note"]
    if step.name == "correctness":  # every operator is checked, or named
        unchecked = {text.partition(":")[0] for text in notes if "no case" in text}
        assert unchecked | {row["operator"] for row in rows if row["kind"] == "check"} == set(backends.table())
    assert all("cuDNN" in text or "memory" in text or "no case" in text for text in notes), notes


def test_an_operator_without_a_case_is_named(monkeypatch):
    from gpu_steps import correctness

    monkeypatch.setattr(correctness, "all_cases", lambda bench: [])
    monkeypatch.setitem(backends._registry, "a_new_one", {})
    notes = [row["text"] for row in record_rows(plan.STEPS[1])]
    assert "a_new_one: no case; nothing of it was checked here" in notes and len(notes) == len(backends.table())


def test_what_is_wrong_is_not_timed():
    rows = record_rows(next(s for s in plan.STEPS if s.name == "heads"), {"wrong": [["eos_log_prob", "cuda"]]})
    assert {(row["case"][:5], row["contender"]) for row in rows if row["kind"] == "time"} == {
        ("lm_he", "cuda"), ("lm_he", "F.linear alone"), ("eos_l", "F.linear alone")
    }  # fmt: skip
    assert ["computes wrong results" in row["text"] for row in rows if row["kind"] == "note"] == [True]


def test_a_broken_backend_is_a_failure_and_a_missing_contender_is_not():
    file = io.StringIO()
    bench = benches.Bench("cpu", Record(file), {})

    def broken():
        raise ValueError("no such kernel\nmore")

    bench.compare("adaln", "a case", {"cuda": broken, "torch.compile": broken})
    failed, note = (json.loads(line) for line in file.getvalue().splitlines())
    assert failed["kind"] == "failed" and failed["error"] == "ValueError: no such kernel"
    assert note["kind"] == "note" and "torch.compile did not run: no such kernel" in note["text"]


def checked(run, on=None) -> bool:
    """What the correctness step says of an operator that should copy x to out."""
    from gpu_steps import correctness
    from gpu_steps.cases import Case, norms

    file = io.StringIO()
    bench = benches.Bench("cpu", Record(file), {})
    bench.on = on or bench.on
    inputs = {"x": torch.ones(4, dtype=torch.float64), "out": torch.empty(4, dtype=torch.float64)}
    case = Case("adaln", "a case", lambda: inputs, run, lambda inputs: (inputs["x"],), norms(1, 1e-3))
    correctness.check(bench, case, "cuda")
    return json.loads(file.getvalue().splitlines()[-1])["ok"]


def test_wrong_results_are_found():
    assert checked(lambda inputs: (inputs["x"].clone(),))
    assert not checked(lambda inputs: (inputs["x"] * 1.01,))
    assert not checked(lambda inputs: (inputs["x"] * torch.nan,))


@pytest.mark.parametrize("replays", [True, False])
def test_a_graph_that_computes_nothing_is_found(replays):
    class Graphs(StandIn):
        """Where results have their place before a replay, which is then poisoned."""

        name = "cuda"

        def graph(self, functions, calls):
            functions[0]()  # the capture
            return functions[0] if replays else lambda: None

    on = Graphs()
    on.backends = {"cuda": "reference"}
    assert checked(lambda inputs: (inputs["out"].copy_(inputs["x"]),), on) is replays


class FakeGraph:
    """Stands for a CUDA graph: replays what was called between its begin and its end."""

    capturing: list = []

    def replay(self) -> None:
        FakeEvent.now += 5.0


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.now

    def elapsed_time(self, later) -> float:
        return later.time - self.time


def test_how_a_gpu_is_timed(monkeypatch):
    """The calls that `Cuda` makes of torch.cuda, with a clock of our own: a call takes 2 ms, a replay 5 ms."""

    @contextlib.contextmanager
    def capture(graph, stream):
        FakeGraph.capturing.append(graph)
        try:
            yield
        finally:
            FakeGraph.capturing.pop()

    fakes = {"Stream": object, "set_stream": lambda stream: None, "synchronize": lambda: None, "Event": FakeEvent,
             "CUDAGraph": FakeGraph, "graph": capture, "empty_cache": lambda: None,
             "max_memory_allocated": lambda: 3 << 30}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    captured = []

    def call(waits: bool = False) -> None:
        FakeEvent.now += 2.0
        if FakeGraph.capturing:
            captured.append(call)
            if waits:
                raise RuntimeError("operation not permitted when stream is capturing")

    on = device_named("cuda")
    assert on.seconds([call]) == (pytest.approx(1e-3), "") and len(captured) == 5  # 10 ms of calls in a graph
    assert on.seconds([call], capturable=False) == (pytest.approx(2e-3), "without a graph") and len(captured) == 5
    assert on.seconds([lambda: call(waits=True)]) == (pytest.approx(2e-3), "without a graph")
    assert on.sets(1e6) == 200 and on.sets(1e9) == 1 and on.memory() == 3
    queued, whole = on.wall(call, 3)
    assert 0 < queued <= whole
    on.forget()


def test_predictions_are_of_cases_that_exist(monkeypatch):
    """The real shapes' cases by name, with nothing computed: tensors have no memory."""
    names = set()

    class Names(benches.Bench):
        def __init__(self):
            super().__init__("cpu", None, {})
            self.small, self.on.backends = False, {"cuda": "cuda", "triton": "triton"}

        def randn(self, *shape, dtype=torch.bfloat16, scale=1.0):
            return torch.zeros((), dtype=dtype).expand(*shape)

        def ids(self, high, *shape):
            return torch.zeros((), dtype=torch.int64).expand(*shape)

        def compare(self, operator, case, contenders, **counts):
            names.update((case, contender) for contender in contenders)

        def by_the_clock(self, operators, case, contender, seconds, **options):
            names.add((case, contender))

    for name in ("adaln", "small", "qgfd", "heads", "loss", "host"):
        importlib.import_module(next(s.module for s in plan.STEPS if s.name == name)).run(Names())
    guessed = {(case, name) for case, row in report.predictions()["microseconds"].items() for name in row}
    assert len(guessed) > 60 and guessed - names == set()
    text = "".join((ROOT / "tools" / "gpu_steps" / f"{name}.py").read_text() for name in ("constants",))
    assert all(re.sub(r"[\d.]+ GB|8192", "", name)[:8] in text for name in report.predictions()["values"])


# ------------------------------------------------------------------------------------------------ tools of the machine


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


NCU = """==PROF== Connected to process 1
==PROF== Profiling "adaln_forward_kernel": 0%....100% - 8 passes
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","void adaln_forward_kernel<bf16, 8, 1>(P)","GPU Speed Of Light Throughput","DRAM Throughput","%","61.25"
"0","void adaln_forward_kernel<bf16, 8, 1>(P)","GPU Speed Of Light Throughput","Duration","us","1,031.5"
"0","void adaln_forward_kernel<bf16, 8, 1>(P)","Scheduler Statistics","","",""
"0","void adaln_forward_kernel<bf16, 8, 1>(P)","Launch Statistics","Function Cache Configuration","","CachePreferNone"
"1","void pass_kernel<bf16, 64>(P)","GPU Speed Of Light Throughput","Duration","us","457"
"2","void pass_kernel<bf16, 64>(P)","GPU Speed Of Light Throughput","Duration","us","999"
"""


def test_counters_are_read_or_said_to_be_refused(tmp_path, monkeypatch):
    of_adaln = [("DRAM Throughput", "%", 61.25), ("Duration", "us", 1031.5)]
    assert counters.metrics(NCU) == {"adaln_forward_kernel": of_adaln, "pass_kernel": [("Duration", "us", 457.0)]}
    program(tmp_path, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM: no permission'; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (row,) = record_rows(next(s for s in plan.STEPS if s.name == "counters"))
    assert "ERR_NVGPUCTRPERM" in row["text"] and "sample_threshold_kernel" in row["text"]


def test_what_ncu_and_the_sanitizer_watch_runs(capsys):
    counters.workload("cpu")
    sanitizer.workload("cpu")
    assert capsys.readouterr().out == "all operators ran\n"


@pytest.mark.parametrize("status, verdict", [(0, True), (86, False)])
def test_what_the_sanitizer_finds_is_a_failure(tmp_path, monkeypatch, status, verdict):
    lines = f"========= Invalid __global__ read in k\n========= ERROR SUMMARY: {status} errors"
    program(tmp_path, "compute-sanitizer", f"echo '{lines}'; exit {status}")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    rows = record_rows(next(s for s in plan.STEPS if s.name == "sanitizer"))
    checks = {row["case"]: row["ok"] for row in rows if row["kind"] == "check"}
    assert checks == {f"{tool}: ERROR SUMMARY: {status} errors": verdict for tool in sanitizer.TOOLS}
    said = [row["text"] for row in rows if row["kind"] == "note"]
    assert len(said) == (0 if verdict else 3) and all("Invalid __global__ read in k" in text for text in said)
