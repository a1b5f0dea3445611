"""unmask_'s backends as seen from Python: the native operator, its fake kernel, and the Triton launcher.

    unmask_(token_ids, token, log_prob, entropy, margin, rows, block_start, block_end, active, rule, order, values,
        value, mask_token_id, seeds, seed, steps, step, sequence_ids) -> committed

token_ids is int64 [B, L] with a contiguous last dimension, changed in place; token (int64), log_prob, entropy and
margin (float32) are contiguous, [B, L], or [R] where rows is given; values is float32 [B], or None for `value`; rule
and order are the numbers of UnmaskRule and UnmaskOrder in kernels/unmask/unmask.h; seeds and steps have
one element, or are None for `seed` and `step`; the rest is int64 [B], active bool [B], or None.
"""

from fastdiff.ops._register import implementations, register_backends

# The same schema is written in csrc/unmask.h; a test compares them.
SCHEMAS = {
    "unmask_": "(Tensor(a!) token_ids, Tensor token, Tensor log_prob, Tensor entropy, Tensor margin, Tensor? rows, "
    "Tensor? block_start, Tensor? block_end, Tensor? active, int rule, int order, Tensor? values, float value, "
    "int mask_token_id, Tensor? seeds, int seed, Tensor? steps, int step, Tensor? sequence_ids) -> Tensor"
}


def _fake(token_ids, *args):
    return token_ids.new_empty(token_ids.shape[0])


IMPLEMENTATIONS = implementations(SCHEMAS, {"unmask_": _fake}, "fastdiff.kernels.unmask.triton_kernels")
register_backends("unmask_")
