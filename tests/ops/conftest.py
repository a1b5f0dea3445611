import pytest
import torch


@pytest.fixture(autouse=True)
def poison_torch_empty():
    """torch.empty gives NaN, for what is allocated from Python; native allocations: FASTDIFF_POISON_EMPTY."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
