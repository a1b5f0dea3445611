"""What is AdaLN's own: rounding, accuracy far from zero, layouts, autocast, raw kernels, gradcheck."""

import numpy as np
import pytest
import torch

from fastdiff import use_backend
from fastdiff.kernels.adaln import reference
from fastdiff.ops import _native, adaln, gated_residual_adaln
from ops.harness import NATIVE, ROWS
from ops.properties import given, settings, st

rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_within_one_unit_in_the_last_place(row, dtype):
    x, shift, scale = (randn(2, 64, 384, dtype=dtype, seed=s) for s in range(3))
    with row.active():
        out = adaln(x.to(row.device), shift.to(row.device), scale.to(row.device)).cpu()
    exact = reference.adaln(x.double(), shift.double(), scale.double())
    largest_term = exact.abs().maximum(shift.double().abs())
    ulp = torch.finfo(dtype).eps * 2.0 ** largest_term.log2().floor()
    # Half a unit from the one rounding; the rest is fp32 arithmetic. Seen on every CPU instruction set:
    # 0.50000 (bf16), 0.50003 (fp16).
    assert ((out.double() - exact).abs() / ulp).max() <= 0.52


@rows
@pytest.mark.parametrize("offset", [1e2, 1e4, -1e4])
@pytest.mark.parametrize("dim", [384, 5120])
def test_rows_far_from_zero_stay_accurate(row, offset, dim):
    x = randn(1, 16, dim) + offset
    with row.active():
        out = adaln(x.to(row.device), None, None).cpu()
    exact = reference.adaln(x.double(), None, None)
    # The plain reference subtracts one rounded mean, whose error at 1e4 is 5e-4; the kernels correct it. Seen:
    # 1.3e-3 and 3.6e-6.
    assert (out.double() - exact).abs().max() <= (3e-3 if row.backend == "reference" else 8e-6)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_the_rounded_residual(row, dtype):
    residual, branch = randn(2, 9, 130, dtype=dtype).to(row.device), randn(2, 9, 130, seed=1).to(row.device)
    gate, shift, scale = (randn(2, 130, seed=s).to(row.device) for s in (2, 3, 4))
    with row.active():
        stream, out = gated_residual_adaln(residual, branch, gate, shift, scale)
        assert torch.equal(out, adaln(stream, shift, scale))
    exact = (residual.double() + gate.double()[:, None] * branch.double()).to(dtype)
    torch.testing.assert_close(stream, exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@native
def test_tanh_gate(row):
    args = [randn(2, 6, 32, seed=s).to(row.device) for s in (0, 1)] + [randn(2, 3, 32, seed=2).to(row.device)]
    with row.active():
        a = gated_residual_adaln(*args, None, None, gate_activation="tanh")
        b = gated_residual_adaln(*args[:2], args[2].tanh(), None, None)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def saturated(shape, seed=0):
    """A stream and branch in float16 of which many sums overflow, and two only just not: residual, branch, gate."""
    batch, _, dim = shape
    residual, branch = (randn(*shape, seed=seed + s) * 4e4 for s in (0, 1))
    residual[0, 0, 0], branch[0, 0, 0] = 65504, 8  # rounds to 65504: not clipped
    residual[0, 1, 0], branch[0, 1, 0] = -65504, -15.5
    gate = randn(batch, dim, seed=seed + 2)
    gate[0, 0] = 1
    return *(t.clamp(-65504, 65504).half() for t in (residual, branch)), gate


def plain_saturated(residual, branch, gate, weights):
    """What float16 blocks in public do, residual + gate · branch, clipped, with sums in float64: (stream, its norm,
    gradients of the stream times `weights`)."""
    leaves = [t.double().requires_grad_() for t in (residual, branch, gate)]
    total = leaves[0] + leaves[2][:, None] * leaves[1]
    rounded = total.half()
    stream = torch.where(rounded.isinf(), rounded.detach().clip(-65504, 65504), rounded)
    out = reference.adaln(stream.detach().double(), None, None)
    (stream * weights).sum().backward()
    return stream.detach(), out, [leaf.grad for leaf in leaves]


@rows
@pytest.mark.parametrize("dim", [24, 33])
def test_saturate_clips_a_float16_stream_as_public_blocks_do(row, dim):
    shape = (2, 5, dim)
    operands, weights = saturated(shape), randn(*shape, seed=3).half()
    stream, out, grads = plain_saturated(*operands, weights)
    assert 0.05 < (stream.abs() == 65504).float().mean() < 0.5
    leaves = [t.to(row.device, copy=True).requires_grad_() for t in operands]
    with row.active():
        result = gated_residual_adaln(*leaves, None, None, saturate=True)
        free = gated_residual_adaln(*leaves, None, None)
        got = torch.autograd.grad((result[0] * weights.to(row.device)).sum(), leaves, retain_graph=True)
        other = torch.autograd.grad((result[1] * weights.to(row.device) * 4096).sum(), leaves[0])[0].cpu()
        with torch.no_grad():
            alone = gated_residual_adaln(*leaves, None, None, saturate=True)
            sums, normed = torch.empty_like(leaves[0]), torch.empty_like(leaves[0])
            gated_residual_adaln(*leaves, None, None, saturate=True, residual_out=sums, out=normed)
    assert torch.equal(free[0].isinf().cpu(), (stream.abs() == 65504) & (free[0].cpu().abs() != 65504))
    torch.testing.assert_close(result[0].cpu(), stream, rtol=1e-3, atol=0)
    torch.testing.assert_close(result[1].cpu().double(), out, rtol=2e-3, atol=2e-3)
    for t in (alone, (sums, normed)):
        assert all(torch.equal(a, b) for a, b in zip(t, result, strict=True))
    for a, exact in zip(got, grads, strict=True):
        torch.testing.assert_close(a.cpu().double(), exact, rtol=2e-3, atol=2e-3 * exact.abs().max().item())
    clipped = free[0].isinf().cpu()
    assert not other[clipped].any() and other[~clipped].any()
    operands[0][0, 2, 0] = torch.nan
    with row.active():
        result = gated_residual_adaln(*(t.to(row.device) for t in operands), None, None, saturate=True)
    assert result[0].isnan().sum() == 1 and result[1][0, 2].isnan().all()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturate_leaves_other_dtypes_alone(row, dtype):
    x, gate = (randn(2, 5, 16) * 1e5).to(row.device, dtype), torch.ones(2, 16).to(row.device)
    with row.active():
        a, b = (gated_residual_adaln(x, x, gate, None, None, saturate=s) for s in (True, False))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True)) and a[0].abs().max() > 65504


@rows
def test_leading_shapes_and_layouts(row):
    x, shift = randn(2, 3, 4, 40).to(row.device), randn(2, 40).to(row.device)
    per_token = randn(2, 3, 4, 40, seed=2).to(row.device)
    with row.active():
        flat = adaln(x.view(2, 12, 40), shift, per_token.view(2, 12, 40))
        assert torch.equal(adaln(x, shift, per_token).view(2, 12, 40), flat)
        assert torch.equal(adaln(x[0, 0], None, None), adaln(x, None, None)[0, 0])
        turned = x.view(2, 12, 40).transpose(0, 1).contiguous().transpose(0, 1)
        assert not turned.is_contiguous() and torch.equal(adaln(turned, shift, per_token.view(2, 12, 40)), flat)
        for kind in ((2, 1, 1), (2, 3, 1), (1, 3, 1), (2, 3, 4)):  # of streams [B, T, S, D]
            m = randn(*kind, 40, seed=5).to(row.device).requires_grad_()
            everywhere = m.detach().expand(2, 3, 4, 40).contiguous().requires_grad_()
            results = [gated_residual_adaln(x, x, t, t, t) for t in (m, everywhere)]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            grad, exact = (
                torch.autograd.grad(r[1].square().sum(), t)[0] for r, t in zip(results, (m, everywhere), strict=True)
            )
            torch.testing.assert_close(grad, exact.sum_to_size(m.shape), rtol=1e-4, atol=1e-3)
        wide = randn(2, 12, 80).to(row.device)[..., ::2]
        assert torch.equal(adaln(wide, wide, None), adaln(wide.contiguous(), wide.contiguous(), None))


@native
def test_autocast_gives_the_autocast_dtype_and_keeps_the_residual(row):
    x, branch, m = (
        randn(2, 5, 48).to(row.device),
        randn(2, 5, 48).bfloat16().to(row.device),
        randn(2, 48).to(row.device),
    )
    with row.active(), torch.autocast(row.device, torch.bfloat16):
        assert adaln(x, m, m).dtype == torch.bfloat16
        stream, out = gated_residual_adaln(x, branch, m, m.bfloat16(), m.bfloat16())
    assert stream.dtype == torch.float32 and out.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradcheck_of_the_reference_and_of_the_scalar_kernel(backend, norm):
    def double(*shape, seed):
        return randn(*shape, dtype=torch.float64, seed=seed).requires_grad_(True)

    x, branch = double(2, 6, 5, seed=0), double(2, 6, 5, seed=1)
    gate, shift, scale = double(2, 3, 5, seed=2), double(1, 6, 5, seed=3), double(2, 5, seed=4)
    weight, bias = double(5, seed=5), double(5, seed=6)

    def gated(residual, branch, gate, shift, scale, weight, bias):
        return gated_residual_adaln(
            residual, branch, gate, shift, scale, weight=weight, bias=bias, norm=norm, gate_activation="tanh"
        )

    with use_backend(backend):
        assert torch.autograd.gradcheck(gated, (x, branch, gate, shift, scale, weight, bias))
        assert torch.autograd.gradcheck(lambda x, t, s: adaln(x, t, s, norm=norm), (x, shift, gate))


@native
def test_only_wanted_gradients_are_made(row):
    x, m = randn(2, 5, 16).to(row.device).requires_grad_(True), randn(2, 16).to(row.device)
    with row.active():
        (grad,) = torch.autograd.grad(adaln(x, m, m).sum(), x)
        stream, out = gated_residual_adaln(x, x * 2, m.requires_grad_(True), None, None)
        alone = torch.autograd.grad(stream.sum(), (x, m), retain_graph=True)  # the norm's output is not used
        other = torch.autograd.grad(out.square().sum(), (x, m))  # the stream is not used
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(alone[0], 1 + 2 * m.detach()[:, None].expand_as(x))
    assert all(torch.isfinite(t).all() for t in other)
    with row.active(), pytest.raises(RuntimeError, match="once_differentiable"):
        (first,) = torch.autograd.grad(adaln(x, m, m).square().sum(), x, create_graph=True)
        first.sum().backward()


@pytest.mark.skipif(_native.cpu_module is None, reason="NOT TESTED: fastdiff._C was not built")
@pytest.mark.parametrize("isa", _native.cpu_module.isa_names() if _native.cpu_module else [])
def test_raw_launch_functions_take_numpy_arrays_in_any_chunk_order(isa):
    generator = np.random.default_rng(0)
    x, branch = generator.standard_normal((2, 2, 6, 33), dtype=np.float32)
    gate, shift = generator.standard_normal((2, 2, 3, 33), dtype=np.float32)
    outs = []
    before = _native.cpu_module.isa()
    try:
        _native.cpu_module.choose_isa(isa)
        for backwards in (False, True):
            out, stream = np.full_like(x, np.nan), np.full_like(x, np.nan)
            _native.cpu_module.adaln_forward(
                x, out, branch=branch, gate=gate, residual_out=stream, shift=shift, backwards=backwards
            )
            outs.append((out, stream))
    finally:
        _native.cpu_module.choose_isa(before)
    assert all(np.array_equal(a, b) for a, b in zip(*outs, strict=True))
    exact = reference.gated_residual_adaln(*(torch.from_numpy(a).double() for a in (x, branch, gate, shift)), None)[1]
    np.testing.assert_allclose(outs[0][0], exact.numpy(), rtol=1e-5, atol=1e-5)


def test_offsets_beyond_two_to_the_31_elements():
    """4 GiB of which only the last rows are filled: untouched pages cost nothing to read."""
    dim, filled = 4096, 5
    tokens = 2**31 // dim + filled

    def untouched(size: int) -> torch.Tensor:  # NumPy's zeros are pages that exist only once they are written
        return torch.from_numpy(np.zeros(size, np.uint16)).view(torch.bfloat16)

    far = untouched(2**31 + 8 * dim)  # a modulation whose second frame lies beyond 2^31
    scale = far.as_strided((1, 2, dim), (far.numel(), 2**31, 1))
    scale[:, 1] = randn(1, dim, seed=2).bfloat16()
    x, out = (untouched(tokens * dim).view(1, tokens, dim) for _ in range(2))
    x[:, -filled:] = randn(1, filled, dim, seed=1).bfloat16()
    with torch.no_grad():
        last_four = x[:, -4:].contiguous()
        assert torch.equal(adaln(last_four, None, scale)[:, 2:], adaln(x[:, -2:].contiguous(), None, scale[:, 1]))
        adaln(x, None, None, out=out)
        assert torch.equal(out[:, -filled:], adaln(x[:, -filled:].contiguous(), None, None))


@pytest.mark.parametrize("row", [r for r in NATIVE if r.backend == "cpu"], ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_that_bypass_the_caches_are_the_same(row, dtype):
    dim, tokens = 1024, (48 << 20) // (1024 * dtype.itemsize) + 3
    block = randn(1, 97, dim, dtype=dtype)
    x, shift = block.repeat(1, tokens // 97 + 1, 1)[:, :tokens].contiguous(), randn(1, dim, seed=1)
    with row.active(), torch.no_grad():
        large, small = adaln(x, shift, None), adaln(block, shift, None)
    assert all(torch.equal(part, small[:, : part.shape[1]]) for part in large.split(97, dim=1))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    frames=st.integers(1, 4),
    per_frame=st.integers(1, 5),
    dim=st.integers(1, 70),
    seed=st.integers(0, 99),
    norm=st.sampled_from(["layer", "rms"]),
    row=st.sampled_from([r for r in NATIVE if r.backend == "cpu"]),
)
def test_any_shape_equals_the_reference(batch, frames, per_frame, dim, seed, norm, row):
    x = randn(batch, frames * per_frame, dim, seed=seed)
    shift, scale = randn(batch, frames, dim, seed=seed + 1), randn(1, frames * per_frame, dim, seed=seed + 2)
    with row.active():
        out = adaln(x, shift, scale, norm=norm, eps=1e-3)
    exact = reference.adaln(x.double(), shift.double(), scale.double(), norm=norm, eps=1e-3)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), factor=st.floats(0.5, 50), offset=st.floats(-10, 10))
def test_layer_norm_does_not_see_scale_and_offset_of_a_row(seed, factor, offset):
    x = randn(1, 4, 64, seed=seed)
    torch.testing.assert_close(
        adaln(x * factor + offset, None, None, eps=0.0), adaln(x, None, None, eps=0.0), rtol=1e-3, atol=1e-3
    )
