"""The CPU kernels compiled for aarch64 (NEON through the baseline's vectors) and run under qemu."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from fastdiff import use_backend
from fastdiff.kernels.adaln import reference
from fastdiff.ops import sample_tokens

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels/common/dtype.h


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"NOT TESTED: no {' and '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user-static")
    folder = tmp_path_factory.mktemp("aarch64")
    sources = [ROOT / "tests/ops/aarch64_main.cpp", ROOT / "kernels/common/isa.cpp"]
    for op in ("adaln", "token_sampling"):
        kernel = folder / f"{op}_baseline.cpp"
        kernel.write_text(
            f'#define FASTDIFF_ISA baseline\n#define FASTDIFF_ISA_BASELINE\n#include "kernels/{op}/{op}_cpu.inl"\n'
        )
        sources += [kernel, ROOT / f"kernels/{op}/{op}_cpu.cpp"]
    flags = ["-std=c++20", "-O2", "-fno-math-errno", "-static", f"-I{ROOT}"]
    subprocess.run([TOOLS[0], *flags, *map(str, sources), "-o", str(folder / "kernels")], check=True)
    return folder / "kernels"


def run(program: Path, operator: str, data: bytes) -> bytes:
    return subprocess.run([TOOLS[1], str(program), operator], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "dim", "rms"), [(5, 77, False), (3, 384, True), (2, 1, False), (9, 7, True)])
def test_adaln_under_qemu(program, dtype, tokens, dim, rms):
    generator = torch.Generator().manual_seed(dim)
    operands = [torch.randn(s, generator=generator).to(dtype) for s in [(tokens, dim)] * 2 + [(1, dim)] * 3]
    data = struct.pack("4q", tokens, dim, DTYPES[dtype], rms)
    data += b"".join(t.view(torch.uint8).numpy().tobytes() for t in operands)
    done = run(program, "adaln", data)
    stream, out = torch.frombuffer(bytearray(done), dtype=dtype).view(2, 1, tokens, dim)
    x, branch, gate, shift, scale = (t.double() for t in operands)
    exact = reference.gated_residual_adaln(x[None], branch[None], gate, shift, scale, norm="rms" if rms else "layer")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(stream.double(), exact[0], rtol=eps, atol=eps)
    # The norm sees the rounded stream, hence from that.
    normed = reference.adaln(stream.double(), shift, scale, norm="rms" if rms else "layer")
    torch.testing.assert_close(out.double(), normed, rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab", "temperature", "top_k", "top_p"), [(5, 0.0, 0, 1.0), (1500, 0.8, 0, 1.0), (17000, 1.0, 500, 0.9)]
)
def test_sample_tokens_under_qemu(program, dtype, vocab, temperature, top_k, top_p):
    logits = (torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)
    data = struct.pack("4q2d", 3, vocab, DTYPES[dtype], top_k, temperature, top_p)
    done = bytearray(run(program, "sample_tokens", data + logits.view(torch.uint8).numpy().tobytes()))
    token = torch.frombuffer(done, dtype=torch.int64, count=3)
    floats = torch.frombuffer(done, dtype=torch.float32, offset=24).view(3, 3)
    with use_backend("reference"):
        exact = sample_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=1)
    assert torch.equal(token, exact.token)
    for result, truth in zip(floats, exact[1:4], strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-6, atol=1e-8)
