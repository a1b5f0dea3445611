"""Folders of transformers models that stay as they are, whose states others learn from: found, read and hashed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.errors import named, one_line
from fastdiff.models.masked_lm_checkpoints import snapshot_folder
from fastdiff.models.pretrained import CONFIG_NAME, read_config
from fastdiff.models.text_packages import without_bars
from fastdiff.reading import reading

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HASHED = 2**30  # bytes of weights whose content is in a fingerprint
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")  # of a config.json


def folder_of(name: str, expected: str) -> Path:
    """The folder of a model: itself, or the snapshot of a hub id. Raises FileNotFoundError, in one line."""
    path = Path(name).expanduser()
    if not path.is_dir() and name.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"{named('name')}: got {name!r}, which is not a folder; expected {expected}")
    try:
        return snapshot_folder(str(path) if path.is_dir() else name, {})
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{named('name')}: got {name!r}, which cannot be had ({one_line(error)[:300]}); expected {expected}"
        ) from None


def harmless_config(folder: Path, what: str, part: Callable[[Any], Any]) -> Any:
    """The configuration of a model in a folder, without what would run or fetch code.

    Args:
        what: the model, in the words of messages.
        part: the configuration of the part that is wanted, of the whole.

    Raises ValueError for quantised weights, and for what is no configuration.
    """
    from transformers import AutoConfig

    where = f"{folder / CONFIG_NAME}"
    if read_config(folder).get("quantization_config"):
        raise ValueError(f"{where}: its weights are quantised; expected float32, bfloat16 or float16")
    with reading(where, f": not the configuration of {what}"):
        config = part(AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True))
    config._attn_implementation = config._experts_implementation = None  # it may name kernels to download
    return config


def lasting(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of a model, without versions and names."""
    return {name: value for name, value in config.items() if name not in _VOLATILE}


def load_frozen(kind: Any, folder: Path, config: Any, what: str, unused: Sequence[str]) -> nn.Module:
    """A transformers model in float32 and eval mode, frozen.

    Args:
        kind: the class, or an auto class.
        config: of what is to be loaded.
        what: the model, in the words of messages.
        unused: parts of the names of weights that may be missing, as no state depends on them.

    Raises ValueError where weights are damaged, missing, or of other shapes.
    """
    options = {"trust_remote_code": False, "local_files_only": True, "output_loading_info": True}
    if not hasattr(kind, "_model_mapping"):  # a class of its own knows no code of others
        del options["trust_remote_code"]
    with without_bars(), _without_reports(), reading(folder, f": not {what} that can be loaded"):
        model, told = kind.from_pretrained(str(folder), config=config, dtype=torch.float32, **options)
    absent = [name for name in told["missing_keys"] if not any(part in name for part in unused)]
    problems = [*absent, *map(str, told["mismatched_keys"])]
    if problems:
        raise ValueError(
            f"{folder}: the weights are not those of its configuration: missing or of another shape: "
            f"{', '.join(sorted(problems)[:3])}"
        )
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Within the block, transformers does not list the weights of the parts that are left out."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
