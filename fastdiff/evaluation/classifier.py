"""The small classifier whose verdict and features score samples: trained once a data set, then kept in a cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff.data import Attribute, CaptionedData, EpochStream, ImageData, ImageSet
from fastdiff.device import computes_bf16
from fastdiff.files import cache_folder, check_cache_folder, write_atomically
from fastdiff.models.weights import read_tensors

VERSION = 1  # of network and training below: another number means another cache file
FEATURES = 128
CLASS = "class"  # the attribute that the labels are


class Classifier(nn.Module):
    """A convolutional network for small images of any size, which tells one attribute of them or several.

    Args:
        channels: channels of the images.
        num_values: how many values each attribute has, by its name: {"class": 10}, {"class": 10, "color": 8}.
    """

    def __init__(self, channels: int, num_values: Mapping[str, int]):
        super().__init__()
        widths = [(channels, 32, 1), (32, 64, 2), (64, 64, 1), (64, FEATURES, 2), (FEATURES, FEATURES, 1)]
        layers = []
        for width_in, width_out, stride in widths:
            layers += [
                nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(),
            ]
        self.num_values = dict(num_values)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, sum(num_values.values()))

    def features(self, images: Tensor) -> Tensor:
        """What the Fréchet distance is taken of: images [B, C, H, W] in [-1, 1] → [B, 128], in the images' dtype."""
        return self.body(images).mean(dim=(2, 3))

    def logits(self, features: Tensor) -> dict[str, Tensor]:  # [B, 128] -> [B, K] each
        """The logits of each attribute."""
        parts = self.head(features).split(list(self.num_values.values()), dim=-1)
        return dict(zip(self.num_values, parts, strict=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # [B, C, H, W] -> logits [B, K] each
        return self.logits(F.dropout(self.features(images), 0.2, self.training))


def training_images(data: ImageData) -> tuple[ImageSet, dict[str, Tensor]]:
    """The images that a classifier of a data set learns from, and int64 [K] by attribute, what it learns of them."""
    if isinstance(data, CaptionedData) and data.every_combination is not None:
        return data.every_combination.images, data.every_combination.values
    return data.train, {name: attribute.train for name, attribute in attributes_of(data).items()}


def attributes_of(data: ImageData) -> dict[str, Attribute]:
    """What a classifier of a data set tells: the class, and the attributes that the data set has."""
    label = Attribute(data.class_names, data.train.labels, data.held_out.labels)
    return {CLASS: label, **(data.attributes if isinstance(data, CaptionedData) else {})}


@dataclass(frozen=True)
class Schedule:
    """How long the classifier trains: by the number of real images, so that small sets get enough steps."""

    epochs: int
    batch_size: int
    learning_rate: float = 4e-3

    @staticmethod
    def for_size(images: int) -> "Schedule":
        return Schedule(epochs=8, batch_size=128) if images > 20_000 else Schedule(epochs=15, batch_size=64)


def load_or_train_classifier(
    data: ImageData, *, device: torch.device | str = "cpu", progress: bool = True, schedule: Schedule | None = None
) -> Classifier:
    """The classifier of a data set, in eval mode: from the cache, or trained on the real training images (and cached).

    It tells the class, and the attributes of `CaptionedData`. The file's name holds a hash of images, labels and split,
    so a changed data set gets another classifier.

    Raises:
        PermissionError, OSError: the cache cannot be written.
    """
    schedule = schedule or Schedule.for_size(len(data.train))
    path = classifier_file(data, schedule)
    if not path.is_file():
        check_cache_folder()  # before the minutes that training takes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = {name: len(attribute.names) for name, attribute in attributes_of(data).items()}
        classifier = Classifier(data.image_shape[0], values)
        if not _load(classifier, path):
            _train(classifier, data, schedule, torch.device(device), progress)
            _store(classifier, path)
    return classifier.to(device).eval()


def check_classifier_cache(data: ImageData) -> None:
    """Raises PermissionError where a data set's classifier is not in the cache and could not be put there."""
    if not classifier_file(data).is_file():
        check_cache_folder()


def classifier_file(data: ImageData, schedule: Schedule | None = None) -> Path:
    """Where the classifier of a data set lies once it was trained."""
    schedule = schedule or Schedule.for_size(len(data.train))
    key = f"{data.images_fingerprint[:16]}-v{VERSION}-{schedule.epochs}x{schedule.batch_size}"
    images, _ = training_images(data)
    if images is not data.train:
        key += f"-{images.fingerprint()[:8]}"
    return cache_folder() / "classifiers" / f"{data.name}-{key}.safetensors"


def _load(classifier: Classifier, path: Path) -> bool:
    try:
        classifier.load_state_dict(read_tensors(path))
    except (OSError, ValueError, RuntimeError):  # none yet, or damaged: it is trained anew
        return False
    return True


def _store(classifier: Classifier, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}))


def _train(classifier: Classifier, data: ImageData, schedule: Schedule, device: torch.device, progress: bool) -> None:
    classifier.to(device, memory_format=torch.channels_last).train()
    train, targets = training_images(data)
    stream = EpochStream(len(train), schedule.batch_size, seed=0)
    steps = schedule.epochs * len(data.train) // schedule.batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=schedule.learning_rate, weight_decay=1e-2, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, total_steps=steps + 1)
    bf16 = computes_bf16(device.type)
    black = not isinstance(data, CaptionedData)
    for step in tqdm(
        range(steps), desc=f"classifier of {data.name}", unit="step", disable=not progress, dynamic_ncols=True
    ):
        indices = stream.indices(step)
        images = shifted(train.images(indices), black).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = classifier(images)
        # no label smoothing: it draws each class together in the features, which then can't tell variety from sameness
        losses = [F.cross_entropy(logits[name].float(), targets[name][indices].to(device)) for name in logits]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.step()


def shifted(images: Tensor, black: bool = True) -> Tensor:
    """A batch moved by up to a fourteenth of its size, each image by its own offset.

    Black (-1) comes in, or else the edge goes on: a coloured background stays one.
    """
    reach = max(1, images.shape[-1] // 14)
    height, width = images.shape[-2:]
    padded = F.pad(images, [reach] * 4, value=-1.0) if black else F.pad(images, [reach] * 4, mode="replicate")
    rows = torch.randint(0, 2 * reach + 1, (len(images), 1)) + torch.arange(height)  # [B, H]
    columns = torch.randint(0, 2 * reach + 1, (len(images), 1)) + torch.arange(width)
    batch = torch.arange(len(images))[:, None, None]
    # indexing by three index tensors around the channel dimension puts it last
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.inference_mode()
def classify(
    classifier: Classifier, images: Tensor | ImageSet, indices: Tensor | None = None, batch_size: int = 500
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features [N, 128] and predicted values [N] of each attribute, of images [N, C, H, W], or of `indices` of a set;
    on the CPU."""
    device = next(classifier.parameters()).device
    if not isinstance(images, Tensor):
        indices = torch.arange(len(images)) if indices is None else indices
    features, values = [], {name: [] for name in classifier.num_values}
    count = len(images) if indices is None else len(indices)
    for start in range(0, count, batch_size):
        part = slice(start, min(start + batch_size, count))
        batch = images[part] if indices is None else images.images(indices[part])
        batch = batch.float().to(device, memory_format=torch.channels_last)
        features.append(classifier.features(batch))
        for name, logits in classifier.logits(features[-1]).items():
            values[name].append(logits.argmax(-1).cpu())
    return torch.cat(features).float().cpu(), {name: torch.cat(parts) for name, parts in values.items()}
