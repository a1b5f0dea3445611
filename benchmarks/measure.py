"""How benchmarks are timed and reported: contenders in turns, medians, one table and one small JSON a file."""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

DEVICE = os.environ.get("FASTDIFF_BENCH_DEVICE", "cpu")
THREADS = int(os.environ.get("FASTDIFF_BENCH_THREADS", "2"))
RESULTS = Path(__file__).parent / "results"
# A call shorter than this is repeated until a sample takes about so long: what fits into the caches is then in them,
# for every contender.
SAMPLE_SECONDS = 10e-3
LESS_IS_BETTER = ("µs", "of the logits' memory", "of one L x L matrix")  # of all other units more is


@dataclass
class Row:
    """One line of a table: what was measured, against what, and what was aimed at."""

    case: str
    unit: str  # "µs", "images/s", "of copy", …
    values: dict[str, float]  # by contender; "fastdiff" is ours
    speedups: dict[str, float] = field(default_factory=dict)  # of fastdiff over a contender
    targets: dict[str, float] = field(default_factory=dict)  # what each speed-up, or "fastdiff" itself, should reach
    # shares of fastdiff's time, "products' share of the step": their matrix products alone; targets may name them
    shares: dict[str, float] = field(default_factory=dict)

    def met(self) -> bool | None:
        """Whether every target is reached; None where there is none."""
        if not self.targets:
            return None
        for name, target in self.targets.items():
            if name == "fastdiff":
                value = self.values[name]
                reached = value <= target if self.unit in LESS_IS_BETTER else value >= target
            elif name in self.shares:
                reached = self.shares[name] >= target
            else:
                reached = self.speedups[name] >= target
            if not reached:
                return False
        return True


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _sample(function: Callable[[], object], calls: int) -> float:
    """Seconds a call, over `calls` of them."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls


def in_turns(benchmark, contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call of each contender.

    A round calls each once (short ones several times), and another one goes first each time: whatever else the
    machine does meets all alike. `benchmark` is pytest-benchmark's fixture, which runs the rounds.
    """
    calls, times = {}, {name: [] for name in contenders}
    for name, function in contenders.items():
        _sample(function, 1)  # warms up: compiles, allocates
        shortest = _sample(function, 1)
        if shortest < 100 * SAMPLE_SECONDS:  # of longer calls nothing is repeated
            shortest = min(shortest, *(_sample(function, 1) for _ in range(2)))
        calls[name] = max(1, round(SAMPLE_SECONDS / max(shortest, 1e-7)))
    order = list(contenders)

    def one_round() -> None:
        for name in order:
            times[name].append(_sample(contenders[name], calls[name]))
        order.append(order.pop(0))

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that a call holds at once of what it allocates, results included: every allocation of torch's, replayed.

    Exact and the same at each run. What the libraries of matrix products allocate for themselves is not seen.
    """
    function()  # what is allocated once and kept is not the call's
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()  # kept: frees belong to the call only where it makes them
    del result
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def speed_row(case: str, seconds: dict[str, float], targets: dict[str, float]) -> Row:
    """A row in µs with the speed-ups of fastdiff over every other contender."""
    speedups = {name: value / seconds["fastdiff"] for name, value in seconds.items() if name != "fastdiff"}
    return Row(case, "µs", {name: value * 1e6 for name, value in seconds.items()}, speedups, targets)


def rate_row(case: str, seconds: dict[str, float], images: int, targets: dict[str, float]) -> Row:
    """The same in images/s."""
    row = speed_row(case, seconds, targets)
    return Row(case, "images/s", {name: images / value for name, value in seconds.items()}, row.speedups, targets)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def write_json(name: str, rows: list[Row], machine: dict) -> Path:
    """Writes benchmarks/results/<name>_<device>.json (in FASTDIFF_BENCH_RESULTS, if set)."""
    folder = Path(os.environ.get("FASTDIFF_BENCH_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{DEVICE}.json"
    table = []
    for row in rows:
        entry = asdict(row) | {"met": row.met()}
        table.append(entry | {key: _rounded(entry[key]) for key in ("values", "speedups", "targets", "shares")})
    path.write_text(json.dumps({"machine": machine, "rows": table}, indent=1, ensure_ascii=False) + "\n")
    return path


def table_lines(rows: list[Row]) -> list[str]:
    """The rows as aligned text."""
    lines = []
    width = max(len(row.case) for row in rows)
    for row in rows:
        values = "  ".join(f"{name} {value:10.4g}" for name, value in row.values.items())
        notes = []
        for name, speedup in row.speedups.items():
            target = f" (target {row.targets[name]:g})" if name in row.targets else ""
            notes.append(f"{speedup:.2f}x {name}{target}")
        for name, share in row.shares.items():
            target = f" (target {row.targets[name]:.0%})" if name in row.targets else ""
            notes.append(f"{name} {share:.0%}{target}")
        if "fastdiff" in row.targets:
            notes.append(f"(target {row.targets['fastdiff']:g})")
        verdict = {True: "ok", False: "SHORT", None: ""}[row.met()]
        lines.append(f"{row.case:{width}s}  {values} {row.unit:9s} {', '.join(notes)}  {verdict}".rstrip())
    return lines
