"""`make abi`: one binary serves torch 2.13 and 2.14.

Runs this checkout's fastdiff._C, built against the torch in .venv, in a fresh environment with the other torch. Not in
CI: the download is large (several GB).

    python tools/abi.py [torch==2.14.1]
"""

import subprocess
import sys
from pathlib import Path

import torch

import fastdiff

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import torch, fastdiff
from fastdiff import _C
from fastdiff.ops import adaln, gated_residual_adaln
info = _C.build_info()
assert info["torch_at_build"] != torch.__version__, "the same torch: this shows nothing"
x, m = torch.randn(2, 6, 40, requires_grad=True), torch.randn(2, 40, requires_grad=True)
outs = {}
for backend in ("reference", "cpu"):
    with fastdiff.use_backend(backend):
        stream, y = gated_residual_adaln(x, adaln(x, m, None), m, None, m)
        outs[backend] = [stream, y, *torch.autograd.grad((stream * y).sum(), (x, m))]
for a, b in zip(*outs.values()):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
try:
    torch.ops.fastdiff.adaln_forward(x, m[:, :7], None, None, None, False, 1e-6, None)
except RuntimeError as error:
    assert "shift does not fit" in str(error)
else:
    raise AssertionError("a bad call must raise")
torch.compile(adaln, fullgraph=True, backend="aot_eager")(x, m, m).sum().backward()
print(f"built against torch {info['torch_at_build']}, runs on {torch.__version__}: values, gradients, errors, compile")
"""


def main() -> int:
    other = sys.argv[1] if len(sys.argv) > 1 else "torch==2.14.1"
    print(
        f"fastdiff {fastdiff.__version__}, built against torch {torch.__version__}; installing {other} ...", flush=True
    )
    environment = ROOT / "build" / "abi" / other.replace("=", "_")
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", other, "numpy"], check=True)
    # The package as it lies here, binaries included: nothing is built again.
    site = Path(
        subprocess.check_output([str(python), "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    target = site / "fastdiff"
    subprocess.run(["rm", "-rf", str(target)], check=True)
    subprocess.run(["cp", "-r", str(ROOT / "fastdiff"), str(target)], check=True)
    subprocess.run(["cp", "-r", str(ROOT / "kernels"), str(target / "kernels")], check=True)
    return subprocess.run([str(python), "-c", CHECK], cwd="/").returncode


if __name__ == "__main__":
    sys.exit(main())
