"""What documents say of other things holds: links and headings, names of the package, recipes and pages of the site."""

import importlib
import re

import pytest
import yaml
from documents import ROOT, Document, documents, slug

from fastdiff import shipped
from fastdiff.__main__ import COMMANDS

ALL = documents()
PAGES = [document for document in ALL if document.path.parent == ROOT / "docs"]
# what no reader can follow: the working names of sources, private folders, dates, and words of another language
BANNED = (
    r"\bsystem 00\d", r"\bshared/", r"\b20\d\d-\d\d-\d\d\b", r"script that is not kept", r"\ba time a \w+",
    r"\bis no (terminal|run|recipe|folder|checkpoint)\b", r"in the place of", r"python -m fastdiff\.\w+ recipes/",
)  # fmt: skip

every_document = pytest.mark.parametrize("document", ALL, ids=lambda document: document.name)


def test_the_documents_are_found():
    names = {document.name for document in ALL}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/index.md", "kernels/adaln/README.md"} <= names


@every_document
def test_links_lead_somewhere(document):
    for link in document.links:
        place, _, anchor = link.partition("#")
        target = (document.path.parent / place).resolve() if place else document.path
        assert target.is_relative_to(ROOT) and target.exists(), f"{document.name}: no {link}"
        if anchor:
            assert anchor in Document(target).anchors, f"{document.name}: no heading for {link}"


def test_headings_become_anchors_as_on_github():
    assert slug("Checkpoints and fastdiff.load") == "checkpoints-and-fastdiffload"
    assert slug("`unmask_`: how?") == "unmask_-how"


@every_document
def test_lists_and_tables_stand_apart(document):
    """Without the empty line before them the site shows a list or a table as text; GitHub does not mind."""
    lines = document.prose.split("\n")
    for number, (before, line) in enumerate(zip(lines, lines[1:], strict=False), start=2):
        for first, inside in ((r"(- |\d+\. )", r"( *- | *\d+\. |  )"), (r"\|", r"\|")):
            if re.match(first, line) and before.strip():
                assert re.match(inside, before), f"{document.name}:{number}: an empty line is missing before {line!r}"


def test_every_page_is_in_the_index_and_in_the_site():
    index = (ROOT / "docs" / "index.md").read_text()
    nav = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for document in ALL:
        if document.path.parent in (ROOT, ROOT / "docs") or document.name.startswith(("kernels/", "examples/")):
            assert document.name in nav, f"mkdocs.yml does not name {document.name}"
    for page in PAGES:
        assert page.path.name == "index.md" or f"]({page.path.name})" in index, f"docs/index.md: no {page.path.name}"


@every_document
def test_names_of_the_package_exist(document):
    for name in set(re.findall(r"`(fastdiff(?:\.\w+)+)", document.prose)):
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError:
                continue
            for part in parts[length:]:
                assert hasattr(found, part), f"{document.name}: no {name}"
                found = getattr(found, part)
            break


@every_document
def test_commands_and_recipes_exist(document):
    """`fastdiff COMMAND ARGUMENT` in code: a placeholder is written in capitals."""
    recipes = {name for name, _ in shipped.list_recipes()}
    code = re.findall(r"`(fastdiff [^`\n]+)`|^ {4,}(fastdiff .+)", document.text, re.MULTILINE)
    for block in document.blocks:
        code += re.findall(r"^(fastdiff .+)()", block.code, re.MULTILINE)
    for words in (("".join(each)).split() for each in code):
        command, argument = words[1], (words[2] if len(words) > 2 else "")
        assert command in COMMANDS or command == "--help", f"{document.name}: no command {command}"
        if command == "train" and argument[:1].islower() and not argument.endswith(".yaml"):
            assert argument in recipes, f"{document.name}: no recipe {argument}"


WORDS = [*(document.path for document in ALL), *sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.mark.parametrize("path", WORDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_that_only_their_author_understands(path):
    text = path.read_text(encoding="utf-8")
    for pattern in BANNED:
        found = re.search(pattern, text)
        assert found is None, f"{path}: {text[max(0, found.start() - 40) : found.end() + 40]!r}"
