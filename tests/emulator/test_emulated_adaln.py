"""The CUDA kernels of AdaLN, executed on the CPU, against the reference in float64.

Every case runs under three schedules of threads and blocks, which must agree to the bit. Errors are ratios of norms;
the bounds are two to four times what was seen on x86-64 with gcc 12 (in the comments).
"""

import pytest
import torch
from torch import Tensor

from emulator import SCHEDULES, Emulator
from fastdiff.kernels.adaln import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# forward, and gradients of rows: one rounding at the store dominates; seen 1.7e-7, 2.1e-3, 2.6e-4
ROUNDING = {F32: 5e-7, BF16: 5e-3, F16: 6e-4}
SUMS = 5e-7  # gradients summed over tokens in fp32; seen 1.8e-7


def relative(a: Tensor, b: Tensor) -> float:
    assert not a.isnan().any(), "an element was not written, or came from uninitialised shared memory"
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-3)).item()


def seeded(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, repr(parts))))


def randn(g: torch.Generator, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def under_schedules(emulator: Emulator, run) -> dict[str, Tensor]:
    """The outputs of `run`, which must be the same under every schedule."""
    results = []
    for schedule in SCHEDULES:
        emulator.configure(schedule)
        results.append(run())
    for other in results[1:]:
        for name, t in results[0].items():
            same = t is None or torch.equal(t.view(torch.uint8), other[name].view(torch.uint8))
            assert same, f"{name} depends on the order in which threads and blocks run"
    return results[0]


def modulations(g: torch.Generator, kind: str, batch: int, tokens: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """gate, shift, scale of one shape; the chunks are strided views of one projection."""
    shapes = {
        "D": (dim,), "1D": (1, dim), "BD": (batch, dim), "BFD": (batch, tokens // 2, dim), "BND": (batch, tokens, dim),
        "1ND": (1, tokens, dim), "BD chunks": (batch, dim), "BFD chunks": (batch, tokens // 2, dim),
        "BND chunks": (batch, tokens, dim),
    }  # fmt: skip
    shape = shapes[kind]
    if not kind.endswith("chunks"):
        return [randn(g, *shape, dtype=dtype) for _ in range(3)]
    return list(randn(g, *shape[:-1], 6 * dim, dtype=dtype).chunk(6, dim=-1)[1:4])


def summed_like(grad: Tensor, leaf: Tensor) -> Tensor:
    """The kernel's gradient [B, frames, D], summed to a modulation of shape [D], [1 or B, D] or [1 or B, F, D]."""
    batch, frames, dim = {1: (1, 1), 2: (leaf.shape[0], 1), 3: leaf.shape[:2]}[leaf.ndim] + leaf.shape[-1:]
    if frames > 1 and grad.shape[1] > frames:
        grad = grad.double().unflatten(1, (frames, -1)).sum(2)
    return grad.double().sum_to_size(batch, frames, dim).reshape(leaf.shape)


def check_forward(emulator: Emulator, x, shift, scale, branch=None, gate=None, out_dtype=None, **keywords) -> dict:
    f = under_schedules(
        emulator,
        lambda: emulator.forward(x, shift, scale, branch=branch, gate=gate, out_dtype=out_dtype, **keywords),
    )
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    m = [None if t is None else t.double() for t in (shift, scale)]
    normalised = x
    if branch is not None:
        residual, _ = reference.gated_residual_adaln(x.double(), branch.double(), gate.double(), *m, **double)
        assert relative(f["residual_out"], residual) < ROUNDING[x.dtype]
        normalised = f["residual_out"]  # the statistics are those of the stored, rounded residual
    expected = reference.adaln(normalised.double(), *m, **double)
    assert relative(f["out"], expected) < ROUNDING[f["out"].dtype]
    return f


def check_backward(emulator: Emulator, f, x, shift, scale, branch=None, gate=None, *, frames, g, **keywords) -> None:
    gated = branch is not None
    inputs = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    inputs |= {k: keywords.get(k) for k in ("weight", "bias")}
    wanted = tuple(k for k in ("gate", "shift", "scale", "weight", "bias") if inputs[k] is not None)
    grad_out = randn(g, *x.shape, dtype=f["out"].dtype)
    grad_residual = randn(g, *x.shape, dtype=x.dtype) if gated else None
    normalised = f["residual_out"] if gated else x
    operands = {k: inputs[k] for k in ("branch", "gate", "scale", "weight", "bias")}
    grads = under_schedules(
        emulator,
        lambda: emulator.backward(
            grad_out, normalised, f, wanted=wanted, grad_residual_out=grad_residual, frames=frames,
            norm=keywords.get("norm", "layer"), rows_per_segment=2, **operands,
        ),
    )  # fmt: skip
    leaves = {k: v.double().requires_grad_() for k, v in inputs.items() if v is not None}
    vectors = {k: leaves.get(k) for k in ("weight", "bias")}
    settings = vectors | {k: v for k, v in keywords.items() if k in ("norm", "eps")}
    shift, scale = leaves.get("shift"), leaves.get("scale")
    if gated:
        # the kernel differentiates at the rounded residual; so does this, through a shift that autograd does not see
        residual = leaves["x"] + reference._rows(leaves["gate"], leaves["x"]) * leaves["branch"]
        residual = residual + (normalised.double() - residual).detach()
        out = reference.adaln(residual, shift, scale, **settings)
        torch.autograd.backward((residual, out), (grad_residual.double(), grad_out.double()))
    else:
        reference.adaln(leaves["x"], shift, scale, **settings).backward(grad_out.double())
    for name, leaf in leaves.items():
        got = grads[name]
        if name in ("gate", "shift", "scale"):
            got = summed_like(got, leaf)
        bound = ROUNDING[got.dtype] if name in ("x", "branch") else SUMS
        assert relative(got, leaf.grad) < bound, name


def frames_of(kind: str, tokens: int) -> int:
    return {"BFD": tokens // 2, "BND": tokens, "1ND": tokens}.get(kind.removesuffix(" chunks"), 1)


# 8192 is the longest row held in registers; 8200 and 4099 are streamed, with and without vectors.
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [1, 7, 64, 384, 768, 1152, 3072, 5120, 8192, 8200, 4099])
def test_widths(emulator, dim, dtype, norm):
    g = seeded(dim, dtype)
    batch, tokens = (2, 5) if dim <= 384 else (1, 3)
    x, branch = randn(g, batch, tokens, dim, dtype=dtype), randn(g, batch, tokens, dim, dtype=dtype)
    gate, shift, scale = modulations(g, "BD", batch, tokens, dim, dtype)
    # with D = 1 and a small eps xhat is ±1, and the gradient what two equal numbers leave of each other
    settings = {"norm": norm, "eps": 0.5 if dim == 1 else 1e-6}
    f = check_forward(emulator, x, shift, scale, **settings)
    check_backward(emulator, f, x, shift, scale, frames=1, g=g, **settings)
    f = check_forward(emulator, x, shift, scale, branch, gate, **settings)
    check_backward(emulator, f, x, shift, scale, branch, gate, frames=1, g=g, **settings)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", ["D", "1D", "BD", "BFD", "BND", "1ND", "BD chunks", "BFD chunks", "BND chunks"])
@pytest.mark.parametrize("dim", [40, 7])
def test_modulation_shapes(emulator, dim, kind, dtype):
    g = seeded(dim, kind, dtype)
    batch, tokens = 3, 6
    x, branch = randn(g, batch, tokens, dim), randn(g, batch, tokens, dim)
    gate, shift, scale = modulations(g, kind, batch, tokens, dim, dtype)
    f = check_forward(emulator, x, shift, scale, branch, gate)
    check_backward(emulator, f, x, shift, scale, branch, gate, frames=frames_of(kind, tokens), g=g)


def test_each_modulation_has_its_own_shape_and_dtype(emulator):
    g = seeded("mixed shapes")
    x, branch = randn(g, 2, 6, 64), randn(g, 2, 6, 64, dtype=F16)
    gate, shift, scale = randn(g, 64, dtype=BF16), randn(g, 2, 3, 64), randn(g, 2, 64, dtype=F16)
    f = check_forward(emulator, x, shift, scale, branch, gate)
    check_backward(emulator, f, x, shift, scale, branch, gate, frames=3, g=g)


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("other", [F32, BF16, F16])
def test_mixed_dtypes(emulator, x_dtype, other):
    g = seeded(x_dtype, other)
    x, branch = randn(g, 2, 3, 72, dtype=x_dtype), randn(g, 2, 3, 72, dtype=other)
    gate, shift, scale = modulations(g, "BD", 2, 3, 72, other)
    f = check_forward(emulator, x, shift, scale, branch, gate, out_dtype=other)
    check_backward(emulator, f, x, shift, scale, branch, gate, frames=1, g=g)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("present", ["", "shift", "scale", "weight", "bias", "weight bias", "shift scale weight bias"])
def test_absent_operands(emulator, present, norm):
    g = seeded(present)
    x = randn(g, 2, 4, 136)
    operands = {k: randn(g, 136) if k in present.split() else None for k in ("shift", "scale", "weight", "bias")}
    f = check_forward(emulator, x, **operands, norm=norm)
    check_backward(emulator, f, x, **operands, norm=norm, frames=1, g=g)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_affine_and_gated(emulator, norm):
    g = seeded("affine", norm)
    x, branch = randn(g, 2, 6, 136, dtype=BF16), randn(g, 2, 6, 136, dtype=BF16)
    gate, shift, scale = modulations(g, "BFD chunks", 2, 6, 136, BF16)
    vectors = {"weight": randn(g, 136), "bias": randn(g, 136), "norm": norm}
    f = check_forward(emulator, x, shift, scale, branch, gate, **vectors)
    check_backward(emulator, f, x, shift, scale, branch, gate, frames=3, g=g, **vectors)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("moved", ["x", "branch", "gate", "shift", "scale"])
def test_misaligned_pointers(emulator, moved, dtype):
    """An operand that starts one element after a 16-byte boundary is taken by the kernels without vectors."""
    g = seeded(moved)
    batch, tokens, dim = 2, 3, 64
    shapes = {k: (batch, tokens, dim) for k in ("x", "branch")} | {k: (batch, dim) for k in ("gate", "shift", "scale")}
    t = {k: randn(g, *shape, dtype=dtype) for k, shape in shapes.items()}
    shifted = torch.empty(t[moved].numel() + 1, dtype=dtype)[1:].view(t[moved].shape).copy_(t[moved])
    assert shifted.data_ptr() % 16
    t[moved] = shifted
    f = check_forward(emulator, t["x"], t["shift"], t["scale"], t["branch"], t["gate"])
    check_backward(emulator, f, t["x"], t["shift"], t["scale"], t["branch"], t["gate"], frames=1, g=g)


@pytest.mark.parametrize("moved", ["gate", "shift", "scale"])
@pytest.mark.parametrize("axis", ["batch", "frames"])
def test_misaligned_strides(emulator, moved, axis):
    """Modulation whose first row is aligned for vectors and whose second is not."""
    g = seeded(moved, axis)
    batch, tokens, dim = 2, 4, 64
    x, branch = randn(g, batch, tokens, dim), randn(g, batch, tokens, dim)
    t = {k: randn(g, batch, 2, dim) for k in ("gate", "shift", "scale")}
    strides = (2 * dim + 1, dim, 1) if axis == "batch" else (4 * dim, dim + 1, 1)
    t[moved] = randn(g, 8 * dim).as_strided((batch, 2, dim), strides)
    f = check_forward(emulator, x, t["shift"], t["scale"], branch, t["gate"])
    check_backward(emulator, f, x, t["shift"], t["scale"], branch, t["gate"], frames=2, g=g)


@pytest.mark.parametrize("dim", [384, 8200])
def test_rows_far_from_zero_stay_accurate(emulator, dim):
    g = seeded("far", dim)
    x = 1e4 + randn(g, 1, 3, dim)
    shift, scale = randn(g, dim), randn(g, dim)
    f = check_forward(emulator, x, shift, scale)  # as accurate as rows around zero
    assert relative(f["mean"], x.double().mean(-1).flatten()) < 1e-7
    assert relative(f["rstd"], 1 / x.double().var(-1, correction=0).sqrt().flatten()) < 2e-6  # eps; seen 4.7e-7


def test_statistics_are_saved(emulator):
    g = seeded("statistics")
    x = 3 + 2 * randn(g, 2, 5, 200)
    f = emulator.forward(x, eps=0.5)
    assert relative(f["mean"], x.double().mean(-1).flatten()) < 1e-6
    assert relative(f["rstd"], (x.double().var(-1, correction=0) + 0.5).rsqrt().flatten()) < 1e-6
    f = emulator.forward(x, eps=0.5, norm="rms")
    assert relative(f["rstd"], (x.double().square().mean(-1) + 0.5).rsqrt().flatten()) < 1e-6


@pytest.mark.parametrize("rows_per_segment", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("frames", [1, 2, 10])
def test_any_segments(emulator, frames, rows_per_segment):
    """Segments that do not divide the frame, more slices than segments, one row per frame."""
    g = seeded(frames, rows_per_segment)
    x, grad_out = randn(g, 2, 10, 40), randn(g, 2, 10, 40)
    scale, weight = randn(g, 2, frames, 40), randn(g, 40)
    f = emulator.forward(x, None, scale, weight=weight)
    grads = under_schedules(
        emulator,
        lambda: emulator.backward(
            grad_out, x, f, wanted=("shift", "scale", "weight", "bias"), scale=scale, weight=weight, frames=frames,
            rows_per_segment=rows_per_segment,
        ),
    )  # fmt: skip
    shift, bias = torch.zeros(2, frames, 40).double().requires_grad_(), torch.zeros(40).double().requires_grad_()
    leaves = [t.double().requires_grad_() for t in (x, scale, weight)]
    reference.adaln(leaves[0], shift, leaves[1], weight=leaves[2], bias=bias).backward(grad_out.double())
    expected = dict(zip(("x", "scale", "weight"), leaves, strict=True)) | {"shift": shift, "bias": bias}
    for name, leaf in expected.items():
        assert relative(grads[name], leaf.grad) < SUMS, name


def test_more_work_than_the_grid_has_blocks(emulator):
    g = seeded("grid")
    x, grad_out, scale, weight = randn(g, 4, 10, 136), randn(g, 4, 10, 136), randn(g, 4, 2, 136), randn(g, 136)

    def run() -> dict[str, Tensor]:
        f = emulator.forward(x, None, scale, weight=weight)
        grads = emulator.backward(
            grad_out, x, f, wanted=("scale", "weight"), scale=scale, weight=weight, frames=2, rows_per_segment=2
        )
        return f | {f"grad_{name}": t for name, t in grads.items()}

    expected = run()
    for schedule in SCHEDULES:
        # 5 blocks: grad_weight's, one per tile of 32 columns, does not loop, as D / 32 is within any grid
        emulator.configure(schedule, max_grid=5)
        for name, t in run().items():
            assert t is None or torch.equal(t, expected[name]), name


@pytest.mark.parametrize("layout", ["batch", "frames"])
def test_offsets_beyond_2_to_31(emulator, layout):
    """Modulation rows 2^31 elements apart, in memory that is never touched in between."""
    g = seeded("far apart")
    stride, dim = 2**31 + 8, 64
    shape, strides = ((2, 1, dim), (stride, dim, 1)) if layout == "batch" else ((1, 2, dim), (8, stride, 1))
    scale = torch.empty(stride + dim, dtype=BF16).as_strided(shape, strides)
    near = randn(g, *shape, dtype=BF16)
    scale.copy_(near)
    x, grad_out = randn(g, 2, 4, dim), randn(g, 2, 4, dim)
    far = emulator.forward(x, scale, scale)
    assert torch.equal(far["out"], emulator.forward(x, near, near)["out"])
    wanted = {"wanted": ("weight",), "frames": shape[1]}
    grads = emulator.backward(grad_out, x, far, scale=scale, **wanted)
    for name, t in emulator.backward(grad_out, x, far, scale=near, **wanted).items():
        assert torch.equal(grads[name], t), name


def test_without_sums_no_workspace_is_needed(emulator):
    g = seeded("no sums")
    x, grad_out, scale = randn(g, 2, 6, 64), randn(g, 2, 6, 64), randn(g, 64)
    f = emulator.forward(x, None, scale)
    grads = emulator.backward(grad_out, x, f, wanted=(), scale=scale)
    with_sums = emulator.backward(grad_out, x, f, wanted=("scale",), scale=scale)
    assert torch.equal(grads["x"], with_sums["x"])


@pytest.mark.parametrize("shape", [(0, 4, 64), (2, 0, 64)])
def test_empty(emulator, shape):
    x = torch.empty(shape)
    f = emulator.forward(x)
    assert f["out"].shape == shape
    grads = emulator.backward(x, x, f, wanted=("weight", "bias"))
    assert torch.equal(grads["weight"], torch.zeros(64)) and torch.equal(grads["bias"], torch.zeros(64))


def test_refused_parameters(emulator):
    x = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="cudaError 1"):
        emulator.forward(x.double())
    with pytest.raises(ValueError, match="cudaError 1"):
        emulator.forward(torch.zeros(1, 2, 0))
    with pytest.raises(ValueError, match="cudaError 1"):
        emulator.forward(x, branch=x)  # a gated form without a gate
    with pytest.raises(ValueError, match="cudaError 1"):
        emulator.backward(x, x, {"mean": None, "rstd": None}, wanted=())


def test_batch_invariance(emulator):
    """A row's result does not depend on the rows beside it, nor on its place in a block."""
    g = seeded("batch invariance")
    x, shift, scale = randn(g, 4, 3, 72), randn(g, 4, 72), randn(g, 4, 72)
    whole = emulator.forward(x, shift, scale)["out"]
    for b in range(4):
        alone = emulator.forward(x[b : b + 1], shift[b : b + 1], scale[b : b + 1])["out"]
        assert torch.equal(alone[0], whole[b])


def test_backward_of_rows_far_from_zero(emulator):
    """The saved mean is rounded to fp32, so that xhat is off by up to ulp(1e4) / 2 = 4.9e-4 standard deviations."""
    g = seeded("far backward")
    x, grad_out, scale = 1e4 + randn(g, 1, 4, 384), randn(g, 1, 4, 384), randn(g, 384)
    f = emulator.forward(x, None, scale)
    grads = emulator.backward(grad_out, x, f, wanted=("scale",), scale=scale)
    leaves = [t.double().requires_grad_() for t in (x, scale)]
    reference.adaln(leaves[0], None, leaves[1]).backward(grad_out.double())
    assert relative(grads["x"], leaves[0].grad) < 5e-5  # seen 1.2e-5
    assert relative(grads["scale"].flatten(), leaves[1].grad) < 1e-3  # seen 2.6e-4


@pytest.mark.parametrize("dim", [7, 64, 2056, 8200])  # one at a time, held, held in more registers, streamed
def test_a_saturated_stream_and_its_gradient(emulator, dim):
    g, shape = seeded("saturate", dim), (1, 3, dim)
    x, branch = ((randn(g, *shape) * 4e4).clamp(-65504, 65504).half() for _ in range(2))
    gate = randn(g, 1, dim)
    x[0, 0, 0] = float("nan")
    total = x.double() + gate.double() * branch.double()
    clipped = total.half().isinf()
    assert 0.05 < clipped.float().mean() < 0.6
    f = under_schedules(emulator, lambda: emulator.forward(x, branch=branch, gate=gate, saturate=True))
    stream = f["residual_out"]
    assert torch.equal(stream[clipped], total.half().clip(-65504, 65504)[clipped]) and stream.isnan().sum() == 1
    grad, zero = randn(g, *shape, dtype=F16), torch.zeros(shape)
    grads = under_schedules(
        emulator,
        lambda: emulator.backward(
            zero.half(), stream, f, wanted=("gate",), grad_residual_out=grad, branch=branch, gate=gate, residual_in=x
        ),
    )
    passed = torch.where(clipped, 0.0, grad.double())
    rows = slice(1, None)  # the row with a NaN has statistics that are NaN
    assert torch.equal(grads["x"][:, rows].double(), passed[:, rows]) and not grads["x"][clipped].any()
    assert relative(grads["branch"][:, rows], (passed * gate.double())[:, rows]) < ROUNDING[F16]
