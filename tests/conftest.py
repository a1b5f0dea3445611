"""Settings of the whole suite: poisoned memory, and nothing written outside temporary folders."""

import os

import pytest

# Outputs of native operators start as NaN, so that what a kernel forgets to write is seen. Read at import.
os.environ.setdefault("FASTDIFF_POISON_EMPTY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("FASTDIFF_TUNE", "0")  # what is measured differs from run to run; tests/tuning sets it
if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: more threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def language_run(tmp_path_factory):
    """A run of a tiny language model."""
    from language_runs import write_run

    return write_run(tmp_path_factory.mktemp("language") / "run")
