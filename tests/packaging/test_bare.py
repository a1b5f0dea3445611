"""fastdiff where only torch, NumPy and what torch requires are installed, and one line where a package is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.commands import command
from fastdiff.errors import _BROUGHT_BY, package_advice

ROOT = Path(__file__).resolve().parents[2]

# Hides every other distribution of this environment, and then runs `code`.
BARE = """
import importlib.metadata as metadata, re, sys

def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def closure(name, found):
    if canonical(name) not in found:
        found.add(canonical(name))
        for line in metadata.requires(name) or ():
            required = re.match(r"[\\w.-]+", line)[0]
            if "extra ==" not in line and canonical(required) in installed:
                closure(required, found)
    return found

installed = {canonical(each.metadata["Name"]) for each in metadata.distributions()}
kept = closure("torch", {"numpy", "fastdiff-kernels"})
hidden = {module for module, homes in metadata.packages_distributions().items()
          if not kept & {canonical(home) for home in homes}} - {"fastdiff"}
assert {"accelerate", "diffusers", "transformers", "jsonargparse", "yaml"} <= hidden, hidden

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""

WORK = """
import torch, fastdiff, fastdiff.nn, fastdiff.ops
from fastdiff.__main__ import main

for backend in ("reference", "auto"):
    with fastdiff.use_backend(backend):
        block = torch.nn.Sequential(fastdiff.nn.SelfAttention(32, 4), fastdiff.nn.Mlp(32, 64))
        x, shift = torch.randn(2, 6, 32), torch.randn(2, 32, requires_grad=True)
        block(fastdiff.ops.adaln(x, shift, None)).sum().backward()
        assert shift.grad is not None and all(p.grad is not None for p in block.parameters())
        sample = fastdiff.ops.sample_tokens(torch.randn(3, 50), seed=1)
        fastdiff.ops.qgfd_attention(*torch.randn(3, 1, 2, 6, 8)).sum()
main(["info"])
for argv in (["train", "dit_mnist"], ["sample", "runs/x"], ["demo"]):
    try:
        main(argv)
    except SystemExit as ended:
        print(argv[0], ended.code, flush=True)
print("loaded:", sorted(hidden & set(sys.modules)))
"""


def test_operators_modules_and_info_need_torch_and_numpy_alone():
    done = subprocess.run([sys.executable, "-c", BARE + WORK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in ("instruction set: ", "fastdiff.ops.adaln", "tested with: torch 2.1", "loaded: []"):
        assert line in done.stdout
    for name in ("train", "sample", "demo"):
        assert f"{name} 2" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: this needs ") and ": pip install " in line for line in errors)


def test_a_missing_package_is_one_line_that_says_how_to_get_it(capsys):
    @command
    def evaluate(argv):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets.arrow")

    with pytest.raises(SystemExit) as ended:
        evaluate([])
    line = "error: this needs datasets: pip install 'fastdiff-kernels[text]'\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, line)
    assert package_advice(ModuleNotFoundError("of ours", name="fastdiff.nowhere")) is None


def test_every_package_that_is_imported_is_brought_by_the_project():
    tomllib = pytest.importorskip("tomllib", reason="NOT TESTED: Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = {  # where they are not called as what is imported
        "lm_eval": "lm-eval", "sklearn": "scikit-learn", "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    }  # fmt: skip
    for package, brought_by in _BROUGHT_BY.items():
        home, _, extra = brought_by.rstrip("]").partition("[")
        if home == "fastdiff-kernels":
            name, lines = distributions.get(package, package), project["optional-dependencies"][extra]
        else:
            name, lines = brought_by, project["dependencies"]
        assert any(line.startswith(f"{name}>") or line == name for line in lines), (package, lines)
