"""Damaged files, and small ones that ask for much, given to every reader: a share of `make fuzz-files`."""

import time

import pytest
from damaged_files import kinds, run


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_every_reader_gives_a_value_or_a_line(cache, tmp_path):
    started = time.perf_counter()
    tally = run(480, 2, tmp_path)
    assert not tally.failures, "\n".join(tally.failures)
    assert time.perf_counter() - started < 120
    for name, kind in kinds(tmp_path).items():  # whole files are read, damaged ones are noticed
        assert tally.values[name] >= len(kind.seeds) and tally.errors[name] > 0, name
