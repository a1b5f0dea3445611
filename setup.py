"""Drives CMake: setuptools' own extension builder has no flags per file, and each instruction set needs its own.

FASTDIFF_CUDA=0/1          build fastdiff._C_cuda or not; by default it is built where nvcc is found and torch has CUDA
FASTDIFF_CUDA_ARCHS=87;90  architectures with machine code (default: CMakeLists.txt)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folder_and_version() -> tuple[Path, str, bool]:
    """The installed torch: its folder, its version, whether it has CUDA."""
    try:
        import torch
    except ImportError:
        sys.exit(
            "fastdiff is built against the installed torch, and none is found here: pip install 'torch>=2.13', then "
            "pip install --no-build-isolation . (with build isolation pip hides torch from the build)"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 13):
        sys.exit(f"fastdiff needs torch >= 2.13 and found {torch.__version__}: pip install 'torch>=2.13'")
    return Path(torch.__file__).parent, torch.__version__, torch.version.cuda is not None


def wants_cuda(torch_has_cuda: bool) -> bool:
    asked = os.environ.get("FASTDIFF_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"FASTDIFF_CUDA is {asked!r}; expected 0 or 1")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if asked == "1" and nvcc is None:
        sys.exit("FASTDIFF_CUDA=1 needs nvcc, and none is on PATH or under CUDA_HOME: install the CUDA toolkit")
    return asked == "1" or (asked == "" and torch_has_cuda and nvcc is not None)


class CMakeBuild(build_ext):
    """Builds all modules in one CMake project and copies them to where setuptools wants them."""

    def run(self) -> None:
        import pybind11

        torch_dir, torch_version, torch_has_cuda = torch_folder_and_version()
        cuda = wants_cuda(torch_has_cuda)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sys.platform}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTDIFF_TORCH_DIR={torch_dir}",
            f"-DFASTDIFF_TORCH_VERSION={torch_version}",
            f"-DFASTDIFF_CUDA={'ON' if cuda else 'OFF'}",
        ]  # fmt: skip
        archs = os.environ.get("FASTDIFF_CUDA_ARCHS")
        if archs:
            configure.append(f"-DFASTDIFF_CUDA_ARCHS={archs.replace(',', ';')}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            target = Path(self.get_ext_fullpath(extension.name)).with_name(Path(self.get_ext_filename(name)).name)
            if self.inplace:
                target = ROOT / "fastdiff" / target.name
            target.unlink(missing_ok=True)
            if name == "_C_cuda" and not cuda:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(build / "modules" / target.name, target)


setup(
    # optional: setuptools must not look for _C_cuda where it was not built
    ext_modules=[Extension("fastdiff._C", sources=[]), Extension("fastdiff._C_cuda", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
