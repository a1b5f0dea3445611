"""Evaluates a run by the measures of its kind: `fastdiff evaluate runs/x`."""

from collections.abc import Sequence

from fastdiff.commands import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.cli import action_command

    action_command("evaluate", "Measures how good a run is, prints a table and writes evaluation.json.", argv)


if __name__ == "__main__":
    main()
