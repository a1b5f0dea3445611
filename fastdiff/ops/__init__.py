"""fastdiff's operators: each one public function with a reference, CPU, CUDA and Triton backend."""

from fastdiff.ops._qgfd_options import QGFDOptions
from fastdiff.ops.adaln import adaln, gated_residual_adaln
from fastdiff.ops.bias_activation import bias_activation
from fastdiff.ops.eos_log_prob import eos_log_prob, eos_log_prob_from_logits
from fastdiff.ops.masked_linear_cross_entropy import masked_linear_cross_entropy
from fastdiff.ops.qgfd_attention import qgfd_attention, qgfd_attention_dense, qgfd_values
from fastdiff.ops.token_sampling import TokenSample, lm_head_sample, sample_tokens
from fastdiff.ops.unmask import unmask_

__all__ = [
    "QGFDOptions",
    "TokenSample",
    "adaln",
    "bias_activation",
    "eos_log_prob",
    "eos_log_prob_from_logits",
    "gated_residual_adaln",
    "lm_head_sample",
    "masked_linear_cross_entropy",
    "qgfd_attention",
    "qgfd_attention_dense",
    "qgfd_values",
    "sample_tokens",
    "unmask_",
]
