"""eos_log_prob's backends as seen from Python: the torch operators and their fake kernels.

The native operators (`fastdiff::…`, csrc/eos_log_prob.h) and the Triton launchers share these signatures; logits are
[B, L, V] with a contiguous last dimension, hidden is contiguous [B, L, D], bias contiguous:

    eos_log_prob(hidden, weight, bias, end_token_ids, excluded_ids) -> float32 [B, L]
    eos_log_prob_from_logits(logits, end_token_ids, excluded_ids) -> the same

Both lists are ascending int64, no id twice; excluded_ids has the end tokens and the suppressed ids.
"""

import torch

from fastdiff.ops._register import implementations, register_backends

# The same schemas are written in csrc/eos_log_prob_cpu.cpp; a test compares them.
SCHEMAS = {
    "eos_log_prob": "(Tensor hidden, Tensor weight, Tensor? bias, Tensor end_token_ids, Tensor excluded_ids) -> Tensor",
    "eos_log_prob_from_logits": "(Tensor logits, Tensor end_token_ids, Tensor excluded_ids) -> Tensor",
}


def _fake(rows, *others):
    return rows.new_empty(rows.shape[:2], dtype=torch.float32)


_FAKES = dict.fromkeys(SCHEMAS, _fake)
IMPLEMENTATIONS = implementations(SCHEMAS, _FAKES, "fastdiff.kernels.eos_log_prob.triton_kernels")
for _operator in SCHEMAS:
    register_backends(_operator)
