"""What the harness does not say of scale_shift: its schema, its refusals, and that it stays out of the public API."""

import pytest
import torch

import fastdiff
from fastdiff.ops import scale_shift as module
from fastdiff.ops.scale_shift import scale_shift

X = torch.zeros(2, 3, 8)
M = torch.zeros(2, 8)


def test_opcheck():
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator) for shape in (X.shape, M.shape, M.shape)]
    torch.library.opcheck(torch.ops.fastdiff.scale_shift.default, args)


def test_schemas_in_python_and_cpp_are_the_same():
    (name, schema), *_ = module.SCHEMAS.items()
    written = str(torch.ops.fastdiff.scale_shift.default._schema).removeprefix(f"fastdiff::{name}")
    assert written == str(torch._C.parse_schema(name + schema)).removeprefix(name)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (([1.0], M, M), "x: got a list; expected a torch.Tensor"),
        ((X[None], M, M), r"x: got shape \[1, 2, 3, 8\]; expected \[B, N, D\]; reshape it"),
        ((X.long(), M, M), "x: got torch.int64; expected float32"),
        ((X, M[0], M), r"scale: got shape \[8\]; expected at least 2"),
        ((X, M, M[:1]), r"shift: got shape \[1, 8\]; expected \[2, 8\], \[B, D\] of x; reshape it"),
        ((X, M, M.bfloat16()), "shift: got torch.bfloat16 on cpu; expected torch.float32 on cpu as x; convert it"),
    ],
)
def test_what_does_not_fit_is_named(inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        scale_shift(*inputs)


def test_a_direct_call_that_does_not_fit_raises():
    for x, scale in ((X[0], M), (X.transpose(0, 1), M), (X, M[:, :7]), (X, M.half()), (X.double(), M.double())):
        with pytest.raises(RuntimeError, match="does not fit|x is float64"):
            torch.ops.fastdiff.scale_shift(x, scale, scale)


def test_strided_operands_and_float64():
    x, scale = torch.randn(3, 2, 8).transpose(0, 1), torch.randn(8, 2).t()
    torch.testing.assert_close(scale_shift(x, scale, scale), x * (1 + scale)[:, None] + scale[:, None])
    x, scale = x.double(), scale.double()
    assert torch.equal(scale_shift(x, scale, scale), x * (1 + scale)[:, None] + scale[:, None])


def test_it_is_not_part_of_the_public_api():
    assert "scale_shift" not in fastdiff.ops.__all__
