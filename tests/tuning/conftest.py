"""A machine whose clock and cache belong to a test."""

import pytest

from fastdiff import tuning


class Clock:
    """A clock that moves by what is said to have been done."""

    def __init__(self):
        self.now, self.tick = 0.0, 0.0  # tick: what each look at it takes

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch, tmp_path) -> Clock:
    """Measuring is on, by this clock, with an empty cache."""
    monkeypatch.setenv("FASTDIFF_TUNE", "1")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    clock = Clock()
    monkeypatch.setattr(tuning, "clock", clock)
    return clock
