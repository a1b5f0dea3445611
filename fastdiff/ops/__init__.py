"""fastdiff's operators: each one public function with a reference, CPU, CUDA and Triton backend."""

from fastdiff.ops.adaln import adaln, gated_residual_adaln
from fastdiff.ops.unmask import unmask_

__all__ = ["adaln", "gated_residual_adaln", "unmask_"]
