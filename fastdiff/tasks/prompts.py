"""Prompts that a command is given: on its line, or in a file."""

from collections.abc import Mapping
from pathlib import Path

from fastdiff.reading import parse_json


def read_prompt_file(file: str) -> list[str]:
    """The prompts of --prompt-file: one on each line, or JSONL with the field "prompt"; blank lines are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not UTF-8 or not JSON; the message names file and line or byte.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"--prompt-file: got {file!r}, which is not a file; expected prompts, one per line, or JSONL"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}; expected a text in UTF-8") from None
    lines = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    return _json_prompts(file, lines) if path.suffix == ".jsonl" else list(lines.values())


def _json_prompts(file: str, lines: Mapping[int, str]) -> list[str]:
    prompts = []
    for number, line in lines.items():
        entry = parse_json(line, f"{file}, line {number}")
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f'{file}, line {number}: expected an object with the text field "prompt"')
        prompts.append(entry["prompt"])
    return prompts
