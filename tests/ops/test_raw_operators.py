"""torch.ops.fastdiff.* and the NumPy entries, without the package's own checks: a line, never a wrong number."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.ops import QGFDOptions, _native, qgfd_attention

ROOT = Path(__file__).resolve().parents[2]
RAW = torch.ops.fastdiff
pytestmark = pytest.mark.skipif(_native.cpu_module is None, reason="NOT TESTED: fastdiff._C was not built")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def adaln_backward(**changes: torch.Tensor) -> None:
    made = {"grad_out": zeros(2, 4, 8), "x": zeros(2, 4, 8), "mean": zeros(8), "rstd": zeros(8), "scale": zeros(2, 8)}
    made |= changes
    RAW.adaln_backward(
        made["grad_out"], made["x"], made["mean"], made["rstd"], None, made["scale"], None, None, False, True, True
    )


@pytest.mark.parametrize("name", ["grad_out", "scale"])
def test_float64_goes_with_float64_only(name):
    shape = (2, 8) if name == "scale" else (2, 4, 8)
    adaln_backward()
    with pytest.raises(RuntimeError, match="float64 goes with float64 only"):
        adaln_backward(**{name: zeros(*shape, dtype=torch.float64)})


@pytest.mark.parametrize("name", ["mean", "rstd"])
def test_statistics_have_memory_of_their_own(name):
    with pytest.raises(RuntimeError, match="expected contiguous"):
        adaln_backward(**{name: zeros(1).expand(8)})


def test_outputs_lie_apart_from_inputs():
    memory, m = zeros(3, 4, 8), zeros(2, 8)
    with pytest.raises(RuntimeError, match="out overlaps an operand"):
        RAW.adaln_forward_out(memory[:2], m, None, None, None, False, 1e-6, None, memory[1:])
    x, branch = zeros(2, 4, 8), zeros(2, 4, 8)
    gated = (branch, m, m, m, None, None, False, 1e-6, None, False)
    RAW.gated_residual_adaln_forward_out(x, *gated, x, zeros(2, 4, 8))  # the stream may be its own output
    with pytest.raises(RuntimeError, match="residual_out overlaps an operand"):
        RAW.gated_residual_adaln_forward_out(memory[:2], *gated, memory[1:], zeros(2, 4, 8))
    with pytest.raises(RuntimeError, match="out overlaps an operand"):
        RAW.gated_residual_adaln_forward_out(x, *gated, x, x)
    with pytest.raises(RuntimeError, match="residual_out overlaps an operand"):  # which is read after it is written
        RAW.gated_residual_adaln_forward_out(x, branch, m, x, *gated[3:], x, zeros(2, 4, 8))


def test_frames_of_no_tokens_are_numbers():
    x, wide = zeros(1, 0, 8), [zeros(1, 1, 8).expand(1, 2**40 - k, 8) for k in (1, 3)]
    with pytest.raises(RuntimeError, match="the frames of the modulations do not fit"):
        RAW.adaln_backward(x, x, zeros(0), zeros(0), *wide, None, None, False, True, True)


def test_a_clipped_stream_is_float16():
    x, m, rows = zeros(2, 4, 8), zeros(2, 8), zeros(8)
    with pytest.raises(RuntimeError, match="residual_in does not fit; expected float16"):
        RAW.gated_residual_adaln_backward(
            x, None, x, rows, rows, x, m, None, None, None, None, False, True, True, x.clone()
        )


def test_hops_are_bounded():
    q = zeros(1, 1, 4, 8)
    options = (None, None, None, 0.3, 2**58 + 1, 1, 2**58 + 1, 0.5)
    with pytest.raises(RuntimeError, match="hops is 288230376151711745; expected at most 4096"):
        RAW.qgfd_forward(q, q, q, *options)
    with pytest.raises(RuntimeError, match="expected at most 4096"):
        RAW.qgfd_backward(q, q, q, q, zeros(1, 4, 1, 8), zeros(1, 1, 4), zeros(0, 1, 1, 4, 8), *options)
    with pytest.raises(
        ValueError, match=r"steps: got 1000000000000; expected an int from 0 \(plain attention\) to 4095"
    ):
        qgfd_attention(q, q, q, steps=10**12)
    with pytest.raises(ValueError, match="steps: got 4096"):
        QGFDOptions(steps=4096)
    RAW.qgfd_forward(q, q, q, None, None, None, 0.3, 4096, 4096, 4096, 0.5)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_temperatures_of_rows_are_numbers_of_0_or_more(value):
    logits, temperatures = zeros(1, 2, 10), torch.tensor([1.0, value])
    with pytest.raises(RuntimeError, match="temperatures has .*; expected numbers of 0 or more"):
        RAW.sample_tokens(logits, temperatures, 0.0, 0, 1.0, None, None, None, 0, None, 0, None, None)


def test_the_tiled_product_refuses_what_it_cannot_multiply():
    out, a, b = zeros(3, 5), torch.ones(3, 2), torch.ones(2, 5)
    RAW.tiled_addmm_(out, None, a, b, 0.0, 1.0, 2**63 - 1)
    assert (out == 2).all()
    with pytest.raises(RuntimeError, match="got operands on cpu, meta; expected one device"):
        RAW.tiled_addmm_(out, None, a.to("meta"), b, 0.0, 1.0, 4)
    with pytest.raises(RuntimeError, match="overlaps"):
        RAW.tiled_addmm_(out, None, out[:, :2], b, 0.0, 1.0, 4)


def test_none_and_tensors_between_two_elements():
    with pytest.raises(RuntimeError, match="is None; expected a tensor"):
        RAW.scale_shift(zeros(1, 2, 4), None, zeros(1, 4))
    between = torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1, count=4).view(1, 4)
    with pytest.raises(RuntimeError, match="begins between two elements"):
        RAW.scale_shift(zeros(1, 2, 4), zeros(1, 4), between)


def test_token_ids_lie_apart_from_the_sample():
    ids, floats = torch.full((1, 4), 7), zeros(4)
    options = (None, None, None, None, 0, 0, None, 1.0, 7, None, 0, None, 0, None)
    with pytest.raises(RuntimeError, match="token_ids overlaps token"):
        RAW.unmask_(ids, ids.view(4), floats, floats, floats, *options)


def _numpy(**changes) -> None:
    x = np.zeros((2, 4, 8), np.float32)
    arguments = {"x": x, "out": np.zeros_like(x), "shift": np.zeros((1, 2, 8), np.float32)} | changes
    _native.cpu_module.adaln_forward(**arguments)


def test_numpy_arrays_that_mean_something_else_are_refused():
    _numpy()
    with pytest.raises(TypeError, match="byte order"):
        _numpy(shift=np.zeros((1, 2, 8), ">f2"))
    with pytest.raises(TypeError, match="byte order"):
        _numpy(shift=np.zeros((1, 2, 8), ">f4"))
    with pytest.raises(ValueError, match="shift does not fit; expected an aligned array"):
        records = np.zeros((1, 2), np.dtype({"names": ["m"], "formats": [("f4", 8)], "offsets": [0], "itemsize": 34}))
        _numpy(shift=records["m"])
    memory = np.zeros((3, 4, 8), np.float32)
    with pytest.raises(ValueError, match="out does not fit; expected memory that no other array shares"):
        _numpy(x=memory[:2], out=memory[1:])
    with pytest.raises(ValueError, match="mean does not fit; expected memory"):
        _numpy(x=memory[:2], mean=memory[0].reshape(-1)[:8], rstd=np.zeros(8, np.float32))


def test_every_schema_under_sanitizers():
    """Right calls succeed, wrong ones end in a line; AddressSanitizer and UBSan watch. `make fuzz` makes a million."""
    command = [sys.executable, str(ROOT / "tools" / "fuzz.py"), "--calls", "20000"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(f"NOT TESTED: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '"calls": 20000' in done.stdout
