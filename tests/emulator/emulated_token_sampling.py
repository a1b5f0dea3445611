"""Token sampling's CUDA launch functions in the emulator, called with torch tensors on the CPU."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from emulator import DTYPES, Emulator, pointer

_P, _I = ctypes.c_void_p, ctypes.c_int64


class TokenSampleParams(ctypes.Structure):
    _fields_ = [
        ("logits", _P),
        *((name, _I) for name in ("batch_stride", "row_stride", "batch", "length", "vocab")),
        *((name, _P) for name in ("temperatures", "suppress")),
        ("suppress_count", _I),
        ("end_tokens", _P),
        ("end_count", _I),
        *((name, _P) for name in ("seed_at", "step_at", "sequence_ids", "positions")),
        *((name, _I) for name in ("seed", "step")),
        *((name, _P) for name in ("token", "log_prob", "entropy", "margin", "end_log_prob", "workspace")),
        ("top_k", _I),
        *((name, ctypes.c_double) for name in ("temperature", "top_p")),
        ("dtype", ctypes.c_int32),
    ]


class LmHeadSampleParams(ctypes.Structure):
    _fields_ = [
        ("sample", TokenSampleParams),
        *((name, _P) for name in ("hidden", "weight", "bias", "tile")),
        *((name, _I) for name in ("weight_stride", "dim", "tile_size")),
    ]


class Sample(NamedTuple):
    token: Tensor  # int64 [R]
    log_prob: Tensor  # these: float32 [R]
    entropy: Tensor
    margin: Tensor
    end_log_prob: Tensor | None
    threshold: Tensor | None  # what top-k and top-p left in the workspace


class SamplingEmulator:
    """The launch functions of one variant of the library."""

    def __init__(self, emulator: Emulator):
        self.emulator, self.lib = emulator, emulator.lib
        self.lib.fd_sample_tokens_workspace_bytes.restype = ctypes.c_long
        self.lib.fd_lm_head_sample_workspace_bytes.restype = ctypes.c_long
        assert ctypes.sizeof(TokenSampleParams) == self.lib.fd_size_of_token_sample_params()
        assert ctypes.sizeof(LmHeadSampleParams) == self.lib.fd_size_of_lm_head_sample_params()

    def choose(self, weights: Tensor, u: float) -> tuple[int, float, float]:
        """Index, sum before it and weight of what u in [0, 1] falls on; every lane must say the same."""
        chosen = (ctypes.c_double * 3 * 32)()
        status = self.lib.fd_choose(_P(pointer(weights)), ctypes.c_long(weights.numel()), ctypes.c_double(u), chosen)
        self.emulator.check(status)
        lanes = torch.frombuffer(chosen, dtype=torch.float64).view(32, 3)
        assert torch.equal(lanes.view(torch.int64), lanes[:1].view(torch.int64).expand(32, 3))
        return int(lanes[0, :1].view(torch.int64)), float(lanes[0, 1]), float(lanes[0, 2])

    def sample_tokens(self, logits: Tensor, **settings) -> Sample:
        """logits [R, V] or [B, L, V], any strides but the last. Settings: see _parameters."""
        logits = logits if logits.ndim == 3 else logits[None]
        assert logits.stride(-1) == 1 or logits.shape[-1] == 1
        p, sample, keep = self._parameters(*logits.shape, logits.dtype, **settings)
        p.logits, p.batch_stride, p.row_stride = pointer(logits), logits.stride(0), logits.stride(1)
        workspace = _poisoned(self.lib.fd_sample_tokens_workspace_bytes(ctypes.byref(p)))
        p.workspace = pointer(workspace)
        self.emulator.check(self.lib.fd_sample_tokens(ctypes.byref(p)))
        if p.top_k > 0 or p.top_p < 1:
            rows = sample.token.numel()
            floats = workspace[workspace.numel() - (rows + 1) // 2 * 8 :].clone().view(torch.float32)
            sample = sample._replace(threshold=floats[:rows])
        return sample

    def lm_head_sample(
        self,
        hidden: Tensor,  # [R, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None = None,  # [V]
        *,
        tile_size: int = 1024,
        **settings,
    ) -> Sample:
        p = LmHeadSampleParams()
        p.sample, sample, keep = self._parameters(1, hidden.shape[0], weight.shape[0], hidden.dtype, **settings)
        tile = torch.full((hidden.shape[0] * tile_size,), float("nan"), dtype=hidden.dtype)
        p.hidden, p.weight, p.bias, p.tile = pointer(hidden), pointer(weight), pointer(bias), pointer(tile)
        p.weight_stride, p.dim, p.tile_size = weight.stride(0), hidden.shape[1], tile_size
        workspace = _poisoned(self.lib.fd_lm_head_sample_workspace_bytes(ctypes.byref(p)))
        p.sample.workspace = pointer(workspace)
        self.emulator.check(self.lib.fd_lm_head_sample(ctypes.byref(p)))
        return sample

    def _parameters(
        self,
        batch: int,
        length: int,
        vocab: int,
        dtype: torch.dtype,
        *,
        temperature: float | Tensor = 1.0,  # a number, or float32 [R]
        top_k: int = 0,
        top_p: float = 1.0,
        suppress: Tensor | None = None,  # these two: int64, ascending
        end: Tensor | None = None,
        seed: int | Tensor = 0,  # these two: a number, or int64 [1] read by the kernel
        step: int | Tensor = 0,
        sequence_ids: Tensor | None = None,  # these two: int64 [R]
        positions: Tensor | None = None,
    ) -> tuple[TokenSampleParams, Sample, list]:
        """The parameters, the outputs (poisoned) and what must live as long as they are used."""
        rows, nan = batch * length, float("nan")
        floats = [torch.full((rows,), nan) for _ in range(3 if end is None else 4)]
        sample = Sample(torch.full((rows,), -99), *floats, *[None] * (5 - len(floats)))
        p = TokenSampleParams(
            batch=batch, length=length, vocab=vocab, dtype=DTYPES[dtype], top_k=top_k, top_p=top_p,
            sequence_ids=pointer(sequence_ids), positions=pointer(positions),
            suppress=pointer(suppress), suppress_count=0 if suppress is None else suppress.numel(),
            end_tokens=pointer(end), end_count=0 if end is None else end.numel(),
            token=pointer(sample.token), log_prob=pointer(sample.log_prob), entropy=pointer(sample.entropy),
            margin=pointer(sample.margin), end_log_prob=pointer(sample.end_log_prob),
        )  # fmt: skip
        for name, value in (("seed", seed), ("step", step)):
            setattr(p, f"{name}_at" if isinstance(value, Tensor) else name, _number_or_pointer(value))
        p.temperature = 0.0 if isinstance(temperature, Tensor) else temperature
        p.temperatures = pointer(temperature) if isinstance(temperature, Tensor) else None
        return p, sample, [temperature, suppress, end, seed, step, sequence_ids, positions]


def _number_or_pointer(value: float | Tensor) -> float | int | None:
    return pointer(value) if isinstance(value, Tensor) else value


def _poisoned(size: int) -> Tensor:
    return torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN in every float type
