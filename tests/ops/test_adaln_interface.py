"""AdaLN as torch sees it: out=, autograd, torch.func, opcheck, bad input, raw operators, backends by name."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastdiff import BackendError, use_backend
from fastdiff.ops import _adaln_backends, _native, adaln, gated_residual_adaln
from ops.harness import A_DEVICE, ROWS, check_operators, check_schemas

rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@rows
def test_out_is_written_and_returned(row):
    x, branch, m = randn(2, 5, 48).to(row.device), randn(2, 5, 48, seed=1).to(row.device), randn(2, 48).to(row.device)
    with row.active(), torch.no_grad():
        out, stream = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
        assert adaln(x, m, m, out=out) is out and torch.equal(out, adaln(x, m, m))
        result = gated_residual_adaln(x, branch, m, m, m, residual_out=stream, out=out)
        expected = gated_residual_adaln(x, branch, m, m, m)
        assert result[0] is stream and result[1] is out
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
        in_place = x.clone()
        gated_residual_adaln(in_place, branch, m, m, m, residual_out=in_place, out=out)
        assert torch.equal(in_place, stream)


def test_writes_into_out_are_seen_by_autograd():
    out, w = torch.ones(2, 5, 48), torch.ones(2, 5, 48, requires_grad=True)
    x, m = randn(2, 5, 48), randn(2, 48)
    for write in (
        lambda: adaln(x, m, m, out=out),
        lambda: gated_residual_adaln(x, x, m, m, m, residual_out=out, out=torch.empty_like(x)),
    ):
        loss = (w * out).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_outputs_that_share_a_part_of_an_operand_are_refused():
    memory, m = torch.zeros(3, 5, 48), torch.zeros(2, 48)
    x, shifted = memory[:2], memory.flatten()[48:].unflatten(0, (-1, 48))[:10].view(2, 5, 48)
    with pytest.raises(ValueError, match="out: got memory that another tensor"):
        adaln(x, m, m, out=shifted)
    with pytest.raises(ValueError, match="out: got memory that another tensor"):
        out = torch.empty_like(x)
        gated_residual_adaln(x, x.clone(), m, m, m, residual_out=out, out=out)
    assert adaln(x, m, m, out=x) is x  # the whole of it is fine
    for operand in ("shift", "weight"):  # which are read again for the next row
        memory = torch.zeros(10 * 48)
        operands = {"shift": None, "scale": None, operand: memory[48:96], "out": memory.view(2, 5, 48)}
        with pytest.raises(ValueError, match="out: got memory that another tensor"):
            adaln(x, **operands)
    x = memory.view(2, 5, 48)
    with pytest.raises(ValueError, match="out: got memory that another tensor"):
        adaln(x, x, None, out=x)


def test_torch_func_and_forward_mode_take_the_reference():
    x, tangent, m = randn(2, 5, 16), randn(2, 5, 16, seed=1), randn(2, 16, seed=2)
    with use_backend("reference"):
        _, exact = torch.func.jvp(lambda a: adaln(a, m, m), (x,), (tangent,))
    assert exact.abs().max() > 0.1
    _, forward = torch.func.jvp(lambda a: adaln(a, m, m), (x,), (tangent,))
    torch.testing.assert_close(forward, exact)
    torch.testing.assert_close(
        torch.func.grad(lambda a: adaln(a, m, m).square().sum())(x),
        torch.autograd.grad(adaln(x.requires_grad_(), m, m).square().sum(), x)[0],
        rtol=1e-4,
        atol=1e-4,
    )
    with use_backend("cpu"), pytest.raises(BackendError, match="torch.func"):
        torch.func.jvp(lambda a: adaln(a, m, m), (x.detach(),), (tangent,))


def test_meta_tensors_have_shapes_and_dtypes():
    assert adaln(torch.empty(2, 5, 48, device="meta"), None, None).shape == (2, 5, 48)


@pytest.mark.parametrize("row", A_DEVICE, ids=lambda r: r.name)
def test_opcheck(row):
    x, b = (randn(2, 6, 16, seed=s).to(row.device) for s in (0, 1))
    m, f, w = randn(2, 16).to(row.device), randn(1, 3, 16).to(row.device), randn(16).to(row.device)
    stats = [randn(12).to(row.device), randn(12).abs().to(row.device)]
    out, stream = torch.zeros_like(x), torch.zeros_like(x)
    for rms in (False, True):
        forward, backward = (m, f, w, w, rms, 1e-6, torch.bfloat16), (m, f, w, w, rms, True, True)
        mean = stats[0][:0] if rms else stats[0]
        calls = {
            "adaln_forward": (x, *forward),
            "adaln_forward_stats": (x, None, None, None, None, rms, 1e-6, None),
            "adaln_forward_out": (x, m, f, w, w, rms, 1e-6, None, out),
            "adaln_backward": (b, x, mean, stats[1], *backward),
            "gated_residual_adaln_forward": (x, b, f, *forward, rms),
            "gated_residual_adaln_forward_stats": (x, b, f, *forward, rms),
            "gated_residual_adaln_forward_out": (x, b, f, m, f, w, w, rms, 1e-6, None, rms, stream, out),
            "gated_residual_adaln_backward": (b, None, x, mean, stats[1], b, f, *backward, None),
        }
        check_operators(_adaln_backends.SCHEMAS, calls)


def test_schemas_in_python_and_cpp_are_the_same():
    check_schemas(_adaln_backends.SCHEMAS)


X, B, M = torch.zeros(2, 6, 8), torch.zeros(2, 6, 8), torch.zeros(2, 8)
BAD = {
    "x-list": (TypeError, "x: got a list", lambda: adaln([1.0], M, M)),
    "x-vector": (ValueError, r"x: got shape \[8\]; expected \[B, N, D\]", lambda: adaln(X[0, 0], M, M)),
    "dim-zero": (ValueError, "D > 0", lambda: adaln(torch.zeros(2, 6, 0), None, None)),
    "norm": (ValueError, "norm: got 'batch'; expected 'layer' or 'rms'", lambda: adaln(X, M, M, norm="batch")),
    "dtype": (TypeError, "int64.*expected float32", lambda: adaln(X.long(), M, M)),
    "mixed-double": (TypeError, "float64 for all", lambda: adaln(X, M.double(), M)),
    "sparse": (TypeError, "x: got layout torch.sparse_coo; expected a dense", lambda: adaln(X.to_sparse(), M, M)),
    "eps": (ValueError, "eps: got -1; expected a number >= 0", lambda: adaln(X, M, M, eps=-1)),
    "eps-type": (ValueError, "eps: got 'a'", lambda: adaln(X, M, M, eps="a")),
    "out-type": (TypeError, "out: got a str", lambda: adaln(X, M, M, out="a")),
    "shift-dim": (ValueError, r"shift: got shape \[2, 7\]; expected one of \[8\]", lambda: adaln(X, M[:, :7], M)),
    "scale-batch": (ValueError, r"scale: got shape \[3, 8\]", lambda: adaln(X, M, torch.zeros(3, 8))),
    "frames": (ValueError, r"scale: got shape \[2, 4, 8\].*dividing 6", lambda: adaln(X, M, torch.zeros(2, 4, 8))),
    "middle": (
        ValueError,
        r"shift: got shape \[2, 1, 3, 8\].*down to \[2, 1, 1, 8\]",
        lambda: adaln(X.view(2, 2, 3, 8), torch.zeros(2, 1, 3, 8), None),
    ),
    "shift-type": (TypeError, "shift: got a float", lambda: adaln(X, 0.5, M)),
    "weight": (ValueError, r"weight: got shape \[2, 8\]; expected \[8\]", lambda: adaln(X, M, M, weight=M)),
    "device": (ValueError, "scale: got one on meta, the stream on cpu", lambda: adaln(X, M, M.to("meta"))),
    "branch": (
        ValueError,
        r"branch: got shape \[2, 8\]; expected the residual's",
        lambda: gated_residual_adaln(X, M, M, M, M),
    ),
    "no-gate": (TypeError, "gate: got None", lambda: gated_residual_adaln(X, B, None, M, M)),
    "activation": (
        ValueError,
        "gate_activation: got 'relu'",
        lambda: gated_residual_adaln(X, B, M, M, M, gate_activation="relu"),
    ),
    "out-shape": (ValueError, "out: got .*expected contiguous", lambda: adaln(X, M, M, out=torch.zeros(2, 6, 9))),
    "out-dtype": (ValueError, "out: got .*float32", lambda: adaln(X, M, M, out=X.half())),
    "out-grad": (
        ValueError,
        "out: got one while a gradient",
        lambda: adaln(X.clone().requires_grad_(), M, M, out=X.clone()),
    ),
    "one-out": (ValueError, "both or neither", lambda: gated_residual_adaln(X, B, M, M, M, out=X.clone())),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_direct_calls_of_the_operators_do_not_read_out_of_bounds():
    with pytest.raises(RuntimeError, match="shift does not fit"):
        torch.ops.fastdiff.adaln_forward(X, torch.zeros(2, 7), None, None, None, False, 1e-6, None)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.fastdiff.adaln_forward(X.transpose(0, 1), None, None, None, None, False, 1e-6, None)
    with pytest.raises(RuntimeError, match="rstd"):
        torch.ops.fastdiff.adaln_backward(X, X, M, M, None, None, None, None, False, True, True)
    with pytest.raises(RuntimeError, match=r"expected contiguous \[B, N, D\]"):
        torch.ops.fastdiff.adaln_forward(M, None, None, None, None, False, 1e-6, None)
    stats = torch.zeros(12)
    for frames in (0, 4, 12):
        with pytest.raises(RuntimeError, match="shift does not fit"):
            shift = torch.zeros(2, frames, 8)
            torch.ops.fastdiff.adaln_backward(X, X, stats, stats, shift, None, None, None, False, True, True)


def test_raw_launch_functions_refuse_what_does_not_fit():
    raw, x = _native.cpu_module.adaln_forward, np.zeros((1, 2, 4), np.float32)
    with pytest.raises(ValueError, match="D > 0"):
        raw(x[..., :0].copy(), x[..., :0].copy())
    with pytest.raises(ValueError, match="mean does not fit"):
        raw(x.astype(np.float64), x.astype(np.float64), mean=np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="residual_out does not fit"):
        raw(x, x.copy(), branch=x, gate=x, residual_out=x.astype(np.float16))
    with pytest.raises(ValueError, match="weight does not fit"):
        raw(x, x.copy(), weight=np.ones(4))
    with pytest.raises(ValueError, match="float64 for all arrays or for none"):
        raw(x, x.astype(np.float64))


def test_a_backend_asked_for_by_name_that_cannot_run_raises_with_its_reasons():
    with use_backend("cuda"), pytest.raises(BackendError, match="backend 'cuda' was asked for and cannot run"):
        adaln(X, M, M)
    with use_backend("cpu"), pytest.raises(BackendError, match="the tensors are on 'meta'"):
        adaln(X.to("meta"), None, None)
    with pytest.raises(ValueError, match="unknown backend 'gpu'; expected one of auto"), use_backend("gpu"):
        pass


def _python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)


def test_environment_chooses_instruction_set_and_backend():
    code = "import fastdiff, torch; from fastdiff import _C, backends; print(_C.isa(), backends.requested())"
    done = _python(code, FASTDIFF_CPU_ISA="baseline", FASTDIFF_BACKEND="reference")
    assert done.stdout.split() == ["baseline", "reference"], done.stderr
    wrong = _python("import fastdiff.ops", FASTDIFF_CPU_ISA="sse9")
    assert "FASTDIFF_CPU_ISA is 'sse9'; expected one of baseline" in wrong.stderr.splitlines()[-1]
    assert "unknown backend 'gpu'" in _python("import fastdiff.ops", FASTDIFF_BACKEND="gpu").stderr.splitlines()[-1]
