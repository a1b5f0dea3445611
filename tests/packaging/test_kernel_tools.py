"""tools/kernels.py must fail on what it is there to find."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> ModuleType:
    """tools/<name>.py as a module; not by import, as kernels is also a folder of the repository."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kernels = tool("kernels")

GOOD = {
    "backend": "cuda", "kernel": "k", "arch": 90, "registers": 64, "stack": 0, "spill_bytes": 0, "shared_bytes": 1024,
    "threads": 256,
}  # fmt: skip

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 768 bytes smem, 584 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3twov' for 'sm_90a'
ptxas info    : Function properties for _Z3twov
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""

PTX = """
.visible .entry _Z3onev(
	.param .align 8 .b8 _Z3onev_param_0[224]
)
.maxntid 256
.minnctapersm 3
{
}
.visible .entry _Z3twov(.param .u64 p)
{
}
.visible .entry _Z5three(.param .u64 p)
.maxntid 32, 8, 2
{
}
"""

SPILLING = """
__global__ void __launch_bounds__(1024) spills(const float* in, float* out, int n) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = in[i * n + threadIdx.x];
  for (int round = 0; round < n; ++round) {
#pragma unroll
    for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i + 1) % 96] + v[(i + 7) % 96];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) out[i * n + threadIdx.x] = v[i];
}
"""


def test_good_rows_pass():
    # exactly at the limits: 65 536 registers, all of the chip's shared memory
    rows = [GOOD, GOOD | {"arch": 120, "shared_bytes": 99 * 1024}, GOOD | {"registers": 64, "threads": 1024}]
    assert kernels.problems(rows) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spill_bytes": 4}, "cuda k on sm_90: 4 bytes of register spills"),
        ({"stack": 32}, "cuda k on sm_90: a stack of 32 bytes"),
        ({"shared_bytes": 227 * 1024 + 1}, "cuda k on sm_90: 232449 bytes of shared memory, the limit is 232448"),
        ({"arch": 120, "shared_bytes": 100 * 1024}, "102400 bytes of shared memory, the limit is 101376"),
        ({"arch": 87, "shared_bytes": 164 * 1024}, "167936 bytes of shared memory, the limit is 166912"),
        ({"registers": 65, "threads": 1024}, "65 registers x 1024 threads > 65536"),
        # registers are allocated in eights: 129 are 136, and 136 x 512 is too many
        ({"registers": 129, "threads": 512}, "129 registers x 512 threads > 65536"),
        ({"arch": 75}, "limit of this chip is not known"),
    ],
)
def test_each_offence_is_named(change, message):
    (found,) = kernels.problems([GOOD, GOOD | change])
    assert message in found
    assert found in kernels.markdown([GOOD, GOOD | change], [found])


def test_ptxas_log_and_launch_bounds_are_read():
    threads = kernels.max_threads(PTX)
    assert threads == {"_Z3onev": 256, "_Z3twov": 1024, "_Z5three": 512}
    one, two = kernels.parse_ptxas(PTXAS, threads)
    assert one == GOOD | {"kernel": "_Z3onev", "arch": 80, "registers": 40, "shared_bytes": 768}
    assert (two["arch"], two["stack"], two["spill_bytes"], two["shared_bytes"], two["threads"]) == (90, 16, 20, 0, 1024)


@pytest.mark.parametrize("log", ["", PTXAS.replace("Used 40", "Needs 40")])
def test_a_log_that_lacks_numbers_is_an_error(log):
    with pytest.raises(ValueError, match="ptxas"):
        kernels.parse_ptxas(log, kernels.max_threads(PTX))


def test_a_spilling_kernel_fails_the_command(tmp_path, capsys):
    source = tmp_path / "spills.cu"
    source.write_text(SPILLING)
    status = kernels.main(["--targets", "90", "--skip-triton", "--output", str(tmp_path), str(source)])
    if status == 2:
        pytest.skip(f"NOT TESTED: the resources of GPU kernels: {capsys.readouterr().err.strip()}")
    assert status == 1
    assert "FAILED: cuda spills on sm_90:" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "kernels.json").read_text())
    assert row["spill_bytes"] > 0 and row["registers"] == 64 and row["threads"] == 1024
    assert "register spills" in (tmp_path / "kernels.md").read_text()


def test_adaln_fits_the_smallest_target(tmp_path, capsys):
    source = ROOT / "kernels" / "adaln" / "adaln.cu"
    status = kernels.main(["--targets", "87", "--skip-triton", "--output", str(tmp_path), str(source)])
    if status == 2:
        pytest.skip(f"NOT TESTED: the resources of GPU kernels: {capsys.readouterr().err.strip()}")
    assert status == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["arch"] for row in rows} == {87} and all(row["spill_bytes"] == 0 for row in rows)
    assert "adaln_forward_kernel<float, 4, 2>" in {row["kernel"] for row in rows}
