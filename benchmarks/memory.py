"""Peak memory of a call, measured in a process of its own: what the operating system had to give it at most.

    python benchmarks/memory.py SETUP CALL

runs SETUP, then CALL in a fresh process, and prints how far CALL raised the peak of the process's memory, in bytes:
torch's tensors and the kernel's own buffers alike. Large blocks go back to the system when they are freed, so that what
SETUP freed does not hide what CALL takes; what a library keeps for good (a product's buffers, code) SETUP can have.
"""

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import resource
import torch
torch.set_num_threads({threads})
import fastdiff
{setup}
warm = torch.randn(64, 64) @ torch.randn(64, 64)  # starts the thread pool
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
{call}
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
print(peak - before)
"""


def peak_bytes(setup: str, call: str, threads: int) -> int:
    """Bytes that `call` (Python source) needs beyond what is there after `setup`."""
    program = _PROGRAM.format(setup=setup, call=call, threads=threads)
    here = Path(__file__).parent
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=here, env=os.environ | returned
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    print(peak_bytes(sys.argv[1], sys.argv[2], 2))
