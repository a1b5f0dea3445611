"""The CPU kernels compiled for aarch64 (NEON through the baseline's vectors) and run under qemu."""

import functools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from fastdiff import use_backend
from fastdiff.kernels.adaln import reference
from fastdiff.kernels.qgfd import reference as qgfd_reference
from fastdiff.ops import eos_log_prob_from_logits, sample_tokens
from ops.unmask_cases import MASK, NUMBERS, ORDERS, RULES, problem

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels/common/dtype.h


def build(folder: Path, kernel: str, main: str) -> Path:
    """The program `main` with kernels/<kernel>_cpu.inl compiled for the baseline."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"NOT TESTED: no {' and '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user-static")
    baseline = folder / "baseline.cpp"
    baseline.write_text(
        f'#define FASTDIFF_ISA baseline\n#define FASTDIFF_ISA_BASELINE\n#include "kernels/{kernel}_cpu.inl"\n'
    )
    others = (f"tests/ops/{main}", f"kernels/{kernel}_cpu.cpp", "kernels/common/isa.cpp", "kernels/common/tuning.cpp")
    sources = [baseline, *(ROOT / name for name in others)]
    flags = ["-std=c++20", "-O2", "-fno-math-errno", "-static", f"-I{ROOT}"]
    subprocess.run([TOOLS[0], *flags, *map(str, sources), "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.fixture(scope="module")
def under_qemu(tmp_path_factory):
    """under_qemu(program, input) → what it writes; a program is built at its first call."""
    kernels = {
        "adaln": "adaln/adaln",
        "token_sampling": "token_sampling/token_sampling",
        "unmask": "unmask/unmask",
        "eos_log_prob": "eos_log_prob/eos_log_prob",
        "qgfd": "qgfd/qgfd",
    }

    @functools.cache
    def program(name: str) -> Path:
        return build(tmp_path_factory.mktemp(name), kernels[name], f"aarch64_{name}.cpp")

    def run(name: str, data: bytes) -> bytearray:
        command = [TOOLS[1], str(program(name))]
        return bytearray(subprocess.run(command, input=data, capture_output=True, check=True).stdout)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "dim", "rms"), [(5, 77, False), (3, 384, True), (2, 1, False), (9, 7, True)])
def test_adaln_under_qemu(under_qemu, dtype, tokens, dim, rms):
    generator = torch.Generator().manual_seed(dim)
    operands = [torch.randn(s, generator=generator).to(dtype) for s in [(tokens, dim)] * 2 + [(1, dim)] * 3]
    data = struct.pack("4q", tokens, dim, DTYPES[dtype], rms)
    data += b"".join(t.view(torch.uint8).numpy().tobytes() for t in operands)
    done = under_qemu("adaln", data)
    stream, out = torch.frombuffer(done, dtype=dtype).view(2, 1, tokens, dim)
    x, branch, gate, shift, scale = (t.double() for t in operands)
    exact = reference.gated_residual_adaln(x[None], branch[None], gate, shift, scale, norm="rms" if rms else "layer")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(stream.double(), exact[0], rtol=eps, atol=eps)
    # The norm sees the rounded stream, hence from that.
    normed = reference.adaln(stream.double(), shift, scale, norm="rms" if rms else "layer")
    torch.testing.assert_close(out.double(), normed, rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("kind", ["plain", "ties", "odd values"])
@pytest.mark.parametrize("rule", RULES)
def test_unmask_under_qemu(under_qemu, rule, kind):
    p, batch, length = problem(kind, 4, 50), 4, 50
    values = torch.full((batch,), float(NUMBERS[rule]))
    for order in ORDERS:
        data = struct.pack("6q", batch, length, RULES.index(rule), ORDERS.index(order), 5, MASK)
        data += b"".join(t.numpy().tobytes() for t in (p.token_ids, *p.sample[:4], values))
        done = under_qemu("unmask", data)
        out = torch.frombuffer(done, dtype=torch.int64)
        expected, committed = p.expected(rule, order, values, seed=5)
        assert torch.equal(out[:-batch].view(batch, length), expected) and torch.equal(out[-batch:], committed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab", "temperature", "top_k", "top_p"), [(5, 0.0, 0, 1.0), (1500, 0.8, 0, 1.0), (17000, 1.0, 500, 0.9)]
)
def test_sample_tokens_under_qemu(under_qemu, dtype, vocab, temperature, top_k, top_p):
    logits = (torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)
    data = struct.pack("4q2d", 3, vocab, DTYPES[dtype], top_k, temperature, top_p)
    done = under_qemu("token_sampling", data + logits.view(torch.uint8).numpy().tobytes())
    token = torch.frombuffer(done, dtype=torch.int64, count=3)
    floats = torch.frombuffer(done, dtype=torch.float32, offset=24).view(3, 3)
    with use_backend("reference"):
        exact = sample_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=1)
    assert torch.equal(token, exact.token)
    for result, truth in zip(floats, exact[1:4], strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 1500, 3001])
def test_eos_log_prob_under_qemu(under_qemu, dtype, vocab):
    end, suppressed, rows = (0, vocab - 1), (1, vocab // 2), 300  # more rows than a tile holds
    logits = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 6).to(dtype)
    excluded = sorted({*end, *suppressed})
    data = struct.pack(f"{7 + len(excluded)}q", rows, vocab, DTYPES[dtype], 2, len(excluded), *end, *excluded)
    done = under_qemu("eos_log_prob", data + logits.view(torch.uint8).numpy().tobytes())
    from_logits, from_hidden = torch.frombuffer(done, dtype=torch.float32).view(2, rows)
    with use_backend("reference"):
        exact = eos_log_prob_from_logits(logits, end, suppress_tokens=suppressed)
    torch.testing.assert_close(from_logits, exact, rtol=1e-6, atol=0)
    assert torch.equal(from_logits, from_hidden)


# |result - exact| / |exact| in norms; the largest seen: 4.3e-7, 2.8e-3, 5.6e-4
QGFD_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1.1e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "length", "dim", "recurrence", "causal"),
    [(8, 70, 40, "power", False), (2, 150, 16, "restart", True), (1, 3, 9, "power", False)],
)
def test_qgfd_under_qemu(under_qemu, dtype, heads, length, dim, recurrence, causal):
    """Eight heads keep their weights; two share the threads, and make them again."""
    generator = torch.Generator().manual_seed(length)
    operands = [torch.randn(heads, length, dim, generator=generator).to(dtype) for _ in range(4)]
    data = struct.pack("8q", heads, length, dim, DTYPES[dtype], 3, 1 if recurrence == "restart" else 2, 2, causal)
    data += b"".join(t.view(torch.uint8).numpy().tobytes() for t in operands)
    done = torch.frombuffer(under_qemu("qgfd", data), dtype=dtype).view(4, length, heads, dim)
    leaves = [t.double().requires_grad_() for t in operands[:3]]
    out = qgfd_reference.qgfd_attention(
        *(t[None] for t in leaves), steps=2, alpha=0.5, recurrence=recurrence, scale=0.25, is_causal=causal
    )[0]
    exact = (out, *torch.autograd.grad(out, leaves, operands[3].double()))
    for result, truth in zip(done.transpose(1, 2).double(), exact, strict=True):
        error = (result - truth).norm() / truth.norm()
        assert error <= QGFD_TOLERANCE[dtype], error
