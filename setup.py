"""Drives CMake: setuptools' own extension builder has no flags per file, and each instruction set needs its own.

FASTDIFF_CUDA=0/1          build fastdiff._C_cuda or not; by default it is built where nvcc is found and torch has CUDA
FASTDIFF_CUDA_ARCHS=87;90  architectures with machine code (default: CMakeLists.txt)
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def installed_torch() -> tuple[Path, str, bool]:
    """The torch to build against: its folder, its version, whether it has CUDA.

    Nothing of it is imported, and it is found in build isolation too: pip hides the environment's packages from
    sys.path then, but they still lie where sysconfig says. The stable ABI makes any torch >= 2.13 do.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    folder = next((c for c in candidates if (c / "version.py").is_file()), None)
    if folder is None:
        sys.exit(
            "fastdiff is built against the installed torch, and none is found: first pip install 'torch>=2.13' (and if "
            "it is installed, pass --no-build-isolation)"
        )
    facts: dict[str, str | None] = {}
    exec((folder / "version.py").read_text(), facts)  # a few assignments, written by torch's own build
    if tuple(int(part) for part in facts["__version__"].split("+")[0].split(".")[:2]) < (2, 13):
        sys.exit(f"fastdiff needs torch >= 2.13 and found {facts['__version__']}: pip install 'torch>=2.13'")
    return folder, str(facts["__version__"]), facts.get("cuda") is not None


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

        torch_dir, torch_version, torch_has_cuda = installed_torch()
        cuda = wants_cuda(torch_has_cuda)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sys.platform}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # pip's build environments come and go
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
