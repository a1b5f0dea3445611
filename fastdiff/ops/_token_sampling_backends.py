"""Token sampling's backends as seen from Python: the torch operators and their fake kernels.

The native operators (`fastdiff::…`, csrc/token_sampling.h) and the Triton launchers share these signatures; logits are
[B, L, V] with a contiguous last dimension, hidden is contiguous [B, L, D], numbers for rows are contiguous [B * L]:

    sample_tokens(logits, temperatures, temperature, top_k, top_p, suppress_tokens, end_token_ids, seeds, seed, steps,
        step, sequence_ids, positions) -> token, log_prob, entropy, margin, end_log_prob
    lm_head_sample(hidden, weight, bias, temperatures, temperature, suppress_tokens, end_token_ids, seeds, seed, steps,
        step, sequence_ids, positions) -> the same

temperatures (fp32), seeds, steps (int64, one number), sequence_ids and positions (int64) may be None: then temperature,
seed, step, b and l hold. suppress_tokens and end_token_ids are ascending int64, no id twice. Results are [B, L];
end_log_prob is an empty tensor where end_token_ids is None.
"""

import torch
from torch import Tensor

from fastdiff.ops._register import implementations, register_backends

_ARGUMENTS = (
    "Tensor? suppress_tokens, Tensor? end_token_ids, Tensor? seeds, int seed, Tensor? steps, int step,"
    " Tensor? sequence_ids, Tensor? positions) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# The same schemas are written in csrc/token_sampling_cpu.cpp; a test compares them.
SCHEMAS = {
    "sample_tokens": "(Tensor logits, Tensor? temperatures, float temperature, int top_k, float top_p, " + _ARGUMENTS,
    "lm_head_sample": "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? temperatures, float temperature, "
    + _ARGUMENTS,
}


def _results(like: Tensor, with_end: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = like.shape[:2]
    floats = [like.new_empty(rows if wanted else 0, dtype=torch.float32) for wanted in (True, True, True, with_end)]
    return (like.new_empty(rows, dtype=torch.int64), *floats)


def _fake_sample_tokens(
    logits, temperatures, temperature, top_k, top_p, suppress_tokens, end_token_ids, seeds, seed, steps, step,
    sequence_ids, positions,
):  # fmt: skip
    return _results(logits, end_token_ids is not None)


def _fake_lm_head_sample(
    hidden, weight, bias, temperatures, temperature, suppress_tokens, end_token_ids, seeds, seed, steps, step,
    sequence_ids, positions,
):  # fmt: skip
    return _results(hidden, end_token_ids is not None)


_FAKES = {"sample_tokens": _fake_sample_tokens, "lm_head_sample": _fake_lm_head_sample}
IMPLEMENTATIONS = implementations(SCHEMAS, _FAKES, "fastdiff.kernels.token_sampling.triton_kernels")
for _operator in SCHEMAS:
    register_backends(_operator)
