"""What `make` builds again, and what setup.py hands to CMake: with stand-ins for Python, CMake and ninja."""

import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("PYTHON", "TORCH", "VENV", "FASTDIFF_CUDA", "FASTDIFF_CUDA_ARCHS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")

# A Python that makes environments with itself in them, and otherwise writes down what it was asked for.
FAKE_PYTHON = """#!/bin/sh
echo "$(basename "$0") $* cuda=$FASTDIFF_CUDA archs=$FASTDIFF_CUDA_ARCHS" >> "$LOG"
if [ "$1 $2" = "-m venv" ]; then
  for last; do :; done
  [ "$3" != --clear ] || rm -rf "$last"
  mkdir -p "$last/bin" && cp "$0" "$last/bin/python" && touch "$last/bin/pip"
fi
"""


class Checkout:
    """The Makefile with a source or two in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("kernels", "csrc"):
            (folder / name).mkdir(parents=True)
        files = ("CMakeLists.txt", "kernels/CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt")
        for name in (*files, "csrc/module.cpp"):
            (folder / name).touch()
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("python3", "python3.x"):
            (folder / name).write_text(FAKE_PYTHON)
            (folder / name).chmod(0o755)

    def make(self, **settings: str) -> list[str]:
        """What the stand-in was asked for by `make venv`; nothing where nothing was built."""
        log = self.folder / "log"
        log.write_text("")
        env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        env |= {"LOG": str(log), "PATH": f"{self.folder}:{env['PATH']}"} | settings
        subprocess.run(["make", "venv"], cwd=self.folder, env=env, check=True, capture_output=True)
        return log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("NOT TESTED: make is not installed")
    return Checkout(tmp_path / "checkout")


def test_make_builds_in_a_folder_with_spaces_and_umlauts(checkout):
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("mein Prüf ordner"))
    assert "-e .[dev]" in checkout.make()[-1]
    assert checkout.make() == []


def test_make_builds_once(checkout):
    first = checkout.make()
    assert first[0].startswith("python3 -m venv .venv") and "-e .[dev] cuda= archs=" in first[-1]
    assert checkout.make() == []
    os.utime(checkout.folder / "csrc" / "module.cpp", (2e9, 2e9))
    assert "-e .[dev]" in checkout.make()[-1]


@pytest.mark.parametrize(
    "settings, trace",
    [
        ({"FASTDIFF_CUDA": "1"}, "cuda=1 archs="),
        ({"FASTDIFF_CUDA_ARCHS": "87;90"}, "archs=87;90"),
        ({"TORCH": "torch>=2.13,<3"}, "torch>=2.13,<3 numpy"),
        ({"PYTHON": "python3.x"}, "python3.x -m venv --clear .venv"),
    ],
)
def test_make_builds_again_when_a_setting_changes(checkout, settings, trace):
    checkout.make()
    assert any(trace in line for line in checkout.make(**settings))
    assert checkout.make(**settings) == []
    assert checkout.make() == []  # what is not given stays as it was
    assert checkout.make(**dict.fromkeys(settings, "other") | {"PYTHON": "python3"}) != []


def test_make_builds_again_in_a_moved_checkout(checkout):
    checkout.make()
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved"))
    assert checkout.make()[0].startswith("python3 -m venv --clear .venv")


def test_make_leaves_an_environment_alone_that_it_did_not_make(checkout):
    (checkout.folder / "mine" / "bin").mkdir(parents=True)
    (checkout.folder / "mine" / "precious").touch()
    checkout.make(VENV="mine")
    assert (checkout.folder / "mine" / "precious").exists()


@pytest.fixture
def build(tmp_path: Path, monkeypatch):
    """Runs setup.py's build_ext on a tree of its own and gives the calls of CMake; only `tools` are in reach."""
    tree, programs = tmp_path / "tree", tmp_path / "programs"
    (tree / "fastdiff").mkdir(parents=True)
    programs.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastdiff/version.py"):
        shutil.copy(ROOT / name, tree / name)

    def run(*tools: str, command: tuple[str, ...] = ("build_ext", "--inplace"), **env: str) -> list[list[str]]:
        for old in programs.iterdir():
            old.unlink()
        for name in tools:
            # as CMake does: a cache of this folder and these settings
            (programs / name).write_text(f"#!{sys.executable}\n" + FAKE_CMAKE)
            (programs / name).chmod(0o755)
        with monkeypatch.context() as patch:
            patch.chdir(tree)
            patch.setattr(sys, "argv", ["setup.py", *command])
            patch.setenv("PATH", str(programs))
            patch.setenv("FASTDIFF_CUDA", "0")
            for name in ("CXXFLAGS", "FASTDIFF_CUDA_ARCHS", "MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL", "CXX"):
                patch.delenv(name, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            paths = sysconfig.get_path
            patch.setattr(sysconfig, "get_path", lambda kind: str(programs) if kind == "scripts" else paths(kind))
            runpy.run_path(str(tree / "setup.py"), run_name="__main__")
        return [line.split("\x1f") for line in (programs / "log").read_text().splitlines()]

    run.tree = tree
    return run


FAKE_CMAKE = r"""
import pathlib, sys
log = pathlib.Path(sys.argv[0]).with_name("log")
with log.open("a") as file:
    file.write("\x1f".join(sys.argv[1:]) + "\n")
if "-S" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("-B") + 1])
    given = [each[2:].replace("=", ":STRING=", 1) for each in sys.argv if each.startswith("-D")]
    given.append("CMAKE_HOME_DIRECTORY:INTERNAL=" + sys.argv[sys.argv.index("-S") + 1])
    given.append("CMAKE_GENERATOR:INTERNAL=" + sys.argv[sys.argv.index("-G") + 1])
    (folder / "CMakeCache.txt").write_text("\n".join(given) + "\n")
    import sysconfig
    (folder / "modules").mkdir(exist_ok=True)
    (folder / "modules" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))).touch()
"""


def test_flags_of_the_environment_do_not_reach_the_kernels(build, capfd):
    configure, _ = build("cmake", "ninja", CXXFLAGS="-march=native -ffast-math", LDFLAGS="-ffast-math")
    assert {"-DCMAKE_CXX_FLAGS=", "-DCMAKE_CUDA_FLAGS=", "-DCMAKE_MODULE_LINKER_FLAGS="} <= set(configure)
    said = capfd.readouterr().out
    assert "CXXFLAGS is set and is not used" in said and "LDFLAGS is set and is not used" in said


@pytest.mark.parametrize(
    "name, value, hint",
    [
        ("CXX", "g++ -march=native -ffast-math", "leave out -march=native -ffast-math"),
        ("NVCC_APPEND_FLAGS", "--use_fast_math", "unset it"),
    ],
)
def test_flags_in_other_places_are_refused_in_one_line(build, name, value, hint):
    with pytest.raises(SystemExit) as error:
        build("cmake", "ninja", **{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} is {value!r}") and message.endswith(hint) and "\n" not in message


def test_compilers_that_conda_and_ccache_name_are_taken(build):
    assert build("cmake", "ninja", CXX="ccache g++", NVCC_PREPEND_FLAGS="-ccbin=/usr/bin/g++")


def test_max_jobs_is_how_many_compilers_run(build):
    assert build("cmake", "ninja", MAX_JOBS="3", CMAKE_BUILD_PARALLEL_LEVEL="5")[1][-2:] == ["--parallel", "3"]
    assert build("cmake", "ninja", CMAKE_BUILD_PARALLEL_LEVEL="5")[1][-1] == "5"
    assert build("cmake", "ninja")[1][-1] == str(os.cpu_count() or 1)
    for value in ("0", "many", "-1"):
        with pytest.raises(SystemExit, match="^MAX_JOBS is .*; expected a number from 1$"):
            build("cmake", "ninja", MAX_JOBS=value)


def test_a_source_that_cannot_be_written_to_is_built_elsewhere(build, monkeypatch, tmp_path):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != build.tree and access(path, mode))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(build.tree.rglob("*"))
    configure, _ = build("cmake", "ninja", command=("build_ext",))
    folder = Path(configure[configure.index("-B") + 1])
    assert folder.parents[1] == tmp_path and folder.parent.name.startswith("fastdiff-build-")
    assert sorted(build.tree.rglob("*")) == before and any(folder.parent.glob("lib*/fastdiff/_C*"))
    with pytest.raises(SystemExit, match="is read-only, and an editable install writes modules there"):
        build("cmake", "ninja")


@pytest.mark.exhaustive
def test_a_real_build_between_spaces_and_umlauts_under_foreign_flags(tmp_path):
    """Minutes without ccache. The baseline has no instruction beyond SSE2, and the module loads; again after a move."""
    if not all(map(shutil.which, ("git", "objdump", "g++"))) or platform.machine() != "x86_64":
        pytest.skip("NOT TESTED: a whole build: git, g++ or objdump is missing, or this is no x86-64")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    env = os.environ | {"CXXFLAGS": "-march=native -ffast-math", "LDFLAGS": "-ffast-math", "FASTDIFF_CUDA": "0"}
    env["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{env['PATH']}"
    for folder in (tmp_path / "a b" / "Prüf 日本", tmp_path / "moved é"):
        if folder.name == "moved é":
            (tmp_path / "a b" / "Prüf 日本").rename(folder)
        else:
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
        objects = list(folder.glob("build/*/kernels/**/*_baseline.cpp.o"))
        assert len(objects) == 7
        for each in objects:
            code = subprocess.run(["objdump", "-d", each], capture_output=True, text=True, check=True).stdout
            assert "%xmm" in code and "%ymm" not in code and "%zmm" not in code
        (module,) = folder.glob("fastdiff/_C.*")
        code = f"import torch, sys; sys.path.insert(0, {str(module.parent)!r}); import _C; print(_C.isa())"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_ninja_or_make_builds(build):
    configure, _ = build("cmake", "make", "ninja")
    assert "Ninja" in configure
    assert any(each.startswith("-DCMAKE_MAKE_PROGRAM=") and each.endswith("/ninja") for each in configure)
    configure, _ = build("cmake", "make")  # and the cache of ninja is left behind
    assert "Unix Makefiles" in configure and "--fresh" in configure
    assert any(each.startswith("-DCMAKE_MAKE_PROGRAM=") and each.endswith("/make") for each in configure)


@pytest.mark.parametrize("tools, missing", [(("cmake",), "ninja"), (("ninja",), "cmake"), ((), "cmake")])
def test_a_missing_tool_is_named_in_one_line(build, tools, missing):
    with pytest.raises(SystemExit) as error:
        build(*tools)
    message = str(error.value)
    assert message.startswith(f"fastdiff's build needs {missing}") and message.endswith(f"pip install {missing}")
    assert "\n" not in message


def test_a_missing_pybind11_is_named_in_one_line(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(SystemExit, match="^fastdiff's build needs pybind11, and .* has none: pip install pybind11$"):
        build("cmake", "ninja")


def test_ccache_is_used_where_it_is_installed(build):
    configure, _ = build("cmake", "ninja", "ccache")
    for language in ("CXX", "CUDA"):
        (launcher,) = (each for each in configure if each.startswith(f"-DCMAKE_{language}_COMPILER_LAUNCHER="))
        assert launcher.endswith("/ccache")
    configure, _ = build("cmake", "ninja")
    assert "-DCMAKE_CXX_COMPILER_LAUNCHER=" in configure


def test_a_cache_of_another_folder_or_torch_is_not_used(build):
    assert "--fresh" not in build("cmake", "ninja")[0]
    assert "--fresh" not in build("cmake", "ninja", FASTDIFF_CUDA_ARCHS="87")[0]
    (cache,) = build.tree.glob("build/*/CMakeCache.txt")
    written = cache.read_text()
    torch = str(Path(importlib.util.find_spec("torch").origin).parent)
    for old in (str(build.tree), torch):
        cache.write_text(written.replace(old, "/elsewhere"))
        assert "--fresh" in build("cmake", "ninja")[0]
    assert "--fresh" not in build("cmake", "ninja")[0]


def test_architectures_of_an_earlier_build_are_forgotten(build):
    assert "-DFASTDIFF_CUDA_ARCHS=87;90" in build("cmake", "ninja", FASTDIFF_CUDA_ARCHS="87,90")[0]
    assert "-UFASTDIFF_CUDA_ARCHS" in build("cmake", "ninja")[0]
