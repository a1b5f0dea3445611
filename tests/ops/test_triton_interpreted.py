"""The Triton kernels on a machine without a GPU: interpreted_adaln.py and a few cases of the harness, interpreted.

The interpreter has to be chosen before Triton is imported, so these tests have a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HARNESS = "triton and (f32-bf16-autocast and (dim384 or unaligned) or alone or export)"


def run_interpreted(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_launch_functions():
    pytest.importorskip("triton")
    run_interpreted(str(HERE / "interpreted_adaln.py"))


def test_harness_row():
    pytest.importorskip("triton")
    run_interpreted(str(HERE / "test_operators.py"), "-k", HARNESS)
