"""Modules made of fastdiff's operators: what a diffusion transformer is put together from."""

from fastdiff.nn.attention import SelfAttention
from fastdiff.nn.attention_maps import (
    AttentionMaps,
    EntropyTerm,
    attention_entropy,
    attention_maps,
    drop_early_tokens,
    sink_share,
)
from fastdiff.nn.cross_attention import CrossAttention
from fastdiff.nn.embeddings import (
    ConvStem,
    FourierEmbedding,
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    sincos_2d,
    sincos_positions,
)
from fastdiff.nn.head import LanguageModelHead
from fastdiff.nn.mlp import ACTIVATIONS, ConvMlp, Mlp
from fastdiff.nn.norm import AdaLayerNorm, GatedResidualAdaLayerNorm
from fastdiff.nn.q_former import QFormer, QFormerConfig, StateMix
from fastdiff.nn.qgfd import DiffusedValues, QGFDAttention, QGFDSettings
from fastdiff.nn.transformer import KeyValueCache, TransformerBlock, annealed_attention_mask

__all__ = [
    "ACTIVATIONS",
    "AdaLayerNorm",
    "AttentionMaps",
    "ConvMlp",
    "ConvStem",
    "CrossAttention",
    "DiffusedValues",
    "EntropyTerm",
    "FourierEmbedding",
    "GatedResidualAdaLayerNorm",
    "KeyValueCache",
    "LabelEmbedding",
    "LanguageModelHead",
    "Mlp",
    "PatchEmbed",
    "QFormer",
    "QFormerConfig",
    "QGFDAttention",
    "QGFDSettings",
    "SelfAttention",
    "StateMix",
    "TimestepEmbedding",
    "TransformerBlock",
    "annealed_attention_mask",
    "attention_entropy",
    "attention_maps",
    "drop_early_tokens",
    "sincos_2d",
    "sincos_positions",
    "sink_share",
]
