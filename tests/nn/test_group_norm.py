"""GroupNorm for channels that come last in memory: PyTorch's values, and gradients of the formula."""

import pytest
import torch
from torch import nn

from fastdiff.nn.group_norm import GroupNorm

# batch, channels, height, width, groups: rows of 256 numbers, odd sizes, one group, a group a channel, several chunks
SHAPES = [(2, 16, 16, 16, 8), (3, 12, 7, 5, 4), (1, 6, 1, 1, 1), (2, 5, 3, 4, 5), (9, 64, 32, 32, 8)]


def pair(channels: int, groups: int) -> tuple[GroupNorm, nn.GroupNorm]:
    torch.manual_seed(0)
    ours, theirs = GroupNorm(groups, channels, eps=1e-6), nn.GroupNorm(groups, channels, eps=1e-6)
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.double()


def ratio(found, expected) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-12))


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])  # seen: 9e-7, 3e-3
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, limit):
    b, c, h, w, groups = shape
    ours, theirs = pair(c, groups)
    x = (2 * torch.randn(b, c, h, w) + 3).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(b, c, h, w).to(dtype)
    exact = x.detach().double().requires_grad_()
    y, expected = ours(x), theirs(exact)
    assert y.dtype == dtype and ratio(y, expected) < limit
    y.backward(dy)
    expected.backward(dy.double())
    found = (x.grad, ours.weight.grad, ours.bias.grad)
    for name, one, other in zip("xwb", found, (exact.grad, theirs.weight.grad, theirs.bias.grad), strict=True):
        if h * w * c // groups > 1 or name == "b":  # of a group of one number all else is 0
            assert ratio(one, other) < 2 * limit, name
    assert x.grad.dtype == dtype and x.grad.shape == x.shape and ours.weight.grad.dtype == torch.float32


def test_anything_else_goes_to_pytorch():
    ours, theirs = pair(8, 4)
    for x in (torch.randn(2, 8, 5), torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2, 2)):
        assert ratio(ours(x), theirs(x.double())) < 1e-6
    last = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert ratio(ours(last), theirs(last.double())) < 1e-6
    plain = GroupNorm(4, 8, affine=False)
    assert plain(last.requires_grad_()).sum().backward() is None and last.grad is not None

