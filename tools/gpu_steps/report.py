"""The report: one Markdown file and one JSON of what was measured, each number beside the one that was predicted."""

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_steps.plan import Step
from gpu_steps.runner import CUT, FAILED, NOT_RUN, PASSED, Outcome, Row

PREDICTIONS = Path(__file__).with_name("predictions.json")
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def predictions() -> dict[str, Any]:
    return json.loads(PREDICTIONS.read_text())


def number(value: float, unit: str) -> str:
    """1.53e12 B/s as "1.53 TB/s"."""
    if unit not in ("s", "B/s", "FLOP/s") or value == 0 or not math.isfinite(value):
        return f"{value:.4g} {unit}".strip()
    size, prefix = next(((size, prefix) for size, prefix in _UNITS if abs(value) >= size), _UNITS[-1])
    return f"{value / size:.3g} {prefix}{unit}"


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def rates(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Bytes and FLOPs a second of this machine: measured, else those of the model."""
    found = dict(predictions()["rates"])
    for row in (row for outcome in outcomes for row in outcome.rows):
        if row["kind"] == "value" and row.get("rate"):
            found[row["rate"]] = row["value"]
    return found


def floor_of(row: Row, of_machine: dict[str, float]) -> float:
    """Seconds that the bytes and the products of a call take at least; 0 where neither was counted."""
    return max(row["bytes"] / of_machine["copy"], row["flops"] / of_machine["products"])


def predicted_seconds(case: str, contender: str) -> Sequence[float] | None:
    """What the model says of a case: (lowest, highest) seconds, or None."""
    found = predictions()["microseconds"].get(case, {}).get(contender)
    if found is None:
        return None
    low, high = found if isinstance(found, list) else (found, found)
    return low * 1e-6, high * 1e-6


# ------------------------------------------------------------------------------------------------ Markdown


def times_table(rows: Sequence[Row], of_machine: dict[str, float]) -> list[str]:
    """One line a case: µs of every contender, with what was predicted of it; the floor, and the best share of it."""
    cases, contenders = list(dict.fromkeys(r["case"] for r in rows)), list(dict.fromkeys(r["contender"] for r in rows))
    with_floor = any(row["bytes"] or row["flops"] for row in rows)
    header = ["µs a call", *contenders] + (["floor", "share of the floor's rate"] if with_floor else [])
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for case in cases:
        of_case = {row["contender"]: row for row in rows if row["case"] == case}
        cells = [case]
        for contender in contenders:
            row, guess = of_case.get(contender), predicted_seconds(case, contender)
            text = "–" if row is None else micro(row["seconds"])
            if guess is not None:
                low, high = (micro(seconds) for seconds in guess)
                text += f" (predicted {low if low == high else f'{low} to {high}'})"
            cells.append(text + ("*" if row is not None and row["note"] == "without a graph" else ""))
        if with_floor:
            floor = floor_of(next(iter(of_case.values())), of_machine)
            cells.append(micro(floor) if floor else "–")
            shares = [f"{c} {floor / of_case[c]['seconds']:.0%}" for c in contenders if c in of_case] if floor else []
            cells.append(", ".join(shares) or "–")
        lines.append("| " + " | ".join(cells) + " |")
    if any(row["note"] == "without a graph" for row in rows):
        lines += ["", "\\* timed without a CUDA graph: the host's gaps are in it."]
    return lines


def checks_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| operator | case | on | error, as a share of what is allowed | |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = ("right" if row["ok"] else "**WRONG**") + (f", {row['note']}" if row["note"] else "")
        lines.append(f"| {row['operator']} | {row['case']} | {row['contender']} | {row['error']:.3g} | {verdict} |")
    return lines


def values_table(rows: Sequence[Row]) -> list[str]:
    guesses = predictions()["values"]
    lines = ["| | measured | predicted |", "|---|---|---|"]
    for row in rows:
        guess = guesses.get(row["name"])
        guessed = "–" if guess is None else number(guess, row["unit"])
        lines.append(f"| {row['name']} | {number(row['value'], row['unit'])} | {guessed} |")
    return lines


def section(outcome: Outcome, of_machine: dict[str, float]) -> list[str]:
    """A step: its verdict, its tables, what it could not do, and the end of its output where it did not pass."""
    lines = [f"## {outcome.step.title}", "", verdict(outcome) + ".", ""]
    by_kind: dict[str, list[Row]] = {}
    for row in outcome.rows:
        by_kind.setdefault(row["kind"], []).append(row)
    for kind, table in (("value", values_table), ("check", checks_table)):
        if kind in by_kind:
            lines += [*table(by_kind[kind]), ""]
    if "time" in by_kind:
        lines += [*times_table(by_kind["time"], of_machine), ""]
    lines += [f"- **FAILED**: {r['case']}, {r['contender']}: {r['error']}" for r in by_kind.get("failed", ())]
    lines += [f"- {row['text']}" for row in by_kind.get("note", ())]
    if outcome.clocks:
        lines += [f"- {outcome.clocks}"]
    if outcome.tail:
        lines += ["", "The end of its output:", "", "```", *outcome.tail, "```"]
    return [*lines, ""]


def verdict(outcome: Outcome) -> str:
    words = {PASSED: "passed", FAILED: "**FAILED**", CUT: "**cut short**", NOT_RUN: "not run"}[outcome.verdict]
    took = f" in {outcome.seconds:.0f} s" if outcome.verdict in (PASSED, FAILED) else ""
    return f"{words}{took}" + (f": {outcome.reason}" if outcome.reason else "")


def markdown(
    machine: Sequence[str], outcomes: Sequence[Outcome], steps: Sequence[Step], remarks: Sequence[str] = ()
) -> str:
    """The whole report; steps without an outcome yet are named, too."""
    lines = ["# fastdiff on a GPU", "", time.strftime("%Y-%m-%d %H:%M"), "", *machine, ""]
    lines += [*(f"**{remark}**" for remark in remarks), ""] if remarks else []
    lines += [f"Predicted figures are a {predictions()['source']}.", "", "| step | result |", "|---|---|"]
    done = {outcome.step.name: outcome for outcome in outcomes}
    for step in steps:
        outcome = done.get(step.name)
        lines.append(f"| {step.title} | {'not run yet' if outcome is None else verdict(outcome)} |")
    lines.append("")
    of_machine = rates(outcomes)
    for outcome in outcomes:
        lines += section(outcome, of_machine)
    return "\n".join(lines)


def as_json(machine: Sequence[str], outcomes: Sequence[Outcome], steps: Sequence[Step]) -> dict[str, Any]:
    """The same as data: every row with what was predicted of it and its floor, in seconds."""
    of_machine, table = rates(outcomes), []
    for outcome in outcomes:
        rows = []
        for row in outcome.rows:
            if row["kind"] == "time":
                guess = predicted_seconds(row["case"], row["contender"])
                row = row | {"floor": floor_of(row, of_machine), "predicted": guess}
            rows.append(row)
        table.append({
            "step": outcome.step.name, "verdict": outcome.verdict, "reason": outcome.reason,
            "seconds": outcome.seconds, "clocks": outcome.clocks, "rows": rows,
        })  # fmt: skip
    run = {outcome.step.name for outcome in outcomes}
    return {"machine": list(machine), "rates": of_machine, "source": predictions()["source"], "steps": table,
            "not_run_yet": [step.name for step in steps if step.name not in run]}  # fmt: skip


def write(path: Path, text: str) -> None:
    """The whole file or nothing: what reads it meanwhile, or after a power cut, finds one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
