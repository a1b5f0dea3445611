"""AdamW with a moving average of the weights in one pass, and the norm of all gradients; not part of the public API.

The optimizer is that of Loshchilov and Hutter (2019); mathematics and bytes: kernels/adamw_ema/README.md.
"""

import torch

from fastdiff.backends import Backend, register
from fastdiff.ops import _native
from fastdiff.ops._register import register_fake

OPERATOR = "adamw_ema"
# The same schemas are written in csrc/adamw_ema_cpu.cpp; a test compares them.
SCHEMAS = {
    "gradient_norm": "(Tensor[] grads) -> Tensor",
    "adamw_ema_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor(e!)[] averages, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " float grad_scale, float average_weight) -> ()",
}


def _fake_norm(grads):
    return grads[0].new_empty(1)


def _fake_step(*_):
    return None


if _native.cpu_missing is None:  # without fastdiff._C the operators are not defined
    register_fake("fastdiff::gradient_norm", _fake_norm)
    register_fake("fastdiff::adamw_ema_", _fake_step)
    gradient_norm = torch.ops.fastdiff.gradient_norm.default  # float32 [1]
    adamw_ema_ = torch.ops.fastdiff.adamw_ema_.default
register(OPERATOR, "cpu", Backend(_native.cpu_missing, _native.refuses_cpu_float64))
