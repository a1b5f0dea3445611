"""The documents of the repository, read as Markdown without a library: links, headings, code blocks and plain text."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- run(?: with (\S+))? -->\n\Z")
_LINK = re.compile(r"\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)?\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        language: what follows the fence, such as "python".
        code: its lines, without the indentation of the fence.
        line: the line of the document that the code begins on.
        run: whether the comment before it says that it runs as it is.
        needs: the run's folder that the comment says it needs, or None.
    """

    language: str
    code: str
    line: int
    run: bool
    needs: str | None


@dataclass(frozen=True)
class Document:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The text with code blocks emptied, line for line."""
        text = _FENCE.sub(lambda block: "\n" * block[0].count("\n"), self.text)
        return "\n".join("" if line.startswith("    ") else line for line in text.split("\n"))

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures; not those of other servers."""
        found = _LINK.findall(re.sub(r"`[^`\n]*`", "code", self.prose))
        return [link for link in found if not re.match(r"[a-z]+:", link)]

    @property
    def anchors(self) -> set[str]:
        """What `#…` may name: the headings, as GitHub and mkdocs both write them."""
        return {slug(heading) for heading in _HEADING.findall(self.prose)}

    @property
    def blocks(self) -> list[Block]:
        found = []
        for match in _FENCE.finditer(self.text):
            mark = _MARK.search(self.text[: match.start()])
            line = self.text[: match.start(2)].count("\n") + 1
            found.append(Block(match[1], match[2], line, mark is not None, mark[1] if mark else None))
        return found


def slug(heading: str) -> str:
    """A heading's anchor: lower case, without punctuation, with - for spaces."""
    text = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
    return re.sub(r" ", "-", text.strip())


def documents() -> list[Document]:
    """Everything that people read: at the top, in docs/, and beside kernels, kinds and examples."""
    patterns = (
        "*.md",
        "docs/*.md",
        "kernels/*/README.md",
        "fastdiff/tasks/*/README.md",
        "examples/*.md",
        "recipes/*.md",
    )
    return [Document(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
