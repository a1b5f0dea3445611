"""The sizes at which CPU kernels take a second thread, and store past the caches: measured on the machine.

They never change what is computed (kernels/common/tuning.h), so that they belong to the process, not to a run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import tuning
from fastdiff.ops import _native
from fastdiff.ops.adaln import adaln

_ELEMENTS = (1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
_PARTS_OF_CACHE = (0.25, 0.5, 1.0, 2.0)
_MOST_BYTES = 1 << 28  # of a call that is tried: larger caches are taken at their word


def measure_sizes() -> None:
    """Measures both sizes, where they are not known of this machine, and gives them to the kernels."""
    native = _native.cpu_module
    if native is None or not tuning.enabled():
        return
    try:
        if torch.get_num_threads() > 1:
            tuning.answer("thread_grain", native.tuning()["thread_grain"], _measure_grain)
        if tuning.last_cache_bytes() is not None:
            tuning.answer("stream_bytes", tuning.last_cache_bytes() // 4 * 5, _measure_stream)
    finally:
        tuning.apply_sizes(native)


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
        if found.chosen == both:
            break
    return tuning.Measured(elements // 2, {name: each / 10 for name, each in seconds.items()})


def _measure_stream() -> tuning.Measured:
    """The least bytes, of some parts of the last cache, from which stores past it win, the next reader included."""
    cache, seconds = tuning.last_cache_bytes(), {}
    chosen = cache // 4 * 5
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
        if found.chosen == past:
            chosen = moved
            break
    return tuning.Measured(chosen, seconds)
