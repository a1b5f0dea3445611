"""Draws samples of a run: `fastdiff sample runs/x --labels 0,3,7 --guidance-scale 2`."""

from collections.abc import Sequence

from fastdiff.commands import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.cli import action_command

    action_command("sample", "Draws samples of a run, as pictures and other files.", argv)


if __name__ == "__main__":
    main()
