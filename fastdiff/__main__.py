"""The command `fastdiff`, also `python -m fastdiff`: lists the commands, and runs one of them."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from fastdiff.commands import command
from fastdiff.version import __version__

# each is the module of its name
COMMANDS = {
    "train": "trains a model by a recipe",
    "sample": "draws images, sounds, videos, texts or rows of a table from a run",
    "generate": "continues prompts with a masked diffusion language model",
    "evaluate": "scores a run",
    "prepare": "draws or decodes the pictures of a data set once, ahead of a training",
    "demo": "trains a small model on handwritten digits in five minutes, and scores it",
    "tune": "measures again what is faster on this machine, and shows it",
    "info": "tells what this installation is and which kernels it can run here",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` is what stands after `fastdiff`."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"fastdiff {__version__}")
    elif name in COMMANDS:
        program = sys.argv[0]
        sys.argv[0] = f"fastdiff {name}"  # what the command calls itself in its help
        try:
            command(lambda argv: importlib.import_module(f"fastdiff.{name}").main(argv))(rest)
        finally:
            sys.argv[0] = program
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {close[0]}?" if close else "fastdiff --help tells what each does"
        print(f"error: command: got {name!r}; expected {', '.join(COMMANDS)}; {advice}", file=sys.stderr)
        raise SystemExit(2)


def usage() -> str:
    """The commands, one per line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        (
            "usage: fastdiff COMMAND [ARGUMENTS ...]",
            "",
            *lines,
            "",
            "fastdiff COMMAND --help tells more; fastdiff --version names the version.",
        )
    )


if __name__ == "__main__":
    main()
