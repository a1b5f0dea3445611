"""`fastdiff.sample` on an autoencoder: pictures of what it makes of images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.data.file_checks import natural_order
from fastdiff.data.images import FileImages
from fastdiff.data.pictures import IMAGE_SUFFIXES
from fastdiff.errors import section
from fastdiff.files import output_path
from fastdiff.tasks.autoencoder.pictures import noise_sheet, reconstruction_sheet
from fastdiff.tasks.autoencoder.run import AutoencoderRun, load_run
from fastdiff.tasks.options import DataOptions, RunOptions, at_least
from fastdiff.tasks.results import results_folder
from fastdiff.tasks.run import finding_data


@dataclass
class SampleOptions(DataOptions, RunOptions):
    """Draws originals, reconstructions and errors (PNG): held-out images of a run's data, or pictures of one's own.

    Attributes:
        pictures: a picture or a folder of pictures to take instead of the run's data; needed where there is no recipe
        num_images: number of images (default: 30, or 5 with --noise)
        noise: what noise does instead, at several levels: to the latents, decoded, and to the images
        seed: seed of the noise
        output: path of the PNG; default: reconstructions.png or noise-levels.png in the folder of the run or saved
            model (of a model on the hub: in the current folder)
    """

    pictures: str | None = None
    num_images: int | None = None
    noise: bool = False
    seed: int = 0
    output: str | None = None

    def __post_init__(self):
        at_least("num_images", self.num_images, 1)
        at_least("seed", self.seed, 0)


def sample_reconstructions(path: str, options: SampleOptions) -> None:
    """Draws the picture and prints its path."""
    run = load_run(path, weights=options.weights, device=options.device)
    name = "noise-levels.png" if options.noise else "reconstructions.png"
    output = output_path(options.output, results_folder(path, run.folder) / name)
    images = _images(path, run, options, options.num_images or (5 if options.noise else 30))
    if images.shape[1] not in (1, 3):
        raise ValueError(f"{path}: got an autoencoder of {images.shape[1]} channels; expected images of 1 or 3")
    if options.noise:
        print(noise_sheet(run.model, images, output, seed=options.seed))
        return
    title = None if run.step is None else f"trained for {run.step} steps"
    print(reconstruction_sheet(run.model, images, output, title))


def _images(path: str, run: AutoencoderRun, options: SampleOptions, count: int) -> Tensor:
    """The images to show: [N, C, H, W]."""
    if options.pictures is not None:
        return _own_pictures(run, Path(options.pictures), count)
    if run.recipe is None:
        raise ValueError(f"{path}: got a model without a recipe, which names its images; pass --pictures FOLDER")
    from fastdiff.data import load_data
    from fastdiff.evaluation.report import balanced_subset

    with finding_data(), section("data"):
        data = load_data(run.data_config("data", options.data_path))
    run.check_data({"data": data}, options.accept_changed_data)
    return data.held_out.images(balanced_subset(data.held_out, count))


def _own_pictures(run: AutoencoderRun, place: Path, count: int) -> Tensor:
    if not place.exists():
        raise FileNotFoundError(f"--pictures: got {str(place)!r}; expected a picture or a folder of pictures")
    found = [place] if place.is_file() else natural_order(
        each for each in place.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES
    )  # fmt: skip
    if not found:
        raise FileNotFoundError(f"--pictures: got {str(place)!r}, which has no pictures; expected some in it")
    config, paths = run.model.config, found[:count]
    labels = torch.zeros(len(paths), dtype=torch.long)
    return FileImages(paths, labels, config.sample_size, config.in_channels).images(range(len(paths)))
