"""Latents in the cache: made once, whole after a kill, and refused where they are not what was written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastdiff.data.images import ArrayImages, ImageData
from fastdiff.data.latents import cached_latents

SHAPE = (2, 2, 2)


@dataclass(frozen=True)
class WithTexts(ImageData):
    texts: tuple[str, ...] = ()


def images(count: int, seed: int = 0) -> ArrayImages:
    source = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), generator=source, dtype=torch.uint8)
    return ArrayImages(pixels, torch.arange(count) % 3)


def made(train: int = 600, held_out: int = 30, seed: int = 0) -> WithTexts:
    parts = images(train, seed), images(held_out, seed + 1)
    return WithTexts("squares", *parts, ("a", "b", "c"), (1, 4, 4), texts=("one", "two"))


class Encoder:
    """Means of quarters, and the same squared; counts what it is asked for."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pixels):
        self.seen += len(pixels)
        means = torch.nn.functional.avg_pool2d(pixels, 2)
        return torch.cat([means, means**2], dim=1)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from data.test_latents import SHAPE, Encoder, made
from fastdiff.data.latents import cached_latents

class Doomed(Encoder):
    def __call__(self, pixels):
        if self.seen >= 512:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(pixels)

cached_latents(made(), SHAPE, Doomed(), "vae", progress=False)
"""


@pytest.fixture(scope="module")
def killed_cache(tmp_path_factory, request):
    """A cache that a process left which was killed at image 512."""
    folder, tests = tmp_path_factory.mktemp("killed"), request.config.rootpath / "tests"
    command = [sys.executable, "-c", KILLED, str(tests.parent), str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FASTDIFF_CACHE": str(folder)})
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    return folder


@pytest.fixture
def unfinished(killed_cache, tmp_path, cache):
    """The folder with half of the latents, in this test's own cache."""
    shutil.copytree(killed_cache, tmp_path / "cache")
    (folder,) = [path for path in cache.iterdir() if path.name.endswith(".unfinished")]
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latents"


def test_latents_stand_where_images_stood():
    data, encode = made(), Encoder()
    latents = cached_latents(data, SHAPE, encode, "vae", progress=False)
    assert encode.seen == 630 and latents.image_shape == SHAPE and latents.texts == data.texts
    assert isinstance(latents, WithTexts) and latents.class_names == data.class_names
    indices = torch.tensor([599, 0, 256, 255])
    found = latents.train.images(indices)
    assert found.dtype == torch.float32 and torch.equal(found, Encoder()(data.train.images(indices)))
    found.zero_()  # a copy
    assert torch.equal(latents.train.images([0]), Encoder()(data.train.images([0])))
    assert isinstance(latents.train.latents, np.memmap) and not latents.train.latents.flags.writeable
    batch = latents.held_out.batch([3, 4])
    assert torch.equal(batch["labels"], data.held_out.labels[[3, 4]]) and batch["pixel_values"].shape == (2, *SHAPE)
    record = latents.record()
    assert record["examples"] == {"train": 600, "held_out": 30} and record["fingerprint"] != data.fingerprint


def test_they_are_made_once_for_each_autoencoder_and_each_data_set(cache):
    encode = Encoder()
    first = cached_latents(made(), SHAPE, encode, "vae", progress=False)
    again = cached_latents(made(), SHAPE, encode, "vae", progress=False)
    assert encode.seen == 630 and again.fingerprint == first.fingerprint
    others = [
        cached_latents(made(), SHAPE, Encoder(), "other", progress=False),
        cached_latents(made(seed=5), SHAPE, Encoder(), "vae", progress=False),
        cached_latents(made(held_out=31), SHAPE, Encoder(), "vae", progress=False),
    ]
    assert len({each.fingerprint for each in (first, *others)}) == 4
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 4


def test_features_of_another_shape_in_half_precision(cache):
    data, encode = made(40, 10), Encoder()

    def places(pixels):  # [n, 4, 2]
        return encode(pixels).flatten(2).transpose(1, 2)

    features = cached_latents(data, (4, 2), places, "encoder", dtype="float16", progress=False)
    found = features.train.images([3, 1])
    expected = Encoder()(data.train.images([3, 1])).flatten(2).transpose(1, 2)
    assert found.dtype == torch.float32 and torch.equal(found, expected.half().float())
    assert features.train.latents.dtype == np.float16 and features.image_shape == (4, 2)
    cached_latents(data, (4, 2), places, "encoder", dtype="float16", progress=False)
    assert encode.seen == 50
    whole = cached_latents(data, (4, 2), places, "encoder", progress=False)  # float32 are others
    assert encode.seen == 100 and torch.equal(whole.train.images([3, 1]), expected)
    with pytest.raises(ValueError, match="gave 1e.05 of images 0 … 39; expected at most 65504; store float32"):
        cached_latents(data, (4, 2), lambda pixels: places(pixels) * 0 + 1e5, "large", dtype="float16", progress=False)


def test_after_a_kill_it_goes_on(unfinished):
    with open(unfinished / "train.npy", "ab") as file:
        file.write(b"half of a block")  # that had not been marked
    encode = Encoder()
    latents = cached_latents(made(), SHAPE, encode, "vae", progress=False)
    assert encode.seen == 630 - 512 and not unfinished.exists()
    assert torch.equal(latents.train.images(range(600)), Encoder()(made().train.images(range(600))))


def test_what_cannot_be_gone_on_with_is_made_anew(unfinished):
    (unfinished / "train.npy").write_bytes((unfinished / "train.npy").read_bytes()[:100])
    encode = Encoder()
    latents = cached_latents(made(), SHAPE, encode, "vae", progress=False)
    assert encode.seen == 630
    assert torch.equal(latents.train.images([599]), Encoder()(made().train.images([599])))


def test_damage_is_one_line_that_names_the_file(cache):
    cached_latents(made(), SHAPE, Encoder(), "vae", progress=False)
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    file, record = folder / "train.npy", folder / "latents.json"
    content, kept = file.read_bytes(), record.read_text()
    for change, said in (
        (lambda: file.write_bytes(content[:-4]), r"train\.npy: got \d+ bytes; expected \d+"),
        (lambda: file.write_bytes(content[:-1] + b"\x01"), r"train\.npy: was changed after it was written"),
        (file.unlink, r"train\.npy: no such file"),
        (lambda: record.write_text("{"), r"latents\.json: not a whole record"),
        (lambda: record.write_text(json.dumps({"version": 0})), r"latents\.json: not a whole record"),
    ):
        change()
        with pytest.raises(ValueError, match=said + r".*delete the folder"):
            cached_latents(made(), SHAPE, Encoder(), "vae", progress=False)
        file.write_bytes(content)
        record.write_text(kept)
    cached_latents(made(), SHAPE, Encoder(), "vae", progress=False)


def test_what_an_autoencoder_must_not_give():
    with pytest.raises(ValueError, match=r"encode: gave shape \(256, 2, 2, 2\); expected \(256, 3, 2, 2\)"):
        cached_latents(made(), (3, 2, 2), Encoder(), "vae", progress=False)
    with pytest.raises(ValueError, match=r"latents of images 0 … 255 that are not finite"):
        cached_latents(made(), SHAPE, lambda pixels: Encoder()(pixels) * torch.nan, "vae", progress=False)
