"""The Triton kernels on a machine without a GPU: interpreted_*.py and a few cases of the harness, interpreted.

The interpreter has to be chosen before Triton is imported, so these tests have a process of their own: one for all,
since to start it takes longer than most of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HARNESS = (
    "triton and (adaln and (f32-bf16-autocast and (dim384 or unaligned) or alone or export)"
    " or test_values and f32-f32 and (sample and (unaligned or peaked or dim77) or masked and (prime or smoothing)"
    " or eos and (unaligned or peaked or dim77) or qgfd and (key-sink or turned or without) or scale_shift"
    " or bias_activation and (odd or swiglu))"
    " or test_values and bf16-bf16 and qgfd and (varlen-causal or grouped-t))"
)


@pytest.mark.timeout(1800)
def test_kernels_interpreted():
    pytest.importorskip("triton", reason="NOT TESTED: the Triton kernels: triton is not installed (the extra 'triton')")
    files = [*sorted(HERE.glob("interpreted_*.py")), HERE / "test_operators.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", f"interpreted_ or ({HARNESS})"]
    command += map(str, files)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    for file in files:  # of each something was run
        assert f"{file.name} " in result.stdout, file.name
