import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:  # as a GPU rounds and multiplies
    from ops.triton_interpreter import checked_memory, mend_bf16_products, mend_bf16_rounding, mend_indices

    mend_bf16_rounding()
    mend_bf16_products()
    mend_indices()

    @pytest.fixture(autouse=True)
    def bounds(request):
        """The launch functions' memory accesses are checked; the harness's tensors lie anywhere."""
        if request.path.name.startswith("interpreted_"):
            with checked_memory():
                yield
        else:
            yield


def pytest_pycollect_makemodule(module_path):
    if module_path.name.startswith("interpreted_") and not INTERPRETED:
        raise pytest.Collector.CollectError(
            f"{module_path.name} needs TRITON_INTERPRET=1: run test_triton_interpreted.py"
        )


@pytest.fixture(autouse=True)
def poison_torch_empty():
    """torch.empty gives NaN, for what is allocated from Python; native allocations: FASTDIFF_POISON_EMPTY."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
