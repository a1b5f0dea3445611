"""Runs steps one after another, each in a process of its own under its own time limit, and keeps what they wrote."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_steps.plan import Step

ENOUGH_SECONDS = 2.0  # with less time left a step is not begun
GRACE_SECONDS = 2.0  # between the friendly signal and the other one
TAIL_LINES = 25
PASSED, FAILED, CUT, NOT_RUN = "passed", "failed", "cut short", "not run"
Row = dict[str, Any]  # one line that a step wrote: see gpu_steps.record


@dataclass
class Outcome:
    """How a step went, and the rows that it wrote until then."""

    step: Step
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)  # of its output, where it did not pass
    clocks: str = ""


class Worker:
    """The process of one step. It imports torch at once and begins when it is told to, so that nobody waits for it."""

    def __init__(self, step: Step, folder: Path, device: str, environment: dict[str, str]) -> None:
        self.step, self.rows = step, folder / f"{step.name}.jsonl"
        self.rows.unlink(missing_ok=True)
        self.log = folder / f"{step.name}.log"
        command = [sys.executable, "-m", "gpu_steps.worker", step.module, "--rows", str(self.rows), "--device", device]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env=environment | dict(step.environment),
            )  # fmt: skip

    def run(self, limit: float, state: dict[str, Any]) -> Outcome:
        """Begins the step and waits for it, `limit` seconds at most."""
        start = time.monotonic()
        try:
            self.process.stdin.write(json.dumps(state) + "\n")
            self.process.stdin.close()
        except BrokenPipeError:  # it ended before it began: its exit status and its output say why
            pass
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        self.stop()  # what it started may still run
        seconds = time.monotonic() - start
        rows = read_rows(self.rows)
        if status is None:
            outcome = Outcome(self.step, CUT, f"after {seconds:.0f} s, its share of the time", seconds, rows)
        elif status < 0:
            outcome = Outcome(self.step, FAILED, f"ended by {signal.Signals(-status).name}", seconds, rows)
        elif status:
            outcome = Outcome(self.step, FAILED, f"ended with status {status}", seconds, rows)
        elif missing := [row["text"] for row in rows if row["kind"] == "missing"]:
            outcome = Outcome(self.step, NOT_RUN, "; ".join(missing), seconds, rows)
        elif wrong := sum(is_failure(row) for row in rows):
            outcome = Outcome(self.step, FAILED, f"{wrong} of its rows failed", seconds, rows)
        else:
            outcome = Outcome(self.step, PASSED, "", seconds, rows)
        if outcome.verdict in (FAILED, CUT):
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            outcome.tail = lines[-TAIL_LINES:]
        return outcome

    def stop(self) -> None:
        """Ends the process and all that it started."""
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                break  # nothing of it is left
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        self.process.poll()


def is_failure(row: Row) -> bool:
    return row["kind"] == "failed" or (row["kind"] == "check" and not row["ok"])


def read_rows(path: Path) -> list[Row]:
    """The rows that a step wrote; a line that its end cut in two is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def facts_for_later(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """What later steps are told: the machine's rates, and which operators are wrong on which backend."""
    state: dict[str, Any] = {"rates": {}, "wrong": []}
    for row in (row for outcome in outcomes for row in outcome.rows):
        if row["kind"] == "value" and row.get("rate"):
            state["rates"][row["rate"]] = row["value"]
        if row["kind"] == "check" and not row["ok"]:
            state["wrong"].append([row["operator"], row["contender"]])
    return state


def run_steps(
    steps: Iterable[Step],
    deadline: float,  # of time.monotonic()
    folder: Path,
    device: str,
    environment: dict[str, str],
    after_each: Callable[[list[Outcome]], None],
    clocks: Callable[[], Any] | None = None,
    longest: float = float("inf"),
) -> list[Outcome]:
    """Runs the steps and calls `after_each` with all outcomes so far after every one of them.

    A step may take its share of what is left: its weight over the weights of all that have not run; never more than
    `longest` seconds. `clocks` starts something that reads clocks and power; its `stop()` gives the summary.
    """
    steps, outcomes = list(steps), []
    workers: list[Worker] = []  # the one that runs, and the next, which imports meanwhile
    try:
        for index, step in enumerate(steps):
            for ahead in steps[len(workers) : index + 2]:
                workers.append(Worker(ahead, folder, device, environment))
            left = deadline - time.monotonic()
            limit = min(longest, left * step.weight / sum(other.weight for other in steps[index:]))
            if left < ENOUGH_SECONDS:
                outcomes.append(Outcome(step, NOT_RUN, "no time was left"))
            else:
                print(f"{step.title} ({limit:.0f} s at most) …", flush=True)
                watch = clocks() if clocks is not None and step.timed else None
                outcomes.append(workers[index].run(limit, facts_for_later(outcomes)))
                if watch is not None:
                    outcomes[-1].clocks = watch.stop()
            last = outcomes[-1]
            print(f"  {last.verdict} in {last.seconds:.0f} s {last.reason}".rstrip(), flush=True)
            after_each(outcomes)
    finally:
        for worker in workers:
            worker.stop()
    return outcomes
