"""Chat templates, which are programs of strangers: rendered in a process that has little time and memory."""

import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastdiff.errors import one_line, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 5.0  # templates take milliseconds
_MEMORY = 1 << 30  # bytes beyond what the process has
_MOST_TEXT = 1 << 26  # bytes of the rendered messages together


def render_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[str]) -> list[str]:
    """Each message of a user as the chat template writes it, up to where the model's answer begins.

    Raises ValueError, naming the file, where there is no template, where it raises, or where it takes more than 5
    seconds or 1 GiB; one line.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat: this tokenizer has no chat template; leave chat out")
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # Python warns of threads, but the child takes none of their locks
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render(tokenizer, messages, writing)
    os.close(writing)
    try:
        content = _read(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    where = _file_of(tokenizer)
    if content is None:
        limits = f"{_SECONDS:g} seconds, or makes more than {_MOST_TEXT >> 20} MiB of text"
        raise ValueError(f"{where}: its chat template takes more than {limits}")
    try:
        answer = json.loads(content)
    except ValueError:  # the process died: no memory is left even for the message
        answer = {"error": "it takes too much memory"}
    if "error" in answer:
        raise ValueError(f"{where}: its chat template cannot be used: {answer['error']}")
    return answer["texts"]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[str], writing: int) -> NoReturn:
    """The child's part: writes JSON and ends, whatever happens."""
    try:
        _limit_memory()
        try:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
                )
                for message in messages
            ]
            answer = json.dumps({"texts": texts})
        except MemoryError:
            answer = json.dumps({"error": f"it takes more than {_MEMORY >> 30} GiB of memory"})
        except Exception as error:  # jinja2 raises its own, and what the template's expressions raise
            answer = json.dumps({"error": one_line(f"{type(error).__name__}: {reason_of(error)}")})
        content = answer.encode()
        while content:
            content = content[os.write(writing, content) :]
    finally:
        os._exit(0)


def _limit_memory() -> None:
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _read(descriptor: int) -> bytes | None:
    """All that the child writes; None where it takes too long or writes too much."""
    parts, size, until = [], 0, time.monotonic() + _SECONDS
    while (left := until - time.monotonic()) > 0 and size <= _MOST_TEXT:
        if not select.select([descriptor], [], [], left)[0]:
            return None
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    return None


def _file_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The file that a tokenizer's template came from; a hub id where there is no folder."""
    folder = Path(str(tokenizer.name_or_path))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (folder / name).is_file():
            return str(folder / name)
    return str(tokenizer.name_or_path) or "tokenizer"
