"""A kind that is registered by one line, runs that an older fastdiff made, and a stand-in for the Hugging Face Hub."""

import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = ("dit", "masked_lm", "qgfd", "length_head")


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
    return _unpacked(tmp_path_factory.mktemp("runs_of_0.1.0"))


def _unpacked(folder: Path) -> Path:
    with tarfile.open(HERE / "runs_of_0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with tiny runs of each kind, whose newest checkpoint (step 3) today's trainer wrote."""
    from fastdiff import train

    folder = _unpacked(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(folder)  # the length head's recipe names its language model by a relative path
        for kind in reversed(KINDS):  # the head first: its language model is that of step 2
            train.main([f"{kind}/config.yaml", "--training.resume", "true", "--training.max_steps", "3"])
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hugging Face Hub, which huggingface_hub is led to, with a login and an empty cache."""
    from huggingface_hub import constants
    from tasks.hub_server import TOKEN, running_hub

    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has plain uploads alone
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
