"""The Triton kernels compiled ahead of time: what tools/triton_aot.py rests on. All targets: `make kernels`."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)
sys.path.append(str(Path(__file__).parents[2] / "tools"))
import triton_aot as aot  # noqa: E402  (its folder must be on the path first)

AUTOCAST = (aot.F32, aot.BF16, aot.BF16)


def test_every_kernel_is_among_the_cases():
    from fastdiff.kernels.adaln import triton_device

    kernels = {name for name in vars(triton_device) if name.endswith("_kernel")}
    found = {variant.kernel for case in aot.adaln_cases() for variant in aot.adaln_variants(case)}
    assert found == kernels and len(kernels) == 6


@pytest.mark.parametrize("affine", [False, True])
def test_another_resolution_compiles_nothing_new(affine):
    case = aot.Case(1152, AUTOCAST, affine=affine)
    first = set(aot.adaln_variants(case, tokens=256))
    assert all(set(aot.adaln_variants(case, tokens=tokens)) == first for tokens in (81, 100, 1023))


@pytest.mark.parametrize("arch", [87, 120])
def test_kernels_compile_without_a_spill(arch):
    for variant in aot.adaln_variants(aot.Case(1152, AUTOCAST)):
        row = aot.compile_variant(variant, variant.kernel, arch)
        assert row["spill_bytes"] == 0 and row["registers"] * row["threads"] <= 65536, row
        assert row["shared_bytes"] <= 99 * 1024
