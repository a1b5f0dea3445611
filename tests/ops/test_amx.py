"""The CPU kernels for AMX, with plain C++ in place of its tile instructions: no emulator at hand runs those."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastdiff.ops import _native
from ops.test_aarch64 import check_qgfd

ROOT = Path(__file__).resolve().parents[2]
# kernels/CMakeLists.txt's flags, but for -mamx-tile and -mamx-bf16
FLAGS = [
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    *("-std=c++20", "-O1", "-fno-math-errno", "-DFASTDIFF_AMX_TWIN", "-DFASTDIFF_ISA=amx_bf16", f"-I{ROOT}"),
]
# The launch functions without a choice of instruction set; at the end, how often tiles were multiplied.
LAUNCH = """
#include <cstdio>
#include "kernels/qgfd/qgfd_cpu.inl"
namespace fastdiff::cpu {
void qgfd_forward(const QgfdForwardParams& p, const ParallelFor& f) { amx_bf16::qgfd_forward(p, f); }
void qgfd_backward(const QgfdBackwardParams& p, const ParallelFor& f) {
  amx_bf16::qgfd_backward(p, f);
  fprintf(stderr, "%ld", long(amx_bf16::tile_products));
}
}  // namespace fastdiff::cpu
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    isas = _native.cpu_module.isa_names() if _native.cpu_module else []
    if shutil.which("g++") is None or "avx512_bf16" not in isas:
        pytest.skip("NOT TESTED: AMX's tiles in plain C++: needs g++ and a CPU with AVX-512-BF16")
    folder = tmp_path_factory.mktemp("amx")
    (folder / "launch.cpp").write_text(LAUNCH)
    sources = [str(folder / "launch.cpp"), str(ROOT / "tests/ops/aarch64_qgfd.cpp")]
    subprocess.run(["g++", *FLAGS, *sources, "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.mark.parametrize(
    ("heads", "length", "dim", "recurrence", "causal"),
    [
        (2, 100, 64, "power", True),
        (8, 64, 32, "restart", False),
        (1, 150, 40, "power", False),  # 16 steps in tiles, 4 beside them; 32 columns in tiles, 8 beside them
        (1, 33, 24, "restart", True),  # fewer steps than a tile has in scores
    ],
)
def test_qgfd_in_tiles(program, heads, length, dim, recurrence, causal):
    def run(data: bytes) -> bytearray:
        done = subprocess.run([str(program)], input=data, capture_output=True, check=True)
        assert int(done.stderr) > 0, "no tiles were multiplied"
        return bytearray(done.stdout)

    check_qgfd(run, torch.bfloat16, heads, length, dim, recurrence, causal)
