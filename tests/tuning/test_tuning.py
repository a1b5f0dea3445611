"""Choices: how contenders are compared, what is kept where, and who has the last word."""

import itertools
import json
import os
import random

import pytest
import torch

from fastdiff import tuning
from fastdiff.tuning import Measured, decide, fastest, measuring, using


def contenders(clock, **seconds):
    return {name: lambda each=each: clock.work(each) for name, each in seconds.items()}


def test_the_fastest_is_chosen_and_told_by_how_much(clock):
    found = fastest(contenders(clock, a=2.0, b=1.0, c=3.0), "a")
    assert found.chosen == "b" and found.seconds == pytest.approx({"a": 2.0, "b": 1.0, "c": 3.0})


@pytest.mark.parametrize(("other", "chosen"), [(0.98, "default"), (0.96, "other"), (1.02, "default")])
def test_a_default_is_left_for_a_clear_gain_alone(clock, other, chosen):
    assert fastest(contenders(clock, default=1.0, other=other), "default").chosen == chosen


def test_a_busy_machine_does_not_flip_a_choice(clock):
    noise = random.Random(0)

    def disturbed(seconds):  # two calls of three are held up, by up to ten times as long
        return lambda: clock.work(seconds * (1 if noise.random() < 0.33 else 1 + 10 * noise.random()))

    for _ in range(200):
        assert fastest({"slow": disturbed(2.0), "quick": disturbed(1.0)}, "quick", seconds=1000.0).chosen == "quick"


def test_nothing_is_decided_while_threads_wait_for_a_core(clock, monkeypatch):
    monkeypatch.setattr(tuning, "waited", lambda: 0.2 * clock.now)
    found = fastest(contenders(clock, slow=2.0, quick=1.0), "slow")
    assert found.chosen == "slow" and not found.settled
    monkeypatch.setattr(tuning, "waited", lambda: 0.01 * clock.now)
    assert fastest(contenders(clock, slow=2.0, quick=1.0), "slow").settled


def test_what_is_not_clear_is_not_kept(clock):
    first, calls = iter([1.0, 1.0, *[3.0] * 20]), []

    def sometimes():  # faster once, as if the other had been held up
        clock.work(next(first))

    def measure():
        calls.append(1)
        return fastest({"default": lambda: clock.work(2.0), "other": sometimes}, "default")

    with measuring():
        assert decide("it", "default", measure, ("default", "other")) == "default"
    assert not tuning.cache_file().exists()
    first = itertools.repeat(1.0)
    with measuring():
        assert decide("it", "default", measure, ("default", "other")) == "other"
    assert len(calls) == 2 and tuning.entries()["it"]["chosen"] == "other"


def test_contenders_take_turns_until_the_time_is_over(clock):
    calls = []
    trials = {name: lambda name=name: (calls.append(name), clock.work(1.0)) for name in "ab"}
    fastest(trials, "a", seconds=10.0)
    assert calls == list("ab" * 6)  # once to warm up, and five rounds in the time that is left


def measured(clock, calls, value=7):
    def measure():
        calls.append(1)
        torch.rand(3)
        return Measured(value, {"it": 1.0})

    return measure


def test_outside_of_a_run_nothing_is_measured(clock):
    calls = []
    assert decide("size", 5, measured(clock, calls)) == 5 and not calls


def test_a_choice_is_measured_once_a_machine(clock):
    calls = []
    for _ in range(3):
        with measuring() as made:
            assert decide("size", 5, measured(clock, calls)) == 7
            assert decide("size", 5, measured(clock, calls)) == 7
        assert made == {"size": 7}
    assert len(calls) == 1
    kept = json.loads(tuning.cache_file().read_text())
    assert kept["choices"]["size"]["chosen"] == 7 and kept["machine"]["torch"] == torch.__version__
    with measuring(again=True):
        assert decide("size", 5, measured(clock, calls, 8)) == 8
    assert len(calls) == 2 and tuning.entries()["size"]["chosen"] == 8


def in_a_child(action):
    """What a process of its own, forked from this one, answers (an int)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(action()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as answer:
        return int(answer.read())


def test_other_processes_find_what_one_has_measured(clock):
    def found(value):
        with measuring():
            return decide("size", 5, measured(clock, [], value))

    assert in_a_child(lambda: found(7)) == 7
    assert in_a_child(lambda: found(9)) == 7  # not measured again
    assert found(11) == 7


def test_of_two_that_measure_at_once_the_first_to_write_counts(clock):
    def meanwhile():
        in_a_child(lambda: decide_with(7))
        return Measured(9)

    def decide_with(value):
        with measuring():
            return decide("size", 5, lambda: Measured(value))

    with measuring():
        assert decide("size", 5, meanwhile) == 7


def test_another_number_of_threads_is_another_machine(clock):
    threads, before = torch.get_num_threads(), tuning.cache_file()
    try:
        torch.set_num_threads(threads + 1)
        assert tuning.cache_file() != before
    finally:
        torch.set_num_threads(threads)
    assert tuning.cache_file() == before


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"choices": 3}', '{"choices": {"size": 7}}', '{"choices": {"size": {"chosen": "bf8"}}}',
     '{"choices": {"size": {"chosen": "bf8", "seconds": {}, "choices": {}, "made": "now"}}}'],
)  # fmt: skip
def test_a_damaged_file_is_renewed(clock, content):
    path = tuning.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with measuring():
        assert decide("size", 5, measured(clock, [])) == 7
    assert json.loads(path.read_text())["choices"]["size"]["chosen"] == 7


def test_a_home_that_cannot_be_written_costs_a_line(clock, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "file" / "cache"))
    calls = []
    for key in ("one", "two", "one"):
        with measuring():
            assert decide(key, 5, measured(clock, calls)) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line and "set FASTDIFF_CACHE" in line and len(calls) == 2


def test_random_numbers_are_as_if_nothing_was_measured(clock):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with measuring(), torch.inference_mode():
        decide("size", 5, measured(clock, []))
    assert torch.equal(torch.rand(4), expected)


def test_a_comparison_runs_as_if_it_were_alone(clock):
    seen = {}

    def measure():
        seen.update(
            grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(),
            autocast=torch.is_autocast_enabled("cpu"),
        )  # fmt: skip
        return Measured(1)

    with measuring(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        decide("size", 5, measure)
    assert seen == {"grad": True, "inference": False, "autocast": False}


def test_a_record_wins_and_what_it_lacks_is_a_default(clock, monkeypatch):
    calls = []
    for value in ("1", "0"):
        monkeypatch.setenv("FASTDIFF_TUNE", value)
        with using({"size": 3}):
            assert decide("size", 5, measured(clock, calls)) == 3
            assert decide("other", 5, measured(clock, calls)) == 5
    assert not calls


@pytest.mark.parametrize("value", ["7", -1, True, 1.5, None])
def test_a_record_that_does_not_fit_is_refused(clock, value):
    with (
        using({"size": value}),
        pytest.raises(ValueError, match="training.choices: got .* for 'size'; expected a whole"),
    ):
        decide("size", 5, lambda: Measured(1))


def test_nothing_is_measured_where_it_is_turned_off(clock, monkeypatch):
    monkeypatch.setenv("FASTDIFF_TUNE", "0")
    calls = []
    with measuring() as made:
        assert decide("size", 5, measured(clock, calls)) == 5
    assert not calls and not made and not tuning.cache_file().exists()
    assert tuning.table() == ["choices: the defaults of every machine (FASTDIFF_TUNE=0)"]
    monkeypatch.setenv("FASTDIFF_TUNE", "maybe")
    with pytest.raises(ValueError, match="FASTDIFF_TUNE: got 'maybe'; expected 0"), measuring():
        pass


def test_the_table_shows_choice_times_and_date(clock):
    with measuring():
        decide("precision", "bf16", lambda: fastest(contenders(clock, bf16=3.0, no=1.0), "bf16"), ("bf16", "no"))
    head, choice, times = tuning.table()
    assert str(tuning.cache_file()) in head and torch.__version__ in head
    assert choice.startswith("  precision: no (default bf16, 3.00 x; 2") and times == "    bf16 3e+03 ms; no 1e+03 ms"


@pytest.mark.parametrize(
    "damage",
    [
        {"chosen": 10**30}, {"chosen": True}, {"chosen": -5}, {"seconds": {"a": float("nan")}},
        {"choices": {"mixed_precision": "fp99"}}, {"choices": {"loss chunk": -3}}, {"made": 3},
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_measured_again(clock, damage):
    with measuring():
        assert decide("rows", 1, lambda: Measured(2, {"1": 0.5, "2": 0.0}), None) == 2
    path = tuning.cache_file()
    content = json.loads(path.read_text())
    content["choices"]["rows"] |= damage
    path.write_text(json.dumps(content))
    tuning._known.clear()
    assert any("none yet" in line for line in tuning.table())
    with measuring():
        assert decide("rows", 1, lambda: Measured(3, {"1": 0.5, "3": 0.0}), None) == 3
    assert any("rows: 3" in line for line in tuning.table())
