"""The three constants that every prediction is made of: copy bandwidth, the gap between kernels, the matrix peak."""

import torch

from gpu_steps.bench import Bench


def run(bench: Bench) -> None:
    bytes_of_copy = 1_000_000 if bench.small else 1_000_000_000
    source = torch.randint(-128, 128, (bytes_of_copy,), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    seconds, _ = bench.on.seconds([lambda: target.copy_(source)])
    bench.record.value(
        f"copy of {bytes_of_copy / 1e9:g} GB, read and written", 2 * bytes_of_copy / seconds, "B/s", "copy"
    )

    size = 64 if bench.small else 8192
    a, b = bench.randn(size, size), bench.randn(size, size)
    seconds, _ = bench.on.seconds([lambda: a @ b])
    bench.record.value(f"bf16 matrix product {size}³, random numbers", 2 * size**3 / seconds, "FLOP/s", "products")

    one = torch.zeros(1, device=bench.device)
    calls = [lambda: one.add_(1)] * (2 if bench.small else 200)
    seconds, _ = bench.on.seconds(calls)
    bench.record.value("a kernel of one element, in a graph", seconds, "s")
    queued, whole = bench.on.wall(calls[0], 1000)
    bench.record.value("the same called from Python: the host's time", queued, "s")
    bench.record.value("the same called from Python: until it is done", whole, "s")
