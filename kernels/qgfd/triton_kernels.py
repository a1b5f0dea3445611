"""QGFD attention in Triton: the launch functions, on tensors that fastdiff.ops has checked.

The signatures are those of fastdiff/ops/_qgfd_backends.py; README.md has the mathematics and the rounding. A hop is one
launch; the mixtures between hops, linear in L, are torch's. There is no autotuning: tiles and warps follow from the
head size and the dtype alone, so that a first call compiles one variant, and a row does not depend on the batch or L.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import triton_backward_device as backward
from . import triton_device as device

MAX_DIM = 256
UNIT = device.UNIT.value
MAX_PROGRAMS = 2**31 - 1  # a grid's first dimension
DELTA_ELEMENTS = 4096  # that a program of delta_kernel reads at a time


class Tile(NamedTuple):
    own: int  # rows that a program makes: of queries, or of keys where M is transposed
    step: int  # rows of the other side that it reads at a time
    num_warps: int
    num_stages: int
    chunk: int  # columns at a time of products over them; more than the head size: all

    def of_queries(self, dim: int) -> dict[str, int]:
        return {"ROWS": self.own, "KEYS": self.step} | self._options(dim)

    def of_keys(self, dim: int) -> dict[str, int]:
        return {"ROWS": self.step, "KEYS": self.own} | self._options(dim)

    def _options(self, dim: int) -> dict[str, int]:
        # Told how many registers a thread may have, ptxas does not spill a few to fit more programs.
        most = min(65536 // (32 * self.num_warps), 255)
        sizes = {"D": dim, "DIM": padded(dim), "CHUNK": min(self.chunk, padded(dim))}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": most}


# By padded head size; what stays free of spills, and within 99 KB of shared memory, on every target
# (tools/triton_aot.py checks it). 16-bit products run on tensor cores; fp32 ones have their operands in registers.
HOP_TILES = {
    "16-bit": {64: Tile(128, 64, 8, 2, 256), 128: Tile(64, 32, 4, 2, 256), 256: Tile(64, 32, 8, 2, 256)},
    "fp32": {64: Tile(32, 32, 4, 1, 32), 128: Tile(32, 16, 4, 1, 32), 256: Tile(16, 16, 4, 1, 32)},
}
GRADIENT_TILES = {
    "16-bit": {64: Tile(64, 32, 4, 1, 256), 128: Tile(64, 32, 8, 2, 64), 256: Tile(32, 32, 8, 2, 64)},
    "fp32": {64: Tile(32, 16, 4, 1, 32), 128: Tile(16, 16, 4, 1, 32), 256: Tile(16, 16, 8, 1, 64)},
}


def padded(dim: int) -> int:
    """The head size in registers."""
    return max(triton.next_power_of_2(dim), 16)


def tile_of(tiles: dict[str, dict[int, Tile]], dtype: torch.dtype, dim: int) -> Tile:
    sizes = tiles["fp32" if dtype == torch.float32 else "16-bit"]
    return sizes[max(padded(dim), min(sizes))]


def _aligned(t: Tensor) -> Tensor:
    """t where its rows start at multiples of UNIT elements and of 16 bytes, a copy otherwise."""
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1]
    if t.data_ptr() % 16 == 0 and all(stride % UNIT == 0 for stride in strides):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _heads(name: str, t: Tensor) -> dict[str, object]:
    """[B, H, L, d] in place, strides in units."""
    strides = (0 if size == 1 else stride // UNIT for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True))
    names = (f"{name}_batch_stride", f"{name}_head_stride", f"{name}_row_stride")
    return {f"{name}_ptr": t, **dict(zip(names, strides, strict=True))}


class Matrix(NamedTuple):
    """M: what every kernel takes of it."""

    query: Tensor
    key: Tensor
    key_mask: Tensor | None
    row_begin: Tensor | None
    row_end: Tensor | None
    scale: float

    def programs(self, rows: int, tile: int) -> tuple[int]:
        """One a tile of `rows` rows of each head."""
        batch, heads = self.query.shape[:2]
        count = batch * heads * triton.cdiv(rows, tile)
        if count > MAX_PROGRAMS:
            raise ValueError(
                f"query has shape {list(self.query.shape)}: {count} tiles; the triton backend takes at most"
                f" {MAX_PROGRAMS}: split the batch"
            )
        return (count,)

    def intervals(self) -> dict[str, object]:
        arguments = {}
        for name, bound in (("begin", self.row_begin), ("end", self.row_end)):
            shared = bound is None or bound.shape[0] == 1
            arguments |= {f"{name}_ptr": bound, f"{name}_batch_stride": 0 if shared else bound.shape[1]}
        return arguments

    def arguments(self) -> dict[str, object]:
        heads, queries = self.query.shape[1:3]
        sizes = {"heads": heads, "group": heads // self.key.shape[1], "queries": queries, "keys": self.key.shape[2]}
        sizes["scale_log2"] = self.scale * math.log2(math.e)
        heads_of = _heads("query", self.query) | _heads("key", self.key)
        return heads_of | {"key_mask_ptr": self.key_mask} | self.intervals() | sizes

    def hop(self, value: Tensor, out: Tensor, softmax: dict[str, Tensor | None], first: bool) -> None:
        """out = M·value, [B, H, L, d] with any strides; the first hop fills what `softmax` has, later ones read it."""
        queries, dim = self.query.shape[2:]
        tile = tile_of(HOP_TILES, self.query.dtype, dim)
        device.hop_kernel[self.programs(queries, tile.own)](
            **self.arguments(), **_heads("value", value), **_heads("out", out), **softmax,
            tiles=triton.cdiv(queries, tile.own), FIRST=first, **tile.of_queries(dim),
        )  # fmt: skip

    def query_spans(self, tile: int) -> dict[str, object]:
        """Which queries see a tile of keys, where they are not all of them: int32 [B or 1, tiles, 2]."""
        bounds = [t for t in (self.row_begin, self.row_end) if t is not None]
        if not bounds:
            return {"span_ptr": None, "span_batch_stride": 0}
        batch, keys = max(t.shape[0] for t in bounds), self.key.shape[2]
        tiles = triton.cdiv(keys, tile)
        spans = torch.empty(batch, tiles, 2, dtype=torch.int32, device=self.query.device)
        backward.query_span_kernel[(batch * tiles,)](
            **self.intervals(), span_ptr=spans, queries=self.query.shape[2], keys=keys, tiles=tiles, KEYS=tile
        )
        return {"span_ptr": spans, "span_batch_stride": 0 if batch == 1 else tiles * 2}


def _mixture(y: Tensor, value: Tensor, alpha: float) -> Tensor:
    """round(alpha·y + (1 − alpha)·value); value has as many heads as y, or one per group."""
    batch, heads, length, dim = y.shape
    wide = (batch, value.shape[1], heads // max(value.shape[1], 1), length, dim)
    return torch.lerp(value[:, :, None].expand(wide), y.reshape(wide), alpha).view(y.shape)


def _forward(query, key, value, key_mask, row_begin, row_end, scale, hops, first_mixed, last_mixed, alpha, save):
    """(out, lse, passes); the last two are None unless `save`."""
    batch, heads, queries, dim = query.shape
    if rest := -dim % UNIT:
        wide = (F.pad(t, (0, rest)) for t in (query, key, value))
        numbers = (scale, hops, first_mixed, last_mixed, alpha)
        out, lse, passes = _forward(*wide, key_mask, row_begin, row_end, *numbers, save)
        return out[..., :dim].contiguous(), lse, passes[..., :dim].contiguous() if save else None
    query, key, value = (_aligned(t) for t in (query, key, value))
    out = query.new_empty(batch, queries, heads, dim)
    mixes_last = first_mixed <= hops <= last_mixed
    maximum, total, lse = (
        torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device) if wanted else None
        for wanted in (hops > 1, hops > 1, save)
    )
    passes = query.new_empty(hops if mixes_last else hops - 1, batch, heads, queries, dim) if save else None
    if out.numel() == 0:
        return out, lse, passes
    matrix, u = Matrix(query, key, key_mask, row_begin, row_end, scale), value
    with torch.cuda.device_of(query):
        for hop in range(1, hops + 1):
            if hop == hops and not mixes_last:
                y = out.transpose(1, 2)
            else:
                y = query.new_empty(query.shape) if passes is None else passes[hop - 1]
            softmax = {"maximum_ptr": maximum, "total_ptr": total, "lse_ptr": lse if hop == 1 else None}
            matrix.hop(u, y, softmax, first=hop == 1)
            u = _mixture(y, value, alpha) if first_mixed <= hop <= last_mixed else y
        if mixes_last:
            out.copy_(u.transpose(1, 2))
    return out, lse, passes


def qgfd_forward(query, key, value, *arguments) -> Tensor:
    """out [B, L_q, H, d]."""
    return _forward(query, key, value, *arguments, save=False)[0]


def qgfd_forward_saved(query, key, value, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The same with what the backward pass needs: (out, lse [B, H, L_q], passes [S, B, H, L_q, d])."""
    return _forward(query, key, value, *arguments, save=True)


def _diffused_gradients(matrix: Matrix, grad_out, lse, hops, first_mixed, last_mixed, alpha):
    """(h_1 … h_hops [hops, B, H, L_q, d], the sum over mixed hops of (1 − alpha)·g_j in fp32 or None)."""
    dim, keys = matrix.query.shape[3], matrix.key.shape[2]
    tile = tile_of(GRADIENT_TILES, grad_out.dtype, dim)
    h = grad_out.new_empty(hops, *grad_out.shape)
    h[hops - 1].copy_(grad_out)
    value_sum = None
    spans = matrix.query_spans(tile.own) if hops > 1 else {}
    for hop in range(hops, 0, -1):
        g = h[hop - 1]
        if first_mixed <= hop <= last_mixed:
            if value_sum is None:
                value_sum = torch.zeros(g.shape, dtype=torch.float32, device=g.device)
            value_sum.add_(g, alpha=1 - alpha)
            g.mul_(alpha)
        if hop > 1:
            backward.transposed_kernel[matrix.programs(keys, tile.own)](
                **matrix.arguments(), h_ptr=g, out_ptr=h[hop - 2], lse_ptr=lse, **spans,
                tiles=triton.cdiv(keys, tile.own), **tile.of_keys(dim),
            )  # fmt: skip
    return h, value_sum


def _deltas(h: Tensor, passes: Tensor, out: Tensor) -> Tensor:
    """fp32 [B, H, L_q]: what the softmax's gradient takes from every weight of a row."""
    hops, batch, heads, queries, dim = h.shape
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=h.device)
    rows = max(DELTA_ELEMENTS // padded(dim), 1)
    backward.delta_kernel[(triton.cdiv(delta.numel(), rows),)](
        h_ptr=h, passes_ptr=passes, out_ptr=out, delta_ptr=delta, heads=heads, queries=queries,
        rows_count=delta.numel(), hops=hops, saved=passes.shape[0],
        D=dim, DIM=padded(dim), ROWS=rows, num_warps=4, maxnreg=255,
    )  # fmt: skip
    return delta


def _hidden(passes: Tensor, value: Tensor, hops, first_mixed, last_mixed, alpha) -> Tensor:
    """u_1 … u_{hops−1} [hops − 1, B, H, L, d], `passes` itself where they are what it has."""
    last = min(last_mixed, hops - 1)
    if first_mixed > last:
        return passes
    hidden = passes[: hops - 1].clone()
    for hop in range(first_mixed, last + 1):
        hidden[hop - 1] = _mixture(passes[hop - 1], value, alpha)
    return hidden


def qgfd_backward(
    grad_out, query, key, value, out, lse, passes, key_mask, row_begin, row_end, scale,
    hops, first_mixed, last_mixed, alpha,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_query [B, L_q, H, d], grad_key, grad_value [B, L_k, H, d]), one per query head."""
    batch, heads, queries, dim = query.shape
    if rest := -dim % UNIT:
        wide = (F.pad(t, (0, rest)) for t in (grad_out, query, key, value, out))
        numbers = (scale, hops, first_mixed, last_mixed, alpha)
        grads = qgfd_backward(*wide, lse, F.pad(passes, (0, rest)), key_mask, row_begin, row_end, *numbers)
        return tuple(grad[..., :dim].contiguous() for grad in grads)
    query, key, value = (_aligned(t) for t in (query, key, value))
    keys = key.shape[2]
    grad_query, grad_key, grad_value = (query.new_empty(batch, n, heads, dim) for n in (queries, keys, keys))
    if grad_query.numel() == 0 or grad_key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    matrix = Matrix(query, key, key_mask, row_begin, row_end, scale)
    tile = tile_of(GRADIENT_TILES, query.dtype, dim)
    with torch.cuda.device_of(query):
        h, value_sum = _diffused_gradients(matrix, grad_out, lse, hops, first_mixed, last_mixed, alpha)
        hidden = _hidden(passes, value, hops, first_mixed, last_mixed, alpha)
        common = {
            **matrix.arguments(), **_heads("value", value), "h_ptr": h, "hidden_ptr": hidden, "lse_ptr": lse,
            "delta_ptr": _deltas(h, passes, out), "scale": float(scale),
            "hops": hops, "hop_stride": h.stride(0) // UNIT, "MANY": hops > 1,
        }  # fmt: skip
        backward.grad_key_kernel[matrix.programs(keys, tile.own)](
            **common, **matrix.query_spans(tile.own), value_sum_ptr=value_sum, grad_key_ptr=grad_key,
            grad_value_ptr=grad_value, tiles=triton.cdiv(keys, tile.own), **tile.of_keys(dim),
        )  # fmt: skip
        backward.grad_query_kernel[matrix.programs(queries, tile.own)](
            **common, grad_query_ptr=grad_query, tiles=triton.cdiv(queries, tile.own), **tile.of_queries(dim)
        )
    return grad_query, grad_key, grad_value
