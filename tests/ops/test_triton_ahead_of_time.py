"""The Triton kernels compiled ahead of time: what tools/triton_aot.py rests on. All targets: `make kernels`."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels: triton is not installed (the extra 'triton')")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("NOT TESTED: TRITON_INTERPRET is set, so nothing can be compiled", allow_module_level=True)
sys.path.append(str(Path(__file__).parents[2] / "tools"))
import triton_aot as aot  # noqa: E402  (its folder must be on the path first)

AUTOCAST = (aot.F32, aot.BF16, aot.BF16)


def test_every_kernel_is_among_the_variants():
    from fastdiff.kernels.adaln import triton_device as adaln
    from fastdiff.kernels.bias_activation import triton_device as bias_activation
    from fastdiff.kernels.eos_log_prob import triton_device as eos
    from fastdiff.kernels.masked_linear_cross_entropy import triton_device as loss
    from fastdiff.kernels.qgfd import triton_backward_device as qgfd_backward
    from fastdiff.kernels.qgfd import triton_device as qgfd
    from fastdiff.kernels.scale_shift import triton_kernels as scale_shift
    from fastdiff.kernels.token_sampling import triton_device as sampling
    from fastdiff.kernels.token_sampling import triton_threshold_device as threshold
    from fastdiff.kernels.unmask import triton_device as unmask

    modules = (adaln, sampling, threshold, unmask, loss, eos, qgfd, qgfd_backward, scale_shift, bias_activation)
    kernels = {(module.__name__, name) for module in modules for name in vars(module) if name.endswith("_kernel")}
    found = {(variant.module, variant.kernel) for variant in aot.labelled_variants()}
    assert found == kernels and len(kernels) == 28


@pytest.mark.parametrize("affine", [False, True])
def test_another_resolution_compiles_nothing_new(affine):
    case = aot.Case(1152, AUTOCAST, affine=affine)
    first = set(aot.adaln_variants(case, tokens=256))
    assert all(set(aot.adaln_variants(case, tokens=tokens)) == first for tokens in (81, 100, 1023))


@pytest.mark.parametrize("vocab", [50257, 126464])
@pytest.mark.parametrize("full", [False, True])
def test_another_batch_or_length_compiles_nothing_new(vocab, full):
    case = aot.SamplingCase(vocab, aot.BF16, 0.7, (50, 0.9), full)
    first = set(aot.sampling_variants(case, length=64))
    assert all(set(aot.sampling_variants(case, length=length)) == first for length in (1, 7, 100, 1023))
    first = set(aot.unmask_variants(2, 0, full, length=256))
    assert all(set(aot.unmask_variants(2, 0, full, length=length)) == first for length in (1, 81, 1023, 8192))
    first = set(aot.cross_entropy_variants(vocab, aot.BF16, full, True, rows=1024))
    assert all(set(aot.cross_entropy_variants(vocab, aot.BF16, full, True, rows=rows)) == first for rows in (1, 5, 999))
    first = set(aot.eos_log_prob_variants(vocab, aot.BF16, length=64))
    assert all(set(aot.eos_log_prob_variants(vocab, aot.BF16, length=length)) == first for length in (1, 7, 1023))
    first = set(aot.scale_shift_variants(1152, aot.BF16, tokens=64))
    assert all(set(aot.scale_shift_variants(1152, aot.BF16, tokens=tokens)) == first for tokens in (1, 7, 1023))
    first = set(aot.bias_activation_variants(3072, aot.BF16, 1, full, rows=64))
    assert all(set(aot.bias_activation_variants(3072, aot.BF16, 1, full, rows=r)) == first for r in (1, 7, 1023))


@pytest.mark.parametrize("masks", ["", "begin end", "keys"])
def test_another_length_or_number_of_hops_compiles_nothing_new(masks):
    case = aot.AttentionCase(64, aot.BF16, masks)
    first = set(aot.attention_variants(case))
    assert all(
        set(aot.attention_variants(case, length, heads)) == first for length, heads in ((1, 8), (7, 1), (999, 5))
    )
    assert set(aot.attention_variants(aot.AttentionCase(64, aot.BF16, masks, hops=5))) == first


def test_another_seed_or_temperature_compiles_nothing_new():
    def variants(temperature, top_k, seed):
        logits = aot.meta(2, 64, 50257, dtype=aot.BF16)
        with aot.recorded_launches() as found:
            aot.sampling_kernels.sample_tokens(
                logits, None, temperature, top_k, 0.9, None, None, None, seed, None, 1, None, None
            )
        return set(found)

    assert variants(0.7, 50, 0) == variants(0.3, 1, 2**63 - 1) == variants(2.5, 16, -1)


def some_variants() -> list[aot.Variant]:
    sampling = aot.sampling_variants(aot.SamplingCase(126464, aot.BF16, 0.7, (50, 0.9), full=True))
    others = aot.unmask_variants(2, 3, full=True) + aot.cross_entropy_variants(50257, aot.F32, True, True)
    others += aot.eos_log_prob_variants(126464, aot.BF16) + aot.attention_variants(aot.AttentionCase(64, aot.BF16))
    others += aot.scale_shift_variants(1152, aot.BF16) + aot.bias_activation_variants(3072, aot.BF16, 0, True)
    return aot.adaln_variants(aot.Case(1152, AUTOCAST)) + sampling + others


@pytest.mark.parametrize(
    ("arch", "half"),
    [(87, 0), (120, 1), *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in ((87, 1), (120, 0)))],
)
def test_kernels_compile_without_a_spill(arch, half):
    """Each kernel for one of the two; the others are `exhaustive`."""
    for variant in some_variants()[half::2]:
        row = aot.compile_variant(variant, variant.kernel, arch)
        assert row["spill_bytes"] == 0 and row["registers"] * row["threads"] <= 65536, row
        assert row["shared_bytes"] <= 99 * 1024
