"""Data to train on: labelled images, sounds and videos, tables and text, each split once into train and held-out, and
the order of reading."""

from fastdiff.data.audio import AudioData, AudioDataConfig, load_audio_data
from fastdiff.data.config import DataConfig
from fastdiff.data.datasets import load_data
from fastdiff.data.images import ImageData, ImageSet
from fastdiff.data.labelled import ExampleSet, LabelledData
from fastdiff.data.stream import EpochStream, share
from fastdiff.data.table_schema import TableSchema
from fastdiff.data.tabular import TabularData, TabularDataConfig, load_tabular_data
from fastdiff.data.text import load_text_data
from fastdiff.data.text_batches import PairBatch, document_windows, pair_windows, window_length
from fastdiff.data.text_config import TextDataConfig, TokenizerConfig
from fastdiff.data.text_parts import TextData, TextPart
from fastdiff.data.token_files import TokenFile, write_token_file
from fastdiff.data.tokenization import load_tokenizer
from fastdiff.data.video import VideoData, VideoDataConfig, load_video_data

__all__ = [
    "AudioData",
    "AudioDataConfig",
    "DataConfig",
    "EpochStream",
    "ExampleSet",
    "ImageData",
    "ImageSet",
    "LabelledData",
    "PairBatch",
    "TableSchema",
    "TabularData",
    "TabularDataConfig",
    "TextData",
    "TextDataConfig",
    "TextPart",
    "TokenFile",
    "TokenizerConfig",
    "VideoData",
    "VideoDataConfig",
    "document_windows",
    "load_audio_data",
    "load_data",
    "load_tabular_data",
    "load_text_data",
    "load_tokenizer",
    "load_video_data",
    "pair_windows",
    "share",
    "window_length",
    "write_token_file",
]
