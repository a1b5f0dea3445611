"""Short videos with labels: MNIST digits that move and bounce, or a folder of frames."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data.config import DataConfig, check_class_names
from fastdiff.data.datasets import load_mnist5k
from fastdiff.data.file_checks import check_pictures, class_folders, natural_order
from fastdiff.data.images import ArrayImages, FileImages
from fastdiff.data.labelled import ExampleSet, LabelledData
from fastdiff.data.pictures import IMAGE_SUFFIXES
from fastdiff.data.splits import stratified_split
from fastdiff.errors import named


@dataclass
class VideoDataConfig:
    """Which videos to train on.

    Attributes:
        name: "moving_digits" (digits of MNIST-5k that move with constant velocity and bounce off the edges) or
            "video_folder" (a subfolder per class, in it one per video, in it the frames as images in the natural order
            of their names: 2 before 10).
        folder: the folder of video_folder.
        num_frames: frames of a video. A longer one of video_folder gives several, one after the other; the rest is left
            out.
        frame_size: edge of a frame in pixels; video_folder crops its frames (centre square) and resizes them to it. The
            frames of one video must have one size.
        digit_size: edge in pixels to which the 28x28 of a digit are scaled; moving_digits alone.
        max_speed: pixels per frame, of moving_digits: speeds are drawn from half of it to all of it.
        videos_per_digit: for moving_digits, videos of each digit, each with its own motion: 4 500 digits to train on,
            500 held out.
        seed: seed of the motions.
        channels: 3 for colour or 1 for grey, of video_folder.
        held_out_fraction: share of each class's videos that video_folder holds out.
        check: how video_folder's frames are looked at before training: "decode" decodes each once (what was decoded is
            remembered in the cache until it changes), so that no run ends midway for a broken one; "headers" opens
            them.
        class_names: the names of video_folder's subfolders in the order of their labels; null takes the natural order
            (2 before 10).
    """

    name: Literal["moving_digits", "video_folder"] = "moving_digits"
    folder: str | None = None
    num_frames: int = 8
    frame_size: int = 32
    digit_size: int = 20
    max_speed: float = 3.0
    videos_per_digit: int = 4
    seed: int = 0
    channels: Literal[1, 3] = 1
    held_out_fraction: float = 0.1
    check: Literal["headers", "decode"] = "decode"
    class_names: list[str] | None = None

    def __post_init__(self):
        check_class_names(self.class_names, self.name, "video_folder")
        for name in ("num_frames", "frame_size", "digit_size", "videos_per_digit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected at least 1")
        if self.name == "moving_digits" and self.digit_size > self.frame_size:
            raise ValueError(
                f"{named('digit_size')}: got {self.digit_size}; expected at most frame_size, {self.frame_size}"
            )
        if self.seed < 0:
            raise ValueError(f"{named('seed')}: got {self.seed}; expected 0 or more")
        if not 0 <= self.max_speed < float("inf"):
            raise ValueError(f"{named('max_speed')}: got {self.max_speed}; expected pixels per frame, 0 or more")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"{named('held_out_fraction')}: got {self.held_out_fraction}; expected a number between 0 and 1"
            )
        if self.name == "video_folder" and not self.folder:
            raise ValueError(
                f"{named('folder')}: got none; video_folder needs a folder with a subfolder per class, in it one per "
                "video"
            )
        if self.name == "moving_digits" and self.folder:
            raise ValueError(
                f"{named('folder')}: got {self.folder!r} with moving_digits, which is made of MNIST-5k; leave it out"
            )


class MovingDigits:
    """Digits on their way: video i shows digit i % N, and its motion is drawn from (seed, part, i) alone.

    Args:
        digits: N images, 1 channel.
        config: frame_size, digit_size, num_frames, max_speed, videos_per_digit and seed are read.
        part: 0 of training, 1 held out: their motions differ.
    """

    def __init__(self, digits: ArrayImages, config: VideoDataConfig, part: int = 0):
        size = (config.digit_size, config.digit_size)
        images = digits.images(range(len(digits))).add(1).div(2)  # 0 … 1: what comes in from outside is 0
        margin = (0, config.frame_size - config.digit_size) * 2  # in the upper left corner of a frame
        self.sprites = F.pad(F.interpolate(images, size=size, mode="bilinear", antialias=True), margin)
        self.labels = digits.labels.repeat(config.videos_per_digit)
        self.config, self.part, self._source = config, part, digits.fingerprint()

    def __len__(self) -> int:
        return len(self.labels)

    def positions(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Where the digits' upper left corners are, (x, y) in pixels: float32 [n, F, 2]."""
        room = self.config.frame_size - self.config.digit_size
        frames = np.arange(self.config.num_frames)[:, None]
        paths = np.empty((len(indices), self.config.num_frames, 2))
        for row, index in enumerate(torch.as_tensor(indices, dtype=torch.long).tolist()):
            generator = np.random.default_rng([self.config.seed, self.part, index])
            start, angle = generator.uniform(0, room, 2), generator.uniform(0, 2 * np.pi)
            speed = self.config.max_speed * generator.uniform(0.5, 1)
            unfolded = start + frames * speed * np.array([np.cos(angle), np.sin(angle)])
            # bouncing is walking on a circle of twice the room, folded in the middle
            paths[row] = room - np.abs(unfolded % (2 * room) - room) if room else 0
        return torch.from_numpy(paths).float()

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """{"pixel_values": float32 [n, F, 1, H, W] in [-1, 1], "labels": int64 [n]}. Raises IndexError beyond len()."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"videos {int(indices.min())} … {int(indices.max())}; there are {len(self)}")
        count, frames, size = len(indices), self.config.num_frames, self.config.frame_size
        if not count:
            return {"pixel_values": torch.empty(0, frames, 1, size, size), "labels": self.labels[indices]}
        sprites = self.sprites[indices % len(self.sprites)].repeat_interleave(frames, dim=0)
        shift = self.positions(indices).flatten(0, 1) * (2 / size)  # in grid_sample's units: a frame is 2 wide
        theta = torch.zeros(count * frames, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1
        theta[:, :, 2] = -shift
        grid = F.affine_grid(theta, list(sprites.shape), align_corners=False)
        moved = F.grid_sample(sprites, grid, align_corners=False)  # bilinear, so motion is smooth
        pixels = moved.view(count, frames, 1, size, size).clamp_(0, 1).mul_(2).sub_(1)
        return {"pixel_values": pixels, "labels": self.labels[indices]}

    def fingerprint(self) -> str:
        fields = ("num_frames", "frame_size", "digit_size", "max_speed", "videos_per_digit", "seed")
        options = [getattr(self.config, field) for field in fields]
        return hashlib.sha256(f"{options} {self.part} {self._source}".encode()).hexdigest()


class FolderVideos:
    """Videos whose frames are decoded from files when they are asked for.

    Args:
        clips: N lists of as many frames.
        labels: int64 [N].
        image_size, channels: size and channels of what `batch` returns.
    """

    def __init__(self, clips: Sequence[Sequence[Path]], labels: Tensor, image_size: int, channels: int):
        self.labels, self.num_frames = labels.long(), len(clips[0])
        paths = [path for clip in clips for path in clip]
        self._frames = FileImages(paths, labels.repeat_interleave(self.num_frames), image_size, channels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """{"pixel_values": float32 [n, F, C, H, W] in [-1, 1], "labels": int64 [n]}."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        frames = (indices[:, None] * self.num_frames + torch.arange(self.num_frames)).flatten()
        pixels = self._frames.images(frames)
        return {"pixel_values": pixels.unflatten(0, (len(indices), self.num_frames)), "labels": self.labels[indices]}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.num_frames} {self._frames.fingerprint()}".encode()).hexdigest()


@dataclass(frozen=True)
class VideoData(LabelledData):
    """Labelled videos and their shape."""

    train: ExampleSet
    held_out: ExampleSet
    video_shape: tuple[int, int, int, int]  # F, C, H, W


def load_video_data(config: VideoDataConfig) -> VideoData:
    """Loads or makes the videos that a recipe names.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: a source is missing or unusable; one line with what to
            install or change.
    """
    if config.name == "moving_digits":
        digits = load_mnist5k(DataConfig())
        shape = (config.num_frames, 1, config.frame_size, config.frame_size)
        train, held_out = MovingDigits(digits.train, config), MovingDigits(digits.held_out, config, part=1)
        return VideoData(config.name, train, held_out, digits.class_names, shape)
    if config.name == "video_folder":
        return _video_folder(config)
    raise ValueError(f"{named('name')}: got {config.name!r}; expected one of moving_digits, video_folder")


def _video_folder(config: VideoDataConfig) -> VideoData:
    root = Path(config.folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{named('folder')}: got {config.folder!r}, which is not a folder; expected one with a subfolder per "
            "class, in it one per video"
        )
    classes = class_folders(root, config.class_names)
    if not classes:
        raise ValueError(f"{named('folder')}: got {config.folder!r}, which has no subfolders; expected one per class")
    folders: list[Path] = []  # of frames
    labels = []
    for label, folder in enumerate(classes):
        found = sorted(class_folders(folder))  # their order decides the split, nothing else
        if len(found) < 2:
            raise ValueError(f"{folder} has {len(found)} folders of frames; expected at least 2 (one is held out)")
        folders += found
        labels += [label] * len(found)
    videos = _clips([_frames(folder, config.num_frames) for folder in folders], config)
    parts = []
    for indices in stratified_split(torch.tensor(labels), config.held_out_fraction):  # a video is in one part alone
        chosen = [(clip, labels[i]) for i in indices.tolist() for clip in videos[i]]
        of_clips = torch.tensor([label for _, label in chosen])
        parts.append(FolderVideos([clip for clip, _ in chosen], of_clips, config.frame_size, config.channels))
    shape = (config.num_frames, config.channels, config.frame_size, config.frame_size)
    return VideoData(config.name, *parts, tuple(folder.name for folder in classes), shape)


def _frames(video: Path, num_frames: int) -> list[Path]:
    """The frames of a folder in their order."""
    frames = natural_order(file for file in video.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if len(frames) < num_frames:
        raise ValueError(f"{video} has {len(frames)} frames; expected at least {named('num_frames')} = {num_frames}")
    return frames


def _clips(videos: Sequence[list[Path]], config: VideoDataConfig) -> list[list[list[Path]]]:
    """The frames of each video, cut into clips, once they are known to be images of one size."""
    paths = [frame for frames in videos for frame in frames]
    sizes = dict(zip(paths, check_pictures(paths, config.check), strict=True))
    for frames in videos:
        first = sizes[frames[0]]
        for frame in frames:
            size = sizes[frame]
            if size != first:
                raise ValueError(
                    f"{frame} is {size[0]}x{size[1]}, but {frames[0].name} beside it {first[0]}x{first[1]}; expected "
                    "frames of one size in a video: resize or remove it"
                )
    count = config.num_frames
    return [[frames[i : i + count] for i in range(0, len(frames) - count + 1, count)] for frames in videos]
