"""The CPU kernels compiled for aarch64 (NEON through the baseline's vectors) and run under qemu."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from fastdiff.kernels.adaln import reference

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels/common/dtype.h


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"NOT TESTED: no {' and '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user-static")
    folder = tmp_path_factory.mktemp("aarch64")
    kernel = folder / "baseline.cpp"
    kernel.write_text(
        '#define FASTDIFF_ISA baseline\n#define FASTDIFF_ISA_BASELINE\n#include "kernels/adaln/adaln_cpu.inl"\n'
    )
    sources = [
        kernel,
        *(ROOT / s for s in ("tests/ops/aarch64_main.cpp", "kernels/adaln/adaln_cpu.cpp", "kernels/common/isa.cpp")),
    ]
    flags = ["-std=c++20", "-O2", "-fno-math-errno", "-static", f"-I{ROOT}"]
    subprocess.run([TOOLS[0], *flags, *map(str, sources), "-o", str(folder / "adaln")], check=True)
    return folder / "adaln"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "dim", "rms"), [(5, 77, False), (3, 384, True), (2, 1, False), (9, 7, True)])
def test_forward_under_qemu(program, dtype, tokens, dim, rms):
    generator = torch.Generator().manual_seed(dim)
    operands = [torch.randn(s, generator=generator).to(dtype) for s in [(tokens, dim)] * 2 + [(1, dim)] * 3]
    data = struct.pack("4q", tokens, dim, DTYPES[dtype], rms)
    data += b"".join(t.view(torch.uint8).numpy().tobytes() for t in operands)
    done = subprocess.run([TOOLS[1], str(program)], input=data, capture_output=True, check=True)
    stream, out = torch.frombuffer(bytearray(done.stdout), dtype=dtype).view(2, 1, tokens, dim)
    x, branch, gate, shift, scale = (t.double() for t in operands)
    exact = reference.gated_residual_adaln(x[None], branch[None], gate, shift, scale, norm="rms" if rms else "layer")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(stream.double(), exact[0], rtol=eps, atol=eps)
    # The norm sees the rounded stream, hence from that.
    normed = reference.adaln(stream.double(), shift, scale, norm="rms" if rms else "layer")
    torch.testing.assert_close(out.double(), normed, rtol=4 * eps, atol=16 * eps)
