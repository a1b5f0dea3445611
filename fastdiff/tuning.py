"""Choices that are measured, once per machine: which precision, attention, chunk or size is faster here.

A choice is a short comparison of contenders that compute the same up to rounding. It is made where a run is trained,
sampled or evaluated (`measuring`), and kept in the cache under CPU, cores, threads and the versions of torch and
fastdiff. A run writes down what it goes by, so that it goes by the same when it is resumed (`using`). Outside of both,
under torch.compile, and with FASTDIFF_TUNE=0 nothing is measured: each choice has a default, the same on every machine.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdiff.files import cache_folder, read_json, write_atomically
from fastdiff.version import __version__

Value = str | int
MARGIN = 0.03  # by so much of its time a contender has to beat the default
_CLEAR = 0.8  # and in so many of the turns
_STEADY = 1.5  # medians beyond so many times the least: something else runs, too
_WAITING = 0.1  # of the time that threads waited for a core: beyond it the machine is busy
_ROUNDS = (5, 15)  # of a comparison, at least and at most
clock: Callable[[], float] = time.perf_counter  # tests put another one here


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        chosen: the contender, or a size.
        seconds: the least time of each contender.
        choices: further choices that go with the chosen one.
        settled: whether it is worth keeping.
    """

    chosen: Value
    seconds: dict[str, float] = field(default_factory=dict)
    choices: dict[str, Value] = field(default_factory=dict)
    settled: bool = True


@dataclass
class _Scope:
    """Whose choices count in a block of code."""

    record: Mapping[str, Value] | None  # a run's; None: the machine's
    again: bool = False
    made: dict[str, Value] = field(default_factory=dict)


_scope: ContextVar[_Scope | None] = ContextVar("_scope", default=None)
_known: dict[Path, dict[str, dict[str, Any]]] = {}  # by the cache's file: what this process read and measured
_measuring = threading.RLock()  # one comparison at a time; it may ask for another


def enabled() -> bool:
    """Whether anything may be measured. Raises ValueError for a FASTDIFF_TUNE that is neither 0 nor 1."""
    value = os.environ.get("FASTDIFF_TUNE") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"FASTDIFF_TUNE: got {value!r}; expected 0 (defaults, nothing is measured) or 1")
    return value == "1"


def waited() -> float:
    """Seconds that threads of this process were ready to run and had no core, as Linux tells; 0 elsewhere."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that ended
            total += int(path.read_text().split()[1])
    return total / 1e9


@contextlib.contextmanager
def measuring(given: Mapping[str, Value] | None = None, *, again: bool = False) -> Iterator[dict[str, Value]]:
    """A block in which choices are the machine's: from the cache, or measured where they are asked for first.

    Args:
        given: choices that are made already.
        again: whether what the cache has is measured again; so it is in blocks within the block.

    Yields:
        The choices made in the block, as `using` takes them. Empty where nothing may be measured.
    """
    if not enabled():
        yield {}
        return
    around = _scope.get()
    scope = _Scope(None, again or (around is not None and around.again), dict(given or {}))
    token = _scope.set(scope)
    try:
        yield scope.made
    finally:
        _scope.reset(token)


@contextlib.contextmanager
def using(record: Mapping[str, Value] | None) -> Iterator[None]:
    """A block in which choices are those of a run's record, and defaults where it has none. None is `measuring`."""
    if record is None:
        with measuring():
            yield
        return
    token = _scope.set(_Scope(record))
    try:
        yield
    finally:
        _scope.reset(token)


def record() -> Mapping[str, Value]:
    """The record of the run under way (`using`); empty where there is none."""
    scope = _scope.get()
    return {} if scope is None or scope.record is None else scope.record


def choices() -> dict[str, Value]:
    """The choices made so far in the block under way, and those that it was given."""
    scope = _scope.get()
    return {} if scope is None else dict(scope.made)


def made(key: str, allowed: tuple[str, ...]) -> Value | None:
    """A choice that the run under way has in its record, or that was given to `measuring`; None where there is none."""
    scope = _scope.get()
    values = {} if scope is None else scope.made if scope.record is None else scope.record
    return _checked(key, values[key], allowed) if key in values else None


def may_measure() -> bool:
    """Whether choices are the machine's here (`measuring`)."""
    scope = _scope.get()
    return scope is not None and scope.record is None


def decide(
    key: str, default: Value, measure: Callable[[], Measured], allowed: tuple[Value, ...] | None = None
) -> Value:
    """A choice.

    Args:
        key: names it, with all that it depends on beside the machine.
        default: what counts where nothing may be measured.
        measure: the comparison; called at most once a machine.
        allowed: the values that it may have; None is any whole number, at least 0.

    Raises:
        ValueError: a run's record has a value that is not allowed; one line.
    """
    scope = _scope.get()
    if scope is None:
        return default
    if key not in scope.made:
        if scope.record is not None:
            scope.made[key] = _checked(key, scope.record.get(key, default), allowed)
        else:
            scope.made[key] = answer(key, default, measure, allowed).chosen
    return scope.made[key]


def _checked(key: str, value: Value, allowed: tuple[Value, ...] | None) -> Value:
    if not _fits(value, allowed):
        expected = "a whole number" if allowed is None else f"one of {', '.join(map(str, allowed))}"
        raise ValueError(f"training.choices: got {value!r} for {key!r}; expected {expected}")
    return value


def _fits(value: Any, allowed: tuple[Value, ...] | None) -> bool:
    if allowed is None:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value in allowed


def answer(
    key: str, default: Value, measure: Callable[[], Measured], allowed: tuple[Value, ...] | None = None
) -> Measured:
    """What the cache says, or else the comparison: arguments as of `decide`. The default where nothing may be measured.

    Torch's random numbers are as if nothing had been measured.
    """
    if not enabled():
        return Measured(default)
    scope = _scope.get()
    with _measuring:
        found = None if scope is not None and scope.again else _entry(key, allowed)
        if found is None:
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
                with torch.autocast("cpu", enabled=False):
                    found = measure()
            if found.settled:
                found = _store(key, default, found, allowed, again=scope is not None and scope.again)
            else:
                print(f"the machine is too busy to measure {key}: {found.chosen} for now", file=sys.stderr)
    return found


def fastest(
    contenders: Mapping[str, Callable[[], object]], default: str, *, seconds: float = 0.3, margin: float = MARGIN
) -> Measured:
    """Runs contenders in turns and takes the fastest by its least time; the default unless it is clearly slower.

    That is by the margin, and in four of five turns: other work on the machine shall not decide. Where these two do not
    agree, times of one contender differ by more than half, or threads waited for a core, the machine is busy: the
    default is taken for now, and nothing is kept (`Measured.settled`). `seconds` is about how long it takes.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    begun, waited_before = clock(), waited()
    for run in contenders.values():  # the first call of each plans and takes memory
        run()
    for index in range(_ROUNDS[1]):
        if index >= _ROUNDS[0] and clock() - begun > seconds:
            break
        for name, run in contenders.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    least = {name: min(each) for name, each in times.items()}
    best = min(least, key=least.__getitem__)
    busy = waited() - waited_before > _WAITING * (clock() - begun)
    if busy or any(statistics.median(each) > _STEADY * least[name] for name, each in times.items()):
        return Measured(default, least, settled=False)
    if best == default or least[best] >= (1 - margin) * least[default]:
        return Measured(default, least)
    won = sum(one < other for one, other in zip(times[best], times[default], strict=True))
    settled = won >= _CLEAR * len(times[best])
    return Measured(best if settled else default, least, settled=settled)


# ------------------------------------------------------------------------------------------------ the cache
@functools.lru_cache(1)
def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a kernel that does not tell
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What choices hold for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastdiff": __version__,
    }


def cache_file() -> Path:
    """Where the choices of this machine are kept: a JSON file a machine, number of threads and version."""
    digest = hashlib.sha256(json.dumps(machine()).encode()).hexdigest()[:16]
    return cache_folder() / "tuning" / f"{digest}.json"


def entries() -> dict[str, dict[str, Any]]:
    """What is known of this machine: by key, {"chosen", "default", "seconds", "choices", "made"}."""
    path = cache_file()
    if path not in _known:
        _known[path] = _read(path)
    return _known[path]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file; none where it is not there, or damaged: it is then written anew."""
    try:
        content = read_json(path)["choices"].items()
        return {key: entry for key, entry in content if _measured(entry) is not None}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def _plausible(value: Any) -> bool:
    """A choice is a word or a size, and no machine has sizes of more than 63 bits."""
    return isinstance(value, str) or (type(value) is int and 0 <= value < 2**63)


def _measured(entry: Any) -> Measured | None:
    """An entry of the file as what was found; None for anything else."""
    try:
        seconds = {str(name): float(value) for name, value in entry["seconds"].items()}
        choices = dict(entry["choices"])
        values = (entry["chosen"], *choices.values())
        fine = all(map(_plausible, values)) and isinstance(entry["made"], str)
        fine = fine and choices.get("mixed_precision", "no") in ("bf16", "no")
        fine = fine and all(0 <= value < math.inf for value in seconds.values())
        return Measured(entry["chosen"], seconds, choices) if fine else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _entry(key: str, allowed: tuple[Value, ...] | None) -> Measured | None:
    entry = entries().get(key)
    found = None if entry is None else _measured(entry)
    return found if found is not None and _fits(found.chosen, allowed) else None


def _store(key: str, default: Value, found: Measured, allowed: tuple[Value, ...] | None, again: bool) -> Measured:
    """Keeps what was found; what another process kept meanwhile goes first, so that all go by the same."""
    from filelock import FileLock

    path = cache_file()
    entry = {
        "chosen": found.chosen, "default": default, "seconds": found.seconds, "choices": found.choices,
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            kept = _read(path)
            other = None if again or key not in kept else _measured(kept[key])
            if other is not None and _fits(other.chosen, allowed):
                entries()[key] = kept[key]
                return other
            write_atomically(path, json.dumps({"machine": machine(), "choices": kept | {key: entry}}, indent=1) + "\n")
    except OSError as error:
        _say_once(f"the cache {path.parent} cannot be written ({error.strerror or error})")
    entries()[key] = entry
    return found


@functools.lru_cache
def _say_once(what: str) -> None:
    advice = "what was measured is forgotten with this process; set FASTDIFF_CACHE to a folder that can be written"
    print(f"{what}; {advice}", file=sys.stderr)


def forget(kept: Collection[str]) -> None:
    """Removes what was measured on this machine but for these keys. Raises OSError where it cannot be written."""
    left = {key: entry for key, entry in entries().items() if key in kept}
    cache_file().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cache_file(), json.dumps({"machine": machine(), "choices": left}, indent=1) + "\n")
    _known.pop(cache_file(), None)


def table() -> list[str]:
    """What was measured on this machine, as lines of text: choice, what was chosen, when, and the times of each."""
    about = machine()
    where = f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}"
    if not enabled():
        return ["choices: the defaults of every machine (FASTDIFF_TUNE=0)"]
    lines = [f"choices measured on {where}, fastdiff {about['fastdiff']} ({cache_file()}):"]
    for key, entry in sorted(entries().items()):
        found = _measured(entry)
        others = [value for name, value in found.seconds.items() if name != found.chosen]
        mine = found.seconds.get(str(found.chosen))
        by = f", {min(others) / mine:.2f} x" if mine and others else ""
        default = "the default" if found.chosen == entry.get("default") else f"default {entry.get('default')}"
        times = "; ".join(f"{name} {1000 * value:.3g} ms" for name, value in found.seconds.items())
        lines += [f"  {key}: {found.chosen} ({default}{by}; {entry['made']})", f"    {times or 'nothing to compare'}"]
    return lines if len(lines) > 1 else [f"{lines[0][:-1]}: none yet"]


# ------------------------------------------------------------------------------------------------ native kernels
@functools.lru_cache(1)
def last_cache_bytes() -> int | None:
    """The size of the largest cache that a core sees, as Linux tells it; None where it does not."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes, default=None)


def apply_sizes(native: Any) -> None:
    """Gives the kernels the sizes that fit this machine: those measured, or else by its caches.

    They never change what is computed (kernels/common/tuning.h). `native` is the module fastdiff._C, which has its own
    defaults: nothing is set with FASTDIFF_TUNE=0.
    """
    if not enabled():
        return
    cache = last_cache_bytes()
    derived = {} if cache is None else {"stream_bytes": cache // 4 * 5}
    for name in native.tuning():
        found = _entry(name, None)
        native.set_tuning(name, derived.get(name, 0) if found is None else found.chosen)
