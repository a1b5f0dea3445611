"""Image data sets with labels, split once into train and held-out, and the order in which training reads them."""

from fastdiff.data.config import DataConfig
from fastdiff.data.datasets import load_data
from fastdiff.data.images import ImageData, ImageSet
from fastdiff.data.stream import EpochStream, share

__all__ = ["DataConfig", "EpochStream", "ImageData", "ImageSet", "load_data", "share"]
