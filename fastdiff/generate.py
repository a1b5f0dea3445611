"""Generates text: `fastdiff generate runs/x --prompt "To be" --max-new-tokens 64 --seed 1 --watch`."""

from collections.abc import Sequence

from fastdiff.commands import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.cli import action_command

    action_command("generate", "Continues prompts with a model, and fills mask tokens in them.", argv)


if __name__ == "__main__":
    main()
