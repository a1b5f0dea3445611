"""The CUDA kernels of eos_log_prob, executed on the CPU, against the reference in float64.

Every case runs under three schedules of threads and blocks, which must agree to the bit. Errors are relative.
"""

import ctypes
import math

import pytest
import torch
from build_emulator import sanitized_tests
from torch import Tensor

from emulator import DTYPES, SCHEDULES, Emulator, pointer
from fastdiff.kernels.eos_log_prob import reference

_P, _I, _L = ctypes.c_void_p, ctypes.c_int64, ctypes.c_long
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ERROR = 1.5e-7  # of every result, in relative terms; seen on x86-64 with gcc 12: 5.9e-8, the last bit


class EosLogProbParams(ctypes.Structure):
    _fields_ = [
        ("logits", _P),
        *((name, _I) for name in ("batch_stride", "row_stride", "batch", "length", "vocab")),
        ("end_tokens", _P),
        ("end_count", _I),
        ("excluded", _P),
        ("excluded_count", _I),
        *((name, _P) for name in ("end_log_prob", "workspace")),
        ("dtype", ctypes.c_int32),
    ]


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def randn(*shape: int, dtype: torch.dtype = F32, scale: float = 3.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=g) * scale).to(dtype)


class EosEmulator:
    """The launch functions; results are [B * L]."""

    def __init__(self, emulator: Emulator):
        self.emulator, self.lib = emulator, emulator.lib
        self.lib.fd_eos_log_prob_workspace_bytes.restype = ctypes.c_long
        assert ctypes.sizeof(EosLogProbParams) == self.lib.fd_size_of_eos_log_prob_params()

    def _parameters(self, batch, length, vocab, dtype, end, excluded) -> tuple[EosLogProbParams, Tensor, Tensor]:
        """The parameters; the result and the workspace, both poisoned."""
        p = EosLogProbParams(
            batch=batch, length=length, vocab=vocab, end_tokens=pointer(end), end_count=end.numel(),
            excluded=pointer(excluded), excluded_count=excluded.numel(), dtype=DTYPES[dtype],
        )  # fmt: skip
        result = torch.full((batch * length,), -99.0)
        size = self.lib.fd_eos_log_prob_workspace_bytes(ctypes.byref(p))
        workspace = torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN
        p.end_log_prob, p.workspace = pointer(result), pointer(workspace)
        return p, result, workspace

    def from_logits(self, logits: Tensor, end: Tensor, excluded: Tensor | None = None) -> Tensor:
        """logits [R, V] or [B, L, V], any strides but the last."""
        logits = logits if logits.ndim == 3 else logits[None]
        p, result, workspace = self._parameters(*logits.shape, logits.dtype, end, end if excluded is None else excluded)
        p.logits, p.batch_stride, p.row_stride = pointer(logits), logits.stride(0), logits.stride(1)
        self.emulator.check(self.lib.fd_eos_log_prob_from_logits(ctypes.byref(p)))
        return result

    def from_hidden(
        self,
        hidden: Tensor,  # [R, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,
        end: Tensor,
        excluded: Tensor | None = None,
        tile_size: int = 1024,
    ) -> Tensor:
        rows, vocab = hidden.shape[0], weight.shape[0]
        excluded = end if excluded is None else excluded
        p, result, workspace = self._parameters(1, rows, vocab, hidden.dtype, end, excluded)
        tile = torch.full((rows * tile_size,), float("nan"), dtype=hidden.dtype)
        operands = (_P(pointer(t)) for t in (hidden, weight, bias))
        sizes = _L(weight.stride(0)), _L(hidden.shape[1]), _P(pointer(tile)), _L(tile_size)
        self.emulator.check(self.lib.fd_eos_log_prob(ctypes.byref(p), *operands, *sizes))
        return result


@pytest.fixture
def eos(emulator) -> EosEmulator:
    return EosEmulator(emulator)


def under_schedules(eos: EosEmulator, run) -> Tensor:
    results = []
    for schedule in SCHEDULES:
        eos.emulator.configure(schedule)
        results.append(run())
    for other in results[1:]:
        assert torch.equal(results[0].view(torch.int32), other.view(torch.int32)), "depends on who runs first"
    return results[0]


def check(eos: EosEmulator, logits: Tensor, end: Tensor, excluded: Tensor | None = None) -> Tensor:
    result = under_schedules(eos, lambda: eos.from_logits(logits, end, excluded))
    truth = reference.eos_log_prob_from_logits(logits.double(), end, end if excluded is None else excluded).flatten()
    torch.testing.assert_close(result.double(), truth, rtol=ERROR, atol=1e-45, equal_nan=True)
    return result


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocab", [1, 5, 127, 1023, 1024, 1025, 5000])
def test_vocabularies(eos, vocab, dtype):
    logits = randn(2, 5, vocab, dtype=dtype)
    check(eos, logits, ids(vocab - 1))
    if vocab > 1:
        several = ids(0, vocab // 2, vocab - 2) if vocab > 5 else ids(0, 3)
        check(eos, logits, several, torch.cat([several, ids(1, vocab - 1)]).sort().values)


def test_more_end_tokens_and_suppressed_ids_than_a_warp_has_lanes(eos):
    logits = randn(3, 2100, scale=8.0)
    check(eos, logits, torch.arange(0, 2100, 13), torch.arange(0, 2100, 13))
    check(eos, logits, torch.arange(0, 2100, 26), torch.arange(0, 2100, 13))
    assert not check(eos, logits, torch.arange(2100)).any(), "nothing else can follow"


@pytest.mark.parametrize("gap", [-600.0, -40.0, -1.0, 0.0, 20.0, 40.0, 80.0])
def test_certain_positions_keep_their_digits(eos, gap):
    logits = torch.full((2, 1200), 3.0)
    logits[:, 1] += gap
    odds = math.log(1199) - gap
    truth = -(max(odds, 0.0) + math.log1p(math.exp(-abs(odds))))
    result = under_schedules(eos, lambda: eos.from_logits(logits, ids(1)))
    torch.testing.assert_close(result.double(), torch.tensor([truth] * 2).double(), rtol=1.5e-7, atol=0)


@pytest.mark.parametrize("place", [7, 1033], ids=["end", "other"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution(eos, value, place):
    logits = randn(4, 1500)
    logits[1, place] = value
    logits[2] = -math.inf
    logits[2, place] = value  # a NaN among -inf
    result = under_schedules(eos, lambda: eos.from_logits(logits, ids(7)))
    assert result.isnan().tolist() == [False, value != -math.inf, True, False]
    assert eos.from_logits(logits, ids(8), ids(8, place).sort().values)[1].isfinite(), "suppressed ids are not read"


def test_ends_that_have_no_mass_or_all_of_it(eos):
    logits = randn(3, 1500)
    logits[0, 7] = -math.inf
    logits[1] = -math.inf
    logits[1, 7] = -50.0
    result = check(eos, logits, ids(7))
    assert result[0] == -math.inf and str(result[1].item()) == "0.0"


def test_strides_and_alignment(eos):
    wide = randn(3, 6, 1509, dtype=BF16)
    for logits in (wide[:, 1:-1, 3:-2], wide[..., 1:].transpose(0, 1), wide[:1, :, :1040]):
        check(eos, logits, ids(0, 1039), ids(0, 5, 1039))


def test_a_row_alone_is_the_row_in_a_batch_and_in_a_loop(eos):
    logits = randn(9, 2051, dtype=BF16)  # odd: every row has another alignment
    whole = eos.from_logits(logits, ids(4, 2050))
    eos.emulator.configure(max_grid=2)  # with more rows than the grid has blocks
    assert torch.equal(whole, eos.from_logits(logits, ids(4, 2050)))
    for r in range(9):
        assert torch.equal(whole[r : r + 1], eos.from_logits(logits[r : r + 1], ids(4, 2050)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocab, dim, tile", [(1, 8, 1024), (900, 16, 1024), (2500, 13, 1024), (3100, 32, 2048)])
def test_from_hidden_states(eos, vocab, dim, tile, dtype):
    """Bit for bit what from_logits makes of the rounded logits."""
    hidden, weight = randn(7, dim, dtype=dtype, scale=1.0), randn(vocab, dim + 3, dtype=dtype, scale=1.0)[:, 2:-1]
    bias = randn(vocab, dtype=dtype, scale=0.5)
    end, excluded = (ids(0), ids(0)) if vocab == 1 else (ids(0, vocab - 1), ids(0, 1, vocab - 2, vocab - 1))
    logits = (hidden.double() @ weight.double().T + bias.double()).to(dtype)
    result = under_schedules(eos, lambda: eos.from_hidden(hidden, weight, bias, end, excluded, tile))
    assert torch.equal(result, check(eos, logits, end, excluded))


def test_lists_that_are_not_in_order_read_nothing_out_of_bounds(eos):
    """On a GPU the values of the lists are not looked at beforehand: then results are wrong, and nothing else is."""
    eos.from_logits(randn(2, 1500), ids(2000, -5, 3, 3, 2**40), ids(1499, 2**40, -1, 7))


def test_no_rows(eos):
    assert eos.from_logits(torch.empty(0, 50), ids(3)).shape == (0,)
    assert eos.from_hidden(torch.empty(0, 8), randn(50, 8), None, ids(3)).shape == (0,)


def test_refused(eos):
    for logits, end in ((randn(2, 9).double(), ids(1)), (torch.empty(2, 0), ids(1)), (randn(2, 9), ids())):
        with pytest.raises(ValueError, match="cudaError 1"):
            eos.from_logits(logits, end)
    for tile_size in (0, 1000):
        with pytest.raises(ValueError, match="cudaError 1"):
            eos.from_hidden(randn(2, 8), randn(9, 8), None, ids(1), tile_size=tile_size)


def test_under_address_and_undefined_behaviour_sanitizers(libraries):
    """A selection of these tests, in a process of its own with the sanitized library."""
    chosen = ["vocabularies and 1025-", "lanes", "without", "strides", "not_in_order", "hidden and 13"]
    done = sanitized_tests(__file__, chosen, libraries("asan"))
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
