"""Builds both modules for one architecture and puts a package together that Python can import, in build/gpu_report.

With cmake, ninja or make, pybind11 and setuptools this is setup.py's own build. Where one of them is missing the
compilers are called from here, with the flags that the CMake files give: pybind11's headers are in torch, too.
Nothing outside build/ is written, and nothing has to be installed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_COMMON = ("-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
_CUDA = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=2")


class BuildError(RuntimeError):
    """The modules could not be built; the message says what is missing, or the compiler's last words."""


def missing_tools() -> list[str]:
    """What setup.py's build needs and this machine lacks."""
    scripts = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))
    missing = [] if shutil.which("cmake", path=scripts) else ["cmake"]
    if not any(shutil.which(name, path=scripts) for name in ("ninja", "make")):
        missing.append("ninja or make")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python.h (python3-dev)")
    return missing + [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


# ------------------------------------------------------------------------------------------------ without CMake


@dataclass(frozen=True)
class Unit:
    """One source, the object that is made of it, and the module that it goes to."""

    source: Path
    object: Path
    module: str
    flags: tuple[str, ...]

    def command(self, nvcc: str | None) -> list[str]:
        compiler = nvcc if self.source.suffix == ".cu" else os.environ.get("CXX", "g++")
        return [compiler, *self.flags, f"-I{ROOT}", "-c", str(self.source), "-o", str(self.object)]


def isa_flags(cmake: str, operator: str) -> dict[str, tuple[str, ...]]:
    """The compiler flags of each of an operator's instruction sets, as kernels/CMakeLists.txt has them for this CPU."""
    flags: dict[str, tuple[str, ...]] = {"baseline": ()}
    if os.uname().machine != "x86_64":
        return flags
    defined: dict[str, list[str]] = {}
    for name, words in re.findall(r"set\(flags_(\w+) ([^)]*)\)", cmake):
        defined[name] = []
        for word in words.replace('"', "").split():
            other = re.fullmatch(r"\$\{flags_(\w+)\}", word)
            defined[name] += defined[other[1]] if other else [word]
    names = re.search(r"list\(APPEND isas ([^)]*)\)", cmake)[1].split()
    if f"fastdiff_cpu_kernel({operator} ${{isas_of_products}})" in cmake:
        names += re.search(r"list\(APPEND isas_of_products ([^)]*)\)", cmake)[1].split()
    return flags | {name: tuple(defined[name]) for name in names}


def _quoted(name: str, value: str) -> str:
    return f'-D{name}="{value}"'


def units(folder: Path, arch: int | None, nvcc_version: str = "") -> Iterator[Unit]:
    """All sources of both modules (of the CPU's alone where `arch` is None), those that take longest first."""
    cmake, of_kernels = (ROOT / "CMakeLists.txt").read_text(), (ROOT / "kernels" / "CMakeLists.txt").read_text()
    oldest = re.search(r'set\(FASTDIFF_OLDEST_TORCH "([\d.]+)"', cmake)[1]
    major, minor = oldest.split(".")[:2]
    torch = torch_folder()
    version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())[1]
    binding = (
        *_COMMON, "-std=c++20", f"-isystem{torch / 'include'}", f"-isystem{sysconfig.get_path('include')}",
        f"-DTORCH_TARGET_VERSION=(({major}ULL<<56)|({minor}ULL<<48))", _quoted("FASTDIFF_OLDEST_TORCH", oldest),
    )  # fmt: skip
    if arch is not None:
        kernel = (*_CUDA, f"-gencode=arch=compute_{arch},code=sm_{arch}")
        for source in sorted((ROOT / "kernels").glob("*/*.cu"), key=lambda path: -path.stat().st_size):
            yield Unit(source, folder / f"{source.stem}_cu.o", "_C_cuda", kernel)
        defined = ("-DUSE_CUDA", _quoted("FASTDIFF_CUDA_ARCHS_BUILT", str(arch)),
                   _quoted("FASTDIFF_NVCC_VERSION", nvcc_version))  # fmt: skip
        for source in sorted((ROOT / "csrc").glob("*_cuda.cpp")):
            yield Unit(source, folder / f"{source.stem}.o", "_C_cuda", (*binding, *defined))
    plain = (*_COMMON, "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions")
    for source in sorted((ROOT / "kernels").glob("*/*_cpu.inl")):
        operator = source.parent.name
        if source.stem != f"{operator}_cpu":  # a part of another
            continue
        for isa, flags in isa_flags(of_kernels, operator).items():
            text = f'#define FASTDIFF_ISA {isa}\n#define FASTDIFF_ISA_{isa.upper()}\n#include "{source}"\n'
            wrapper = folder / f"{operator}_cpu_{isa}.cpp"
            if not wrapper.is_file() or wrapper.read_text() != text:
                wrapper.write_text(text)
            yield Unit(wrapper, wrapper.with_suffix(".o"), "_C", (*plain, *flags))
    defined = (_quoted("FASTDIFF_COMPILER", os.environ.get("CXX", "g++")), _quoted("FASTDIFF_TORCH_VERSION", version))
    for source in [*sorted((ROOT / "csrc").glob("*_cpu.cpp")), ROOT / "csrc" / "module.cpp"]:
        yield Unit(source, folder / f"{source.stem}_csrc.o", "_C", (*binding, *defined))
    for source in [*sorted((ROOT / "kernels").glob("*/*_cpu.cpp")), *sorted((ROOT / "kernels/common").glob("*.cpp"))]:
        yield Unit(source, folder / f"{source.stem}_kernel.o", "_C", (*_COMMON, "-std=c++20"))


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-20:])
        raise BuildError(f"{' '.join(command[:1])} ended with status {done.returncode}:\n{last}")


def build_directly(library: Path, arch: int | None, jobs: int) -> None:
    """Calls the compilers. Raises BuildError."""
    folder = library.parent / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    nvcc, version = find_nvcc(), ""
    if arch is not None:
        if nvcc is None:
            raise BuildError("no nvcc on PATH, under CUDA_HOME or in /usr/local/cuda: install the CUDA toolkit")
        found = re.search(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
        version = found[1] if found else "unknown"
    todo = list(units(folder, arch, version))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_checked, [unit.command(nvcc) for unit in todo]))
    library.mkdir(parents=True, exist_ok=True)
    for module in sorted({unit.module for unit in todo}):
        objects = [str(unit.object) for unit in todo if unit.module == module]
        target = library / f"{module}{SUFFIX}"
        target.unlink(missing_ok=True)
        torch_library = str(torch_folder() / "lib" / "libtorch_cpu.so")
        if module == "_C_cuda":
            _checked([nvcc, "-shared", "--cudart=static", *objects, torch_library, "-ldl", "-o", str(target)])
        else:
            _checked([os.environ.get("CXX", "g++"), "-shared", *objects, torch_library, "-o", str(target)])


# ------------------------------------------------------------------------------------------------ with setup.py


def build_with_setup(library: Path, arch: int) -> None:
    """setup.py's build. Raises BuildError."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc on PATH, under CUDA_HOME or in /usr/local/cuda: install the CUDA toolkit")
    environment = os.environ | {"FASTDIFF_CUDA": "1", "FASTDIFF_CUDA_ARCHS": str(arch)}
    environment["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(nvcc).parent)))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(library.parent / "lib")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise BuildError("\n".join(["setup.py build_ext failed:", *done.stdout.splitlines()[-20:]]))
    library.mkdir(parents=True, exist_ok=True)
    for module in ("_C", "_C_cuda"):
        built = library.parent / "lib" / "fastdiff" / f"{module}{SUFFIX}"
        (library / built.name).unlink(missing_ok=True)
        shutil.copy2(built, library)


def build(folder: Path, arch: int, jobs: int) -> str:
    """Both modules in folder/modules; says how they were built. Raises BuildError."""
    library, missing = folder / "modules", missing_tools()
    why = f"without {', '.join(missing)}"
    if not missing:
        try:
            build_with_setup(library, arch)
            return f"setup.py's build for sm_{arch}"
        except BuildError as error:
            print(error, flush=True)
            why = f"after setup.py failed: {str(error).splitlines()[-1]}"
    build_directly(library, arch, jobs)
    return f"g++ and nvcc called directly for sm_{arch}, {why}"


def assemble(folder: Path, modules: Path) -> Path:
    """A folder for PYTHONPATH: fastdiff as links to the checkout, with `modules`' own compiled modules."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    package = site / "fastdiff"
    package.mkdir(parents=True)
    for entry in (ROOT / "fastdiff").iterdir():
        if entry.suffix not in (".so", ".pyd") and entry.name not in ("kernels", "recipe_files", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (package / "recipe_files").symlink_to(ROOT / "recipes")
    for module in modules.glob(f"_C*{SUFFIX}"):
        (package / module.name).symlink_to(module.resolve())
    return site
