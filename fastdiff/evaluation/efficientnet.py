"""Features of EfficientNet-Lite0, a network that was trained on ImageNet's photographs (Apache-2.0, from PyPI).

They tell what is in a picture better than pixels do, and belong to no data set of ours. A Fréchet distance in them is
not FID, whose features are Inception's.
"""

import torch
from safetensors.torch import save
from torch import Tensor

from fastdiff.data import ImageData, ImageSet
from fastdiff.evaluation.features import FrechetComparison, compare_with_real
from fastdiff.files import cache_folder, write_atomically
from fastdiff.models.efficientnet import CHANNELS, feature_maps, load_efficientnet_lite0
from fastdiff.models.weights import read_tensors

SPACE = "EfficientNet-Lite0's features"
FEATURES = CHANNELS
_VERSION = 1  # of how images become features: another number means another cache file


@torch.inference_mode()
def image_features(
    images: Tensor | ImageSet,
    indices: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 50,
    progress: bool = False,
) -> Tensor:
    """What EfficientNet-Lite0 sees in images: its last feature map, averaged over its 7x7 places.

    Images of any size are resized, see `fastdiff.models.efficientnet.feature_maps`.

    Args:
        images: [N, 1 or 3, H, W] in [-1, 1] (clipped to it), or a set of such images.
        indices: those of a set; None takes all.
        device: where the network runs.
        batch_size: images at a time.
        progress: shows a bar.

    Returns:
        float32 [N, 1280], on the CPU.

    Raises:
        ModuleNotFoundError: the packages are missing. ValueError: other shapes.
    """
    from tqdm import tqdm

    network = load_efficientnet_lite0().to(device)
    everything = torch.arange(len(images)) if indices is None else torch.as_tensor(indices)
    features = []
    for part in tqdm(everything.split(batch_size), desc="features", unit="batch", disable=not progress):
        batch = images[part] if isinstance(images, Tensor) else images.images(part)
        features.append(feature_maps(batch.to(device), network).mean(dim=(2, 3)).cpu())
    return torch.cat(features) if features else torch.empty(0, FEATURES)


def real_features(data: ImageData, part: str, count: int, *, progress: bool = False) -> Tensor:
    """Features of `count` images of a part ("train" or "held_out") of a data set, spread evenly over it (of all, where
    there are fewer): float32 [n, 1280]. They are computed once and kept in the cache."""
    images: ImageSet = getattr(data, part)
    count = min(count, len(images))
    path = (
        cache_folder()
        / "features"
        / f"{data.name}-{data.images_fingerprint[:16]}-{part}-{count}-v{_VERSION}.safetensors"
    )
    try:
        features = read_tensors(path)["features"]
        if features.shape == (count, FEATURES):
            return features
    except (OSError, ValueError, KeyError):  # none yet, or damaged
        pass
    features = image_features(images, torch.arange(count) * len(images) // max(count, 1), progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"features": features}))
    return features


def compare_images(samples: Tensor, data: ImageData, *, draws: int = 1, progress: bool = False) -> FrechetComparison:
    """Fréchet distances of samples and of real held-out images to training images in EfficientNet-Lite0's features; see
    `compare_with_real`.

    Args:
        samples: [N, C, H, W] in [-1, 1]; as many real ones of each kind are taken, so that N below 1 280 gives larger
            distances, which compare with each other alone.
        data: real images.
        draws: how often the sets are drawn.
    """
    features = image_features(samples, progress=progress)
    train = real_features(data, "train", 2 * len(samples), progress=progress)
    held_out = real_features(data, "held_out", len(samples), progress=progress)
    return compare_with_real(features, train, held_out, draws=draws, space=SPACE)
