"""The Triton launch functions of AdaLN against the fp64 reference, in Triton's interpreter.

Run by test_triton_interpreted.py in a process with TRITON_INTERPRET=1; by hand:
TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_adaln.py
"""

import pytest
import torch
from torch import Tensor

from fastdiff.kernels.adaln import reference
from fastdiff.kernels.adaln import triton_kernels as kernels
from ops.triton_interpreter import programs, shuffled

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Errors are ratios of norms; the largest seen: 1.4e-7 (fp32), 3.8e-3 (bf16, six elements), 2.7e-4 (fp16).
TOLERANCE = {F32: 5e-7, BF16: 5e-3, F16: 7e-4}
UNITS = {"D": lambda b, n: (), "1D": lambda b, n: (1,), "BD": lambda b, n: (b,), "1ND": lambda b, n: (1, n)}
UNITS |= {"BND": lambda b, n: (b, n)} | {f"BFD{f}": lambda b, n, f=f: (b, f) for f in (1, 2, 3, 4)}


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Tiles so narrow that small rows take the code of rows wider than a tile."""
    for name in ("MIN_BLOCK", "FORWARD_MAX_BLOCK", "FORWARD_TILE", "BACKWARD_MAX_BLOCK", "BACKWARD_TILE"):
        monkeypatch.setattr(kernels, name, 16)
    monkeypatch.setattr(kernels, "BACKWARD_UNALIGNED_BLOCK", 16)


def make(shape, kinds="BD BD BD", dtypes=(F32, F32, F32), affine=False, rms=False, chunk=False, offset=0.0, seed=0):
    """Operands by name, for a stream [B, N, D], kinds of (gate, shift, scale), dtypes of (stream, others, out)."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, dim = shape

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def modulation(kind: str) -> Tensor | None:
        if kind == "-":
            return None
        lead = UNITS[kind](batch, tokens)
        m = randn(*lead, dim * (3 if chunk else 1)).to(dtypes[1])
        return m.chunk(3, -1)[1] if chunk else m

    gate, shift, scale = (modulation(kind) for kind in kinds.split())
    weight, bias = (randn(dim) + 1, randn(dim)) if affine else (None, None)
    residual, branch = (randn(*shape) + offset).to(dtypes[0]), randn(*shape).to(dtypes[1])
    grads = randn(*shape).to(dtypes[2]), randn(*shape).to(dtypes[0])
    operands = {"residual": residual, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    return operands | {"weight": weight, "bias": bias}, grads, rms, dtypes[2]


def run(operands, grads, rms, out_dtype, need=(True, True)) -> dict[str, Tensor]:
    """Forward and backward through the launch functions; gated where there is a gate."""
    o = operands
    common = (o["shift"], o["scale"], o["weight"], o["bias"], rms)
    if o["gate"] is None:
        out, mean, rstd = kernels.adaln_forward_stats(o["residual"], *common, 1e-6, out_dtype)
        results = kernels.adaln_backward(grads[0], o["residual"], mean, rstd, *common, *need)
        names, outputs = ("residual", "shift", "scale", "weight", "bias"), {"out": out}
    else:
        gated = (o["branch"], o["gate"])
        stream, out, mean, rstd = kernels.gated_residual_adaln_forward_stats(
            o["residual"], *gated, *common, 1e-6, out_dtype, False
        )
        operands = (stream, mean, rstd, *gated, *common)
        results = kernels.gated_residual_adaln_backward(*grads, *operands, *need, None)
        names = ("residual", "branch", "gate", "shift", "scale", "weight", "bias")
        outputs = {"stream": stream, "out": out}
    assert len(results) == len(names)
    return outputs | {f"grad_{name}": grad for name, grad in zip(names, results, strict=True)}


def exact(operands, grads, rms, out_dtype) -> dict[str, Tensor]:
    """The same by the reference in fp64."""
    o = {k: None if v is None else v.double().requires_grad_() for k, v in operands.items()}
    options = {"weight": o["weight"], "bias": o["bias"], "norm": "rms" if rms else "layer", "eps": 1e-6}
    if o["gate"] is None:
        outputs = {"out": reference.adaln(o["residual"], o["shift"], o["scale"], **options)}
    else:
        main = (o[name] for name in ("residual", "branch", "gate", "shift", "scale"))
        outputs = dict(zip(("stream", "out"), reference.gated_residual_adaln(*main, **options), strict=True))
    leaves = {k: v for k, v in o.items() if v is not None and (k != "branch" or o["gate"] is not None)}
    cotangents = [grads[0 if name == "out" else 1].double() for name in outputs]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return outputs | {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}


def fold(grad: Tensor, like: Tensor) -> Tensor:
    """A [B, F*, D] gradient summed to its operand's shape, as fastdiff.ops does."""
    if grad.ndim == 1 or grad.shape == like.shape:
        return grad.double()
    batch, frames, dim = grad.shape
    own = like.shape[1] if like.ndim == 3 else 1
    grad = grad.double().reshape(batch, own, frames // own, dim).sum(2)
    if like.ndim == 1 or like.shape[0] == 1:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(like.shape)


def check(operands, grads, rms, out_dtype, factor=1.0) -> dict[str, Tensor]:
    found = run(operands, grads, rms, out_dtype)
    dtypes = {v.dtype for v in operands.values() if v is not None} | {out_dtype}
    tolerance = factor * max(TOLERANCE[dtype] for dtype in dtypes)
    for name, truth in exact(operands, grads, rms, out_dtype).items():
        value = found[name]
        if name.startswith("grad_"):
            value = fold(value, operands[name.removeprefix("grad_")])
        assert torch.isfinite(value).all(), name
        error = (value.double() - truth).norm() / truth.norm()
        assert error <= tolerance, f"{name}: {error:.3g}"
    return found


MIXES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, BF16, BF16), (BF16, F32, BF16), (F16, BF16, F32)]


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("gate", ["BD", "-"], ids=["gated", "plain"])
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_dtypes(dtypes, gate, rms):
    check(*make((2, 12, 72), f"{gate} BFD3 BD", dtypes, affine=True, rms=rms))


KINDS = ["D D D", "1D 1D 1D", "BFD2 BFD3 BFD4", "BND BND BND", "1ND 1ND 1ND", "BD 1ND D", "BD - -", "- - -"]
KINDS += ["BD BD -", "- - BD", "BFD1 BND BFD2"]


@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
@pytest.mark.parametrize("kinds", KINDS)
def test_modulation_shapes(kinds, affine):
    check(*make((2, 12, 24), kinds, affine=affine, chunk=affine))


@pytest.mark.parametrize("dim", [2, 7, 384, 1152, 3072])
def test_widths(dim):
    check(*make((1, 3, dim), dtypes=(F32, BF16, BF16)))


@pytest.mark.parametrize("dim", [5120, 9001])
def test_widths_beyond_a_tile(dim):
    check(*make((1, 2, dim), affine=True))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dim", [40, 48])
def test_rows_in_tiles(narrow_tiles, dim, rms):
    check(*make((2, 2, dim), "BD BFD2 BND", (F32, BF16, BF16), affine=True, rms=rms, chunk=True))
    check(*make((1, 3, dim), "- BD BD", rms=rms))


@pytest.mark.parametrize("tokens", [1, 5, 150])
def test_segments(tokens):
    """Frames of one segment, of a part of one, and of many with a rest."""
    check(*make((2, tokens, 24), affine=True))


def test_rows_far_from_zero_stay_accurate(narrow_tiles):
    # 1e4 + randn in fp32 has steps of 1e-3; what matters is that the variance and the mean lose nothing more.
    # Seen: 8e-8 for the forward pass, 4.3e-4 for gradients (the saved mean is rounded to fp32).
    for dim in (40, 16):
        operands, grads, rms, dtype = make((1, 4, dim), "- BD BD", offset=1e4)
        truth = exact(operands, grads, rms, dtype)
        found = run(operands, grads, rms, dtype)
        assert (found["out"] - truth["out"]).norm() <= 1e-6 * truth["out"].norm()
        assert (found["grad_residual"] - truth["grad_residual"]).norm() <= 1e-3 * truth["grad_residual"].norm()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_one_rounding_to_nearest_even_at_the_store(dtype):
    operands, grads, rms, _ = make((2, 8, 96), dtypes=(F32, dtype, dtype), affine=True)
    wide, narrow = run(operands, grads, rms, F32), run(operands, grads, rms, dtype)
    assert torch.equal(narrow["out"], wide["out"].to(dtype))
    stream = operands["residual"] + operands["gate"].float()[:, None] * operands["branch"].float()
    torch.testing.assert_close(wide["stream"], stream, rtol=3e-7, atol=3e-7)


def test_statistics_are_those_of_the_rounded_residual():
    operands, grads, _, dtype = make((2, 8, 96), dtypes=(BF16, F32, BF16))
    o = operands
    stream, out, mean, rstd = kernels.gated_residual_adaln_forward_stats(*o.values(), False, 1e-6, dtype, False)
    torch.testing.assert_close(mean, stream.float().mean(-1).flatten(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd, 1 / stream.float().var(-1, correction=0).flatten().sqrt(), rtol=1e-5, atol=1e-6)
    again = kernels.adaln_forward(stream, o["shift"], o["scale"], None, None, False, 1e-6, dtype)
    assert torch.equal(out, again), "the gated operator is the plain one on its first output"


def test_variants_of_the_forward_pass_are_equal():
    (o, _, rms, dtype) = make((2, 5, 40), dtypes=(F32, BF16, BF16))
    gated = (*o.values(), rms, 1e-6, dtype, False)
    plain = (o["residual"], *gated[3:-1])
    residual_out, out = torch.empty_like(o["residual"]), torch.empty_like(o["residual"], dtype=dtype)
    kernels.adaln_forward_out(*plain, out)
    assert torch.equal(out, kernels.adaln_forward(*plain))
    assert torch.equal(out, kernels.adaln_forward_stats(*plain)[0])
    wanted = kernels.gated_residual_adaln_forward(*gated)
    kernels.gated_residual_adaln_forward_out(*gated, residual_out, out)
    for value, truth in zip((residual_out, out), wanted, strict=True):
        assert torch.equal(value, truth)
    in_place = o["residual"].clone()
    kernels.gated_residual_adaln_forward_out(in_place, *gated[1:], in_place, out)
    assert torch.equal(in_place, wanted[0]) and torch.equal(out, wanted[1])


@pytest.mark.parametrize("kinds", ["BD BD BD", "BND BFD2 BD", "- 1D 1ND"])
def test_results_do_not_depend_on_the_order_of_programs(kinds):
    case = make((2, 10, 24), kinds, (F32, BF16, BF16), affine=True)
    first = run(*case)
    with programs(shuffled(seed=1)):
        other = run(*case)
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_what_is_not_needed_is_empty():
    case = make((2, 4, 24), affine=True)
    found = run(*case, need=(False, False))
    full = run(*case)
    for name, value in found.items():
        if name in ("grad_gate", "grad_shift", "grad_scale", "grad_weight", "grad_bias"):
            assert value.numel() == 0
        else:
            assert torch.equal(value, full[name])
    only_affine = run(*case, need=(False, True))
    assert only_affine["grad_shift"].numel() == 0 and torch.equal(only_affine["grad_weight"], full["grad_weight"])
    absent = run(*make((2, 4, 24), "BD - BD"))
    assert absent["grad_shift"].numel() == absent["grad_weight"].numel() == absent["grad_bias"].numel() == 0


def test_dtypes_and_shapes_of_modulation_gradients():
    found = run(*make((2, 12, 24), "BD BFD2 BFD3", (F32, BF16, BF16)))
    for name in ("grad_gate", "grad_shift", "grad_scale"):
        assert found[name].shape == (2, 6, 24) and found[name].dtype == F32, "a sum is still to be made"
    found = run(*make((2, 12, 24), "BD 1D BFD2", (F32, BF16, BF16)))
    assert (found["grad_gate"].dtype, found["grad_shift"].dtype, found["grad_scale"].dtype) == (F32, F32, BF16)
    found = run(*make((2, 12, 24), "BD 1D BD", (F32, BF16, BF16)))
    assert (found["grad_gate"].dtype, found["grad_shift"].dtype) == (BF16, F32)
    assert found["grad_gate"].shape == (2, 1, 24)


@pytest.mark.parametrize("shape", [(0, 4, 24), (2, 0, 24)])
def test_no_rows(shape):
    found = run(*make(shape, "BD 1D BD", affine=True))
    assert found["out"].shape == shape and found["grad_branch"].shape == shape
    for name in ("grad_gate", "grad_scale", "grad_weight", "grad_bias"):
        assert found[name].shape[-1] == 24 and not found[name].any()


def test_too_many_rows_is_an_error():
    x = torch.empty(2, 2**30, 1, device="meta")
    with pytest.raises(ValueError, match="x: 2147483648 rows"):
        kernels.adaln_forward(x, None, None, None, None, False, 1e-6, None)


@pytest.fixture
def untouched(monkeypatch):
    """torch.empty leaves memory as it is, so that gigabytes of it cost nothing."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def test_rows_beyond_2_to_31_elements(untouched):
    """The last program alone, on tensors of 4 GB of which nothing else is touched."""
    rows, dim = 2**21 + 8, 1024
    x, out = torch.empty(1, rows, dim, dtype=BF16), torch.empty(1, rows, dim, dtype=BF16)
    x[0, -1] = torch.randn(dim, generator=torch.Generator().manual_seed(0))
    with programs(lambda grid: [(grid[0] - 1, 0, 0)]):
        kernels.adaln_forward_out(x, None, None, None, None, False, 1e-6, None, out)
    truth = reference.adaln(x[:, -1:].double(), None, None)
    assert (out[:, -1:].double() - truth).norm() <= TOLERANCE[BF16] * truth.norm()


def test_modulation_strides_beyond_2_to_31_elements(untouched):
    dim, stride = 64, 2**31 + 64
    scale = torch.empty(stride + dim, dtype=BF16).as_strided((2, dim), (stride, 1))
    scale.copy_(torch.randn(2, dim, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(1))
    with programs(lambda grid: [(i, 0, 0) for i in range(grid[0])]):
        out = kernels.adaln_forward(x, None, scale, None, None, False, 1e-6, None)
    truth = reference.adaln(x.double(), None, scale.double())
    assert (out - truth).norm() <= TOLERANCE[F32] * truth.norm()


def test_the_memory_check_sees_a_short_operand():
    operands, *_ = make((2, 4, 40))
    short = operands["shift"].flatten()[:-1].as_strided((1, 40), (40, 1))
    kernels.adaln_forward(operands["residual"], short, None, None, None, False, 1e-6, None)
    lying = short[:, :39]
    with pytest.raises(Exception, match="out of bounds"):
        kernels.adaln_forward(operands["residual"], lying, None, None, None, False, 1e-6, None)


@pytest.mark.parametrize("need", [(True, True), (False, False)])
@pytest.mark.parametrize("dim", [24, 33])
def test_a_saturated_stream_and_its_gradient(dim, need, narrow_tiles):
    operands, (grad_out, grad_stream), rms, _ = make((2, 3, dim), "BD - -", (F16, F32, F16))
    residual, branch, gate = (operands[name] for name in ("residual", "branch", "gate"))
    residual, branch = (residual * 4e4).clamp(-65504, 65504), branch * 4e4
    residual[0, 0, 0] = torch.nan
    total = residual.double() + gate.double()[:, None] * branch.double()
    clipped = total.half().isinf()
    common = (None, None, None, None, rms)
    stream, _, mean, rstd = kernels.gated_residual_adaln_forward_stats(residual, branch, gate, *common, 1e-6, F16, True)
    assert 0.05 < clipped.float().mean() < 0.6 and stream.isnan().sum() == 1
    assert torch.equal(stream[clipped], total.half().clip(-65504, 65504)[clipped])
    grads = kernels.gated_residual_adaln_backward(
        torch.zeros_like(grad_out), grad_stream, stream, mean, rstd, branch, gate, *common, *need, residual
    )
    passed = torch.where(clipped, 0.0, grad_stream.double())
    assert torch.equal(grads[0][1].double(), passed[1]) and not grads[0][clipped].any()
    torch.testing.assert_close(grads[1][1].double(), (passed * gate.double()[:, None])[1], rtol=1e-5, atol=1e-5)
    if need[0]:
        torch.testing.assert_close(grads[2][1, 0].double(), (passed * branch.double())[1].sum(0), rtol=1e-4, atol=1.0)
