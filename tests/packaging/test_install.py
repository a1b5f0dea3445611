"""What a person meets when installing: messages, archives, and an import that needs no GPU, nvcc or Triton."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fastdiff.ops import _native

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)


def test_an_older_torch_is_named_in_one_sentence():
    done = python("import torch; torch.__version__ = '2.9.1+cpu'; import fastdiff")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fastdiff 0.1.0 needs torch >= 2.10 and found 2.9.1+cpu; run: pip install")


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """The part of a checkout that is read before anything is installed."""
    for name in ("fastdiff/__init__.py", "fastdiff/version.py", "fastdiff/train.py", "kernels/adaln/adaln.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def without_packages(folder: Path, *arguments: str) -> list[str]:
    """What a Python without any installed package says on stderr, in lines."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-S", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.splitlines()


@pytest.mark.parametrize("module", ["fastdiff", "fastdiff.train"])
def test_a_checkout_that_is_not_installed_says_what_to_do(bare_checkout, module):
    (line,) = without_packages(bare_checkout, "-m", module)
    for part in (str(bare_checkout), "activate", "pip install -e .", "leave this folder", "python -P"):
        assert part in line
    assert line.count("fastdiff was found") == 1
    last = without_packages(bare_checkout, "-c", "import fastdiff")[-1]
    assert last.startswith("ImportError: fastdiff was found in its source checkout")


def test_a_python_without_torch_says_what_to_do(bare_checkout):
    (bare_checkout / "kernels").rename(bare_checkout / "fastdiff" / "kernels")  # as in an installed package
    (line,) = without_packages(bare_checkout, "-m", "fastdiff.train")
    assert "fastdiff needs torch, which " in line and "pip install 'torch>=2.10'" in line


def test_import_needs_no_triton_and_no_compiled_module():
    code = """
import importlib.util, sys
hidden = ("triton", "fastdiff._C", "fastdiff._C_cuda")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in hidden else find(name, package)
import torch, fastdiff
from fastdiff.ops import adaln
x = torch.randn(1, 4, 8)
print(adaln(x, None, None).shape, "triton" in sys.modules)
try:
    with fastdiff.use_backend("cpu"):
        adaln(x, None, None)
except fastdiff.BackendError as error:
    print(error)
"""
    done = python(code)
    assert "torch.Size([1, 4, 8]) False" in done.stdout, done.stderr
    assert "backend 'cpu' was asked for and cannot run: fastdiff._C was not built; run: pip install" in done.stdout


def test_info_names_every_backend_and_its_reasons():
    done = subprocess.run([sys.executable, "-m", "fastdiff.info"], capture_output=True, text=True, check=True)
    for line in (
        "fastdiff.ops.adaln",
        "fastdiff.ops.gated_residual_adaln",
        "instruction set: ",
        "CUDA module: ",
        "CPU features: ",
    ):
        assert line in done.stdout
    reasons = [line for line in done.stdout.splitlines() if "cannot run" in line]
    assert len(reasons) == len(set(reasons))  # of operators that are alike it is said once
    assert "triton     cannot run: the tensors are on 'cpu'" in done.stdout or "GPU: none" not in done.stdout


def test_the_cuda_module_loads_without_a_gpu():
    if os.environ.get("FASTDIFF_CUDA") == "1":
        assert _native.cuda_module is not None, _native.cuda_missing  # CI builds it: it must be there
    elif _native.cuda_module is None:
        pytest.skip(f"NOT TESTED: the CUDA module: {_native.cuda_missing}")
    assert "87" in _native.cuda_module.architectures.split(",")
    import torch

    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastdiff::adaln_forward", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastdiff::gated_residual_adaln_backward", "CUDA")
    assert _native.cuda_module.finds_stream() == (torch.version.cuda is not None)


def test_the_oldest_torch_is_said_alike_everywhere():
    for name, pattern in {
        "pyproject.toml": r'"torch>=(\d+)\.(\d+)"',
        "setup.py": r"< \((\d+), (\d+)\):",
        "CMakeLists.txt": r'FASTDIFF_OLDEST_TORCH "(\d+)\.(\d+)"',
        "fastdiff/__init__.py": r"_MINIMUM_TORCH = \((\d+), (\d+)\)",
        "docs/installation.md": r"torch >= (\d+)\.(\d+)",
    }.items():
        assert re.findall(pattern, (ROOT / name).read_text()) == [("2", "10")], name


def test_kernel_headers_know_no_torch():
    for path in (ROOT / "kernels").rglob("*"):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".inl"):
            assert "torch/" not in path.read_text(), path


def test_instruction_set_files_use_no_std_headers():
    """Weak symbols of std templates would be merged across instruction sets."""
    for path in [ROOT / "kernels/common/vec.h", *(ROOT / "kernels").rglob("*.inl")]:
        for line in path.read_text().splitlines():
            if line.startswith("#include <"):
                assert line.endswith(".h>"), f"{path}: {line}"
            assert "std::" not in line, f"{path}: {line}"


def test_every_dependency_that_is_installed_is_pinned():
    tomllib = pytest.importorskip("tomllib", reason="NOT TESTED: Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = project["dependencies"] + [d for group in project["optional-dependencies"].values() for d in group]
    names = {d.split(";")[0].split("[")[0].split(">")[0].strip().lower() for d in wanted}
    assert names - {"fastdiff-kernels"} <= pins


def test_source_distribution_holds_all_that_a_build_needs(tmp_path):
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"FASTDIFF_CUDA": "0"})
    (archive,) = tmp_path.glob("fastdiff_kernels-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    tracked = subprocess.run(
        ["git", "ls-files", "kernels", "csrc", "fastdiff", "recipes"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode != 0:
        pytest.skip("NOT TESTED: no git here to say which files there are")
    assert set(tracked.stdout.split()) <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} <= names
