"""Videos: digits that move, and folders of frames."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data import VideoDataConfig, load_video_data
from fastdiff.data.images import ArrayImages
from fastdiff.data.video import MovingDigits


def blobs(count=5):
    """28x28 with a square of its own brightness in the middle."""
    pixels = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    pixels[:, :, 10:18, 10:18] = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1) * 50
    return ArrayImages(pixels, torch.arange(count))


def moving(part=0, **fields):
    return MovingDigits(blobs(), VideoDataConfig(**fields), part)


def test_moving_digits_of_mnist():
    data = load_video_data(VideoDataConfig(num_frames=5))
    assert data.video_shape == (5, 1, 32, 32) and data.class_names == tuple("0123456789")
    assert len(data.train) == 4 * 4500 and len(data.held_out) == 4 * 500
    batch = data.train.batch([0, 4500, 17])
    assert batch["pixel_values"].shape == (3, 5, 1, 32, 32) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].min() == -1 and 0.5 < batch["pixel_values"].max() <= 1
    assert batch["labels"][0] == batch["labels"][1] == data.train.labels[0]  # the same digit on another way
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    # nothing is lost at the edges: the ink of all frames is the same (2e-7 of it was seen)
    ink = (batch["pixel_values"] + 1).sum(dim=(2, 3, 4))
    assert (ink / ink[:, :1] - 1).abs().max() < 1e-5


def test_a_video_is_a_function_of_seed_part_and_index():
    videos = moving()
    alone = videos.batch([7])["pixel_values"][0]
    assert torch.equal(videos.batch([3, 7, 1, 7])["pixel_values"][[1, 3]], torch.stack([alone, alone]))
    assert torch.equal(moving().batch(torch.tensor([7]))["pixel_values"][0], alone)
    assert not torch.equal(moving(seed=1).batch([7])["pixel_values"][0], alone)
    assert not torch.equal(moving(part=1).batch([7])["pixel_values"][0], alone)
    prints = {v.fingerprint() for v in (moving(), moving(seed=1), moving(part=1), moving(max_speed=2.0))}
    assert len(prints) == 4 and moving().fingerprint() in prints


def test_motion_is_straight_and_bounces():
    paths = moving(num_frames=60, max_speed=3.0).positions(range(20)).double()
    assert paths.min() >= 0 and paths.max() <= 12  # 32 - 20
    steps = paths.diff(dim=1).abs()  # [n, F - 1, 2]
    speed = steps.median(dim=1).values  # a step with a bounce in it is shorter
    assert (steps <= speed[:, None] + 1e-4).all()
    assert ((steps - speed[:, None]).abs() < 1e-4).double().mean() > 0.6
    total = speed.norm(dim=1)
    assert total.min() >= 1.5 - 1e-4 and total.max() <= 3.0 + 1e-4
    assert (paths.diff(dim=1).sign().diff(dim=1) != 0).any(dim=1).any(dim=1).all()  # each has turned


def test_pixels_are_where_the_positions_say():
    videos = moving()
    ink = videos.batch(range(5))["pixel_values"].add(1)[:, :, 0]  # [n, F, H, W]
    places = torch.arange(32.0)
    total = ink.sum(dim=(2, 3))
    centre = torch.stack([(ink.sum(2) * places).sum(-1), (ink.sum(3) * places).sum(-1)], dim=-1) / total[..., None]
    # the square's own centre is that of the 20x20: 9.5; 3e-6 was seen
    assert torch.allclose(centre, videos.positions(range(5)) + 9.5, atol=1e-4)


def test_a_digit_as_large_as_the_frame_stays():
    pixels = moving(frame_size=28, digit_size=28).batch([2])["pixel_values"][0]
    assert torch.allclose(pixels, blobs().images([2]).expand(8, 1, 28, 28), atol=1e-5)


def test_indices_beyond_the_set():
    assert moving().batch([])["pixel_values"].shape == (0, 8, 1, 32, 32)
    for index in (-1, 20):
        with pytest.raises(IndexError, match="there are 20"):
            moving().batch([index])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_frames=0), "num_frames: got 0; expected at least 1"),
        (dict(digit_size=40), "digit_size: got 40; expected at most frame_size, 32"),
        (dict(max_speed=-1.0), "max_speed: got -1.0"),
        (dict(max_speed=float("nan")), "max_speed: got nan"),
        (dict(seed=-1), "seed: got -1"),
        (dict(held_out_fraction=0.0), "held_out_fraction: got 0.0"),
        (dict(name="video_folder"), "folder: got none; video_folder needs"),
        (dict(folder="/x"), "folder: got '/x' with moving_digits, which is made of MNIST-5k"),
    ],
)
def test_unusable_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoDataConfig(**fields)


def test_unknown_name():
    with pytest.raises(ValueError, match="name: got 'films'; expected one of moving_digits, video_folder"):
        load_video_data(VideoDataConfig(name="films"))


@pytest.fixture
def films(tmp_path):
    """Two classes of three videos with seven frames; frame i of video v is grey 10·v + i, + 100 for dogs."""
    for label, name in enumerate(("cats", "dogs")):
        for video in range(3):
            folder = tmp_path / name / f"v{video}"
            folder.mkdir(parents=True)
            for frame in range(7):
                pixels = np.full((10, 12), 100 * label + 10 * video + frame, np.uint8)
                Image.fromarray(pixels).save(folder / f"{frame:03}.png")
    return tmp_path


def load(folder, **fields):
    return load_video_data(
        VideoDataConfig(name="video_folder", folder=str(folder), num_frames=3, frame_size=8, **fields)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_frames(films, channels):
    data = load(films, channels=channels)
    assert data.class_names == ("cats", "dogs") and data.video_shape == (3, channels, 8, 8)
    assert len(data.train) == 8 and len(data.held_out) == 4  # two clips per video; one video per class is held out
    seen = []
    for part in (data.train, data.held_out):
        batch = part.batch(range(len(part)))
        assert batch["pixel_values"].shape == (len(part), 3, channels, 8, 8)
        grey = ((batch["pixel_values"] + 1) * 127.5).round().int().amax(dim=(2, 3, 4))  # [n, F]
        assert (grey.diff(dim=1) == 1).all() and torch.equal(grey[:, 0] // 100, batch["labels"].int())
        assert set((grey[:, 0] % 10).tolist()) == {0, 3}
        seen.append(set((grey[:, 0] // 10).tolist()))
    assert not seen[0] & seen[1] and len(seen[1]) == 2
    assert data.train.fingerprint() != data.held_out.fingerprint()


def test_frames_of_different_sizes(films):
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(films / "dogs" / "v1" / "004.png")
    with pytest.raises(
        ValueError, match=r"004.png is 12x9, but 000.png beside it 12x10; expected frames of one"
    ) as error:
        load(films)
    assert "\n" not in str(error.value)


def test_unusable_folders_of_frames(films):
    (films / "dogs" / "v1" / "004.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="004.png is not an image that PIL can read"):
        load(films)
    for frame in range(3, 7):
        (films / "dogs" / "v1" / f"{frame:03}.png").unlink()
    (films / "dogs" / "v1" / "002.png").unlink()
    with pytest.raises(ValueError, match="v1 has 2 frames; expected at least num_frames = 3"):
        load(films)
    with pytest.raises(ValueError, match="v0 has 0 folders of frames; expected at least 2"):
        load(films / "dogs")
    with pytest.raises(ValueError, match="has no subfolders"):
        load(films / "dogs" / "v0")
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        load(films / "none")
