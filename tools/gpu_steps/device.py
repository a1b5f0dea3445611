"""Where steps run: a GPU, or a CPU that stands in for one so that every step can be executed where there is none.

A function is timed inside a CUDA graph of many calls, by CUDA events around the graph's replays: no host time counts.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Function = Callable[[], object]
CALLS = 20  # in a graph, where a call is short
GRAPH_SECONDS = 10e-3  # of one replay, about: longer calls are fewer in a graph
REPLAY_SECONDS = 60e-3  # of all replays of one function, about
FOOTPRINT = 200e6  # bytes that the calls of a graph go through in turns: more than any L2 cache holds
MOST_SETS = 200


class Cuda:
    """The GPU. `backends` are those of fastdiff, by the name that the report gives them."""

    name, small = "cuda", False
    backends = {"cuda": "cuda", "triton": "triton"}
    compile_options = {"dynamic": False}  # of torch.compile

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.stream = torch.cuda.Stream()  # not the default one: all that is timed runs on it
        torch.cuda.set_stream(self.stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def sets(self, bytes_of_one: float) -> int:
        """How many sets of inputs the calls of a graph go through in turns, so that none is still in the L2 cache."""
        return max(1, min(MOST_SETS, round(FOOTPRINT / max(bytes_of_one, 1))))

    def _events(self, function: Function, times: int) -> list[float]:
        """Seconds of each of some calls, one after the other."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in zip(events, events[1:], strict=False)]

    def graph(self, functions: Sequence[Function], calls: int) -> Function:
        """Replays so many calls, captured in a CUDA graph; they must have run before."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(calls):
                functions[i % len(functions)]()
        return graph.replay

    def seconds(self, functions: Sequence[Function], capturable: bool = True) -> tuple[float, str]:
        """(Median seconds of one call, how it was timed where not in a graph). Functions are called in turns."""
        for function in (functions[0], functions[0], *functions[1:]):  # compiles, loads modules, fills caches
            function()
        once = min(self._events(functions[0], 3))
        calls = max(1, min(max(CALLS, len(functions)), round(GRAPH_SECONDS / once)))
        replay = None
        if capturable:
            try:
                replay = self.graph(functions, calls)
                replay()
            except RuntimeError as error:  # it waits for the device, say
                print(f"not captured in a graph: {error}", flush=True)
                replay = None
                torch.cuda.synchronize()
        if replay is None:
            times = self._events(functions[0], max(3, min(20, round(REPLAY_SECONDS / once))))
            return statistics.median(times), "without a graph"
        times = self._events(replay, max(3, min(20, round(REPLAY_SECONDS / (once * calls)))))
        return statistics.median(times) / calls, ""

    def wall(self, function: Function, calls: int) -> tuple[float, float]:
        """(Seconds of the host until it has queued a call, seconds until the device has finished one)."""
        return _wall(function, calls, torch.cuda.synchronize)

    def memory(self) -> float:
        """GiB that torch's allocator has held at most."""
        return torch.cuda.max_memory_allocated() / 2**30

    def forget(self) -> None:
        """Frees what was held for the calls before, and what torch keeps for later ones."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class StandIn:
    """The CPU in a GPU's place: `cuda` is the CPU backend, `triton` runs in its interpreter, times mean nothing."""

    name, small = "cpu", True
    compile_options = {"dynamic": False, "backend": "aot_eager"}  # Inductor would call a C++ compiler for minutes

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.backends = {"cuda": "cpu"} | ({"triton": "triton"} if interpreted else {})

    def synchronize(self) -> None:
        pass

    def sets(self, bytes_of_one: float) -> int:
        return 2

    def graph(self, functions: Sequence[Function], calls: int) -> Function:
        def replay() -> None:
            for i in range(calls):
                functions[i % len(functions)]()

        return replay

    def seconds(self, functions: Sequence[Function], capturable: bool = True) -> tuple[float, str]:
        start = time.perf_counter()
        self.graph(functions, len(functions))()
        return (time.perf_counter() - start) / len(functions), "stand-in"

    def wall(self, function: Function, calls: int) -> tuple[float, float]:
        return _wall(function, 2, self.synchronize)

    def memory(self) -> float:
        return 0.0

    def forget(self) -> None:
        pass


def _wall(function: Function, calls: int, synchronize: Function) -> tuple[float, float]:
    function()
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    queued = time.perf_counter() - start
    synchronize()
    return queued / calls, (time.perf_counter() - start) / calls


def device_named(name: str) -> Cuda | StandIn:
    return Cuda() if name == "cuda" else StandIn()
