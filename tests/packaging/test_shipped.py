"""Recipes are found by name wherever fastdiff lies, and each says in its first line what it is."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from fastdiff import shipped

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["dit_mnist", "dit_mnist.yaml", ROOT / "recipes" / "dit_mnist.yaml"])
def test_a_recipe_is_found(name):
    found = shipped.find_recipe(name)
    assert found.samefile(ROOT / "recipes" / "dit_mnist.yaml")


def test_a_file_of_ones_own_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dit_mnist.yaml").touch()
    assert shipped.find_recipe("dit_mnist.yaml") == Path("dit_mnist.yaml")
    assert shipped.find_recipe("dit_mnist") == shipped.recipes_folder() / "dit_mnist.yaml"


@pytest.mark.parametrize(
    "name, advice",
    [
        ("dit_minst", "did you mean dit_mnist"),
        ("recipes/qgfd_adio.yaml", "did you mean qgfd_audio"),
        ("zzz", "shipped recipe; fastdiff train --list"),
        ("..", "shipped recipe; fastdiff train --list"),
        ("", "shipped recipe; fastdiff train --list"),
    ],
)
def test_an_unknown_name(name, advice):
    with pytest.raises(FileNotFoundError) as error:
        shipped.find_recipe(name)
    message = str(error.value)
    assert message.startswith(f"recipe: got {name!r}; expected ") and advice in message and "\n" not in message


def test_each_recipe_says_what_it_is():
    listed = shipped.list_recipes()
    assert [name for name, _ in listed] == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    for name, line in listed:
        assert re.fullmatch(r"[^.:].*\. Needs: .+\. Time: .+\.", line), f"{name}: {line}"
        assert len(line) <= 120
        assert set(re.findall(r"\[(\w+)]", line)) <= {"data", "text", "images"}, name
        for run in re.findall(r"runs/(\w+)", line):
            training = yaml.safe_load((ROOT / "recipes" / f"{run}.yaml").read_text())["training"]
            assert training["output_dir"] == f"runs/{run}"


def test_a_wheel_has_the_recipes_and_the_command(tmp_path):
    """Without the compiled modules, which take minutes: setup.py's part is tested in test_build.py."""
    tree, wheel = tmp_path / "tree", tmp_path / "wheel"
    for name in ("fastdiff", "kernels", "recipes"):
        shutil.copytree(
            ROOT / name,
            tree / name,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.cu", "*.inl"),
            symlinks=True,
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(wheel)
    (scripts,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "fastdiff = fastdiff.__main__:main" in scripts.read_text()
    code = "from fastdiff import shipped; print(shipped.find_recipe('dit_mnist')); print(len(shipped.list_recipes()))"
    env = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    found, count = done.stdout.splitlines()
    assert found == str(wheel / "fastdiff" / "recipe_files" / "dit_mnist.yaml"), done.stderr
    assert int(count) == len(list((ROOT / "recipes").glob("*.yaml")))
