"""A kind that is registered by one line, and runs that an older fastdiff made."""

import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def toy(monkeypatch):
    """The name of the toy kind, registered as one line of kinds.py registers the others."""
    from fastdiff.tasks import kinds

    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setitem(kinds.KINDS, "toy", "toy_kind")
    yield "toy"
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_kind"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="session")
def old_runs(tmp_path_factory) -> Path:
    """A folder with tiny runs of each kind that fastdiff 0.1.0 made, and what it drew from them."""
    folder = tmp_path_factory.mktemp("runs_of_0.1.0")
    with tarfile.open(HERE / "runs_of_0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder
