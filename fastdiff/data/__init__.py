"""Data to train on: labelled images and text, each split once into train and held-out, and the order of reading."""

from fastdiff.data.config import DataConfig
from fastdiff.data.datasets import load_data
from fastdiff.data.images import ImageData, ImageSet
from fastdiff.data.stream import EpochStream, share
from fastdiff.data.text import load_text_data
from fastdiff.data.text_batches import PairBatch, document_windows, pair_windows, window_length
from fastdiff.data.text_config import TextDataConfig, TokenizerConfig
from fastdiff.data.text_parts import TextData, TextPart
from fastdiff.data.token_files import TokenFile, write_token_file
from fastdiff.data.tokenization import load_tokenizer

__all__ = [
    "DataConfig",
    "EpochStream",
    "ImageData",
    "ImageSet",
    "PairBatch",
    "TextData",
    "TextDataConfig",
    "TextPart",
    "TokenFile",
    "TokenizerConfig",
    "document_windows",
    "load_data",
    "load_text_data",
    "load_tokenizer",
    "pair_windows",
    "share",
    "window_length",
    "write_token_file",
]
