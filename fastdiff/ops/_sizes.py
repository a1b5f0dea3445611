"""The sizes at which CPU kernels take a second thread, and store past the caches: measured on the machine.

They never change what is computed (kernels/common/tuning.h), so that they belong to the process, not to a run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import tuning
from fastdiff.ops import _native
from fastdiff.ops.adaln import adaln

_GRAIN = 16384  # the default, as in kernels/common/tuning.h
_ELEMENTS = (1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
_PARTS_OF_CACHE = (0.25, 0.5, 1.0, 2.0)
_MOST_BYTES = 1 << 28  # of a call that is tried: larger caches are taken at their word


def measure_sizes() -> list[str] | None:
    """Measures both sizes, where they are not known of this machine, and gives them to the kernels.

    Returns the keys of what is known then; None where the machine was too busy.
    """
    native = _native.cpu_module
    if native is None or not tuning.enabled():
        return []
    found: dict[str, tuning.Measured] = {}
    try:
        if torch.get_num_threads() > 1:
            found["thread_grain"] = tuning.answer("thread_grain", _GRAIN, _measure_grain)
        cache = tuning.last_cache_bytes()
        if cache is not None:
            found["stream_bytes"] = tuning.answer("stream_bytes", cache // 4 * 5, _measure_stream)
    finally:
        tuning.apply_sizes(native)
    return list(found) if all(each.settled for each in found.values()) else None


def _operands(elements: int, dim: int) -> tuple[Tensor, ...]:
    """x and out [1, N, dim], shift and scale [1, dim]."""
    shape = (1, max(elements // dim, 1), dim)
    x = torch.linspace(-1, 1, shape[1] * dim, device="cpu", dtype=torch.float32).view(shape)
    return x, torch.empty_like(x), torch.zeros(1, dim, dtype=torch.float32), torch.zeros(1, dim, dtype=torch.float32)


def _with_size(name: str, value: int, call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        _native.cpu_module.set_tuning(name, value)
        call()

    return run


def _measure_grain() -> tuning.Measured:
    """Half of the least elements that two threads do sooner than one."""
    seconds: dict[str, float] = {}
    for elements in _ELEMENTS:
        x, out, shift, scale = _operands(elements, 128)

        def call(x=x, out=out, shift=shift, scale=scale) -> None:
            with torch.no_grad():
                for _ in range(10):
                    adaln(x, shift, scale, out=out)

        alone, both = f"{elements} elements, one thread", f"{elements} elements, two threads"
        found = tuning.fastest(
            {
                alone: _with_size("thread_grain", elements, call),
                both: _with_size("thread_grain", elements // 2, call),
            },
            default=alone,
            seconds=0.03,
        )
        seconds |= found.seconds
        if not found.settled:
            return tuning.Measured(_GRAIN, seconds, settled=False)
        if found.chosen == both:
            break
    return tuning.Measured(elements // 2, {name: each / 10 for name, each in seconds.items()})


def _measure_stream() -> tuning.Measured:
    """From how many bytes on stores past the caches win, the next reader included, of some parts of the last cache.

    The default where it lies between those that lose and those that win.
    """
    cache, seconds = tuning.last_cache_bytes(), {}
    default, lost = cache // 4 * 5, 0
    for part in _PARTS_OF_CACHE:
        moved = int(part * cache)
        if moved > _MOST_BYTES:
            break
        x, out, shift, scale = _operands(moved // 8, 1024)

        def call(x=x, out=out, shift=shift, scale=scale) -> None:
            with torch.no_grad():
                adaln(x, shift, scale, out=out)
                out.sum()

        mib = moved >> 20
        cached, past = f"{mib} MiB, into the caches", f"{mib} MiB, past them"
        found = tuning.fastest(
            {cached: _with_size("stream_bytes", 1 << 62, call), past: _with_size("stream_bytes", 1, call)},
            default=past if part > 1 else cached,
            seconds=0.1,
        )
        seconds |= found.seconds
        if not found.settled:
            return tuning.Measured(default, seconds, settled=False)
        if found.chosen == past:
            return tuning.Measured(default if lost < default < moved else moved, seconds)
        lost = moved
    return tuning.Measured(max(default, 2 * lost), seconds)
