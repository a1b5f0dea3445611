"""The Python code in the documents: it compiles, its names are defined, and what is marked as running runs.

`<!-- run -->` before a block says that it runs as it is, after the blocks above it on its page that run, too.
`<!-- run with runs/dit_mnist -->` says that it needs that run; here a tiny one takes its place.
"""

import ast
import builtins
import contextlib
import io

import pytest
import torch
from documents import documents

PAGES = [document for document in documents() if any(block.language == "python" for block in document.blocks)]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def python(page):
    return [block for block in page.blocks if block.language == "python"]


def defined(tree: ast.AST) -> set[str]:
    """Every name that code gives a meaning: by assignment, import, definition, or as an argument."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names


def test_the_readme_has_code_that_runs():
    (readme,) = (page for page in PAGES if page.name == "README.md")
    assert [block.run for block in python(readme)] == [True] * 3


@every_page
def test_code_compiles_and_defines_its_names(page):
    known = set(dir(builtins)) | {"__name__"}
    for block in python(page):
        tree = ast.parse(block.code, f"{page.name}:{block.line}")
        known |= defined(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id not in known:
                raise AssertionError(
                    f"{page.name}:{block.line + node.lineno - 1}: {node.id} is not defined on this page"
                )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with tiny runs under the names that documents use."""
    from language_runs import write_run

    from fastdiff import train

    folder = tmp_path_factory.mktemp("documents")
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([
            "dit_digits", "--training.output_dir", str(folder / "runs" / "dit_mnist"), "--training.max_steps", "1",
            "--model.hidden_size", "32", "--model.depth", "1", "--sampling.num_inference_steps", "2",
            "--sampling.images_per_class", "1",
        ])  # fmt: skip
    write_run(folder / "runs" / "mdlm_numbers")
    return folder


RUNNING = [page for page in PAGES if any(block.run for block in python(page))]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_code_runs(page, runs, monkeypatch):
    blocks = [block for block in python(page) if block.run]
    monkeypatch.chdir(runs)
    torch.manual_seed(0)
    names = {"__name__": "snippet"}
    for block in blocks:
        assert block.needs is None or (runs / block.needs).is_dir(), f"{page.name}:{block.line}: no {block.needs} here"
        # as many empty lines before it as the page has, so that a traceback names the page's line
        exec(compile("\n" * (block.line - 1) + block.code, page.name, "exec"), names)
