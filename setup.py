"""Drives CMake: setuptools' own extension builder has no flags per file, and each instruction set needs its own.

FASTDIFF_CUDA=0/1          build fastdiff._C_cuda or not; by default it is built where nvcc is found and torch has CUDA
FASTDIFF_CUDA_ARCHS=87;90  architectures with machine code (default: CMakeLists.txt)
MAX_JOBS=2                 so many compilers at once, as in other extensions of torch (default: one a CPU)
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# In LDFLAGS, too: GCC's -ffast-math there makes all of a process flush subnormal numbers to zero.
UNUSED_FLAGS = ("CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")


def installed_torch() -> tuple[Path, str, bool]:
    """The torch to build against: its folder, its version, whether it has CUDA.

    Nothing of it is imported, and it is found in build isolation too: pip hides the environment's packages from
    sys.path then, but they still lie where sysconfig says. The stable ABI makes any torch >= 2.10 do.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    folder = next((c for c in candidates if (c / "version.py").is_file()), None)
    if folder is None:
        sys.exit(
            "fastdiff is built against the installed torch, and none is found: first pip install 'torch>=2.10' (and if "
            "it is installed, pass --no-build-isolation)"
        )
    facts: dict[str, str | None] = {}
    exec((folder / "version.py").read_text(), facts)  # a few assignments, written by torch's own build
    if tuple(int(part) for part in facts["__version__"].split("+")[0].split(".")[:2]) < (2, 10):
        sys.exit(f"fastdiff needs torch >= 2.10 and found {facts['__version__']}: pip install 'torch>=2.10'")
    return folder, str(facts["__version__"]), facts.get("cuda") is not None


def wants_cuda(torch_has_cuda: bool) -> bool:
    asked = os.environ.get("FASTDIFF_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"FASTDIFF_CUDA is {asked!r}; expected 0 or 1")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if asked == "1" and nvcc is None:
        sys.exit("FASTDIFF_CUDA=1 needs nvcc, and none is on PATH or under CUDA_HOME: install the CUDA toolkit")
    return asked == "1" or (asked == "" and torch_has_cuda and nvcc is not None)


def tool(*names: str) -> str | None:
    """The first of some programs that is on PATH, or beside this Python: there where its environment is not entered."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def needed_tool(*names: str) -> str:
    found = tool(*names)
    if found is None:
        sys.exit(
            f"fastdiff's build needs {names[0]}, and none is on PATH or beside {sys.executable}: pip install {names[0]}"
        )
    return found


def launchers() -> list[str]:
    """ccache in front of the compilers where it is installed. An empty value takes it out of a cache that has it."""
    ccache = tool("ccache") or ""
    if ccache:  # paths within the checkout count relative to it, so that another clone finds the same objects
        os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
    return [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("CXX", "CUDA")]


def check_compilers() -> None:
    """Flags that hide in the name of a compiler, or that nvcc adds by itself, must not reach the kernels either."""
    for name in ("CC", "CXX", "CUDACXX", "CUDAHOSTCXX"):
        flags = [word for word in shlex.split(os.environ.get(name, "")) if word.startswith("-")]
        if flags:
            sys.exit(f"{name} is {os.environ[name]!r}; expected a compiler without flags: leave out {' '.join(flags)}")
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        if re.search(r"fast.?math|-march|-mcpu|-Ofast|-ftz|-prec-", os.environ.get(name, "")):
            sys.exit(f"{name} is {os.environ[name]!r}, which changes results; expected none of such flags: unset it")


def jobs() -> int:
    """How many compilers run at once."""
    asked = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    if not asked.isdecimal() or int(asked) < 1:
        sys.exit(f"MAX_JOBS is {asked!r}; expected a number from 1")
    return int(asked)


def pybind11_folder() -> str:
    try:
        import pybind11
    except ImportError:
        sys.exit(f"fastdiff's build needs pybind11, and {sys.executable} has none: pip install pybind11")
    return pybind11.get_cmake_dir()


def outdated(cache: Path, facts: dict[str, str]) -> bool:
    """Whether CMakeCache.txt speaks of something else: of another folder after a copy or a move, of another torch."""
    if not cache.is_file():
        return False
    entries = dict(re.findall(r"^([\w-]+):\w+=(.*)$", cache.read_text(), re.MULTILINE))
    return any(entries.get(name) != value for name, value in facts.items())


def run(*command: str) -> None:
    if status := subprocess.run(command).returncode:
        sys.exit(f"fastdiff's build: cmake ended with status {status}; what went wrong stands above")


class CMakeBuild(build_ext):
    """Builds all modules in one CMake project and copies them to where setuptools wants them."""

    def run(self) -> None:
        if self.inplace and not WRITABLE:
            sys.exit(f"{ROOT} is read-only, and an editable install writes modules there: pip install it without -e")
        torch_dir, torch_version, torch_has_cuda = installed_torch()
        cuda = wants_cuda(torch_has_cuda)
        build = BUILD / f"cmake-{sys.implementation.cache_tag}-{sys.platform}"
        self.configure(build, torch_dir, torch_version, cuda)
        run(needed_tool("cmake"), "--build", str(build), "--parallel", str(jobs()))
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

    @staticmethod
    def configure(build: Path, torch_dir: Path, torch_version: str, cuda: bool) -> None:
        check_compilers()
        cmake, builder = needed_tool("cmake"), needed_tool("ninja", "make")
        generator = "Ninja" if Path(builder).stem == "ninja" else "Unix Makefiles"
        facts = {
            "CMAKE_HOME_DIRECTORY": str(ROOT),
            "CMAKE_GENERATOR": generator,
            "FASTDIFF_TORCH_DIR": str(torch_dir),
            "FASTDIFF_TORCH_VERSION": torch_version,
        }
        fresh = ["--fresh"] if outdated(build / "CMakeCache.txt", facts) else []
        archs = os.environ.get("FASTDIFF_CUDA_ARCHS", "").replace(",", ";")
        for name in UNUSED_FLAGS:
            if os.environ.get(name):
                print(f"{name} is set and is not used: the kernels of each instruction set have flags of their own")
        build.mkdir(parents=True, exist_ok=True)
        run(
            cmake, "-S", str(ROOT), "-B", str(build), "-G", generator, *fresh,
            f"-DCMAKE_MAKE_PROGRAM={builder}",  # pip's build environments come and go
            # Given, even if empty, since CMake would take CXXFLAGS and CUDAFLAGS of the environment otherwise: with
            # -march=native there would be AVX in the baseline, with -ffast-math other results.
            "-DCMAKE_CXX_FLAGS=", "-DCMAKE_CUDA_FLAGS=", "-DCMAKE_MODULE_LINKER_FLAGS=", "-DCMAKE_SHARED_LINKER_FLAGS=",
            *launchers(),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_folder()}",
            f"-DFASTDIFF_TORCH_DIR={torch_dir}",
            f"-DFASTDIFF_TORCH_VERSION={torch_version}",
            f"-DFASTDIFF_CUDA={'ON' if cuda else 'OFF'}",
            f"-DFASTDIFF_CUDA_ARCHS={archs}" if archs else "-UFASTDIFF_CUDA_ARCHS",
        )  # fmt: skip


WRITABLE = os.access(ROOT, os.W_OK)
# A wheel of a source that cannot be written to is built elsewhere, and what setuptools notes of it with it.
BUILD = ROOT / "build" if WRITABLE else Path(tempfile.mkdtemp(prefix="fastdiff-build-"))

setup(
    options={} if WRITABLE else {"build": {"build_base": str(BUILD)}, "egg_info": {"egg_base": str(BUILD)}},
    # optional: setuptools must not look for _C_cuda where it was not built
    ext_modules=[Extension("fastdiff._C", sources=[]), Extension("fastdiff._C_cuda", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
