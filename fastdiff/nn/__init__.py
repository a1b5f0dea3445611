"""Modules made of fastdiff's operators: what a diffusion transformer is put together from."""

from fastdiff.nn.attention import SelfAttention
from fastdiff.nn.embeddings import LabelEmbedding, PatchEmbed, TimestepEmbedding, sincos_2d, sincos_positions
from fastdiff.nn.head import LanguageModelHead
from fastdiff.nn.mlp import ACTIVATIONS, Mlp
from fastdiff.nn.norm import AdaLayerNorm, GatedResidualAdaLayerNorm
from fastdiff.nn.qgfd import DiffusedValues, QGFDAttention, QGFDSettings
from fastdiff.nn.transformer import KeyValueCache, TransformerBlock, annealed_attention_mask

__all__ = [
    "ACTIVATIONS",
    "AdaLayerNorm",
    "DiffusedValues",
    "GatedResidualAdaLayerNorm",
    "KeyValueCache",
    "LabelEmbedding",
    "LanguageModelHead",
    "Mlp",
    "PatchEmbed",
    "QGFDAttention",
    "QGFDSettings",
    "SelfAttention",
    "TimestepEmbedding",
    "TransformerBlock",
    "annealed_attention_mask",
    "sincos_2d",
    "sincos_positions",
]
