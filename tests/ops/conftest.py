import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":  # the harness's Triton row: as a GPU rounds and multiplies
    from ops.triton_interpreter import mend_bf16_products, mend_bf16_rounding

    mend_bf16_rounding()
    mend_bf16_products()


@pytest.fixture(autouse=True)
def poison_torch_empty():
    """torch.empty gives NaN, for what is allocated from Python; native allocations: FASTDIFF_POISON_EMPTY."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
