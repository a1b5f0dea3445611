"""A run of a tiny language model, made once."""

import pytest
from language_runs import write_run


@pytest.fixture(scope="session")
def language_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("language") / "run")
