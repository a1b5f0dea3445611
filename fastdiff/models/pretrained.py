"""What every model of fastdiff shares: saving to a folder, loading from one, and its config.json."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.device import check_dtype
from fastdiff.errors import reason_of
from fastdiff.files import read_json, write_atomically
from fastdiff.models.weights import check_counts, check_state, read_tensors
from fastdiff.version import __version__

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """A model that is made from a configuration, and that a folder with model.safetensors and config.json holds.

    A subclass takes its configuration, a dataclass, as the argument of its constructor and keeps it in `self.config`.
    The constructor also runs on the meta device: sizes are compared with a file's before memory is taken for them.

    Attributes:
        config_class: The dataclass.
        title: The model in the words of messages, such as "a DiT".
        free_fields: Fields of the configuration that no weight depends on: they may be changed when loading.
        extra_keys: What config.json may hold beside the configuration; loading ignores it. None allows any key.
        also_reads: Further values of config.json's `_class_name` that `from_pretrained` understands.
    """

    config_class: ClassVar[type]
    title: ClassVar[str]
    free_fields: ClassVar[tuple[str, ...]] = ()
    extra_keys: ClassVar[tuple[str, ...] | None] = ("id2label", "sampling", "mixed_precision", "choices")
    also_reads: ClassVar[tuple[str, ...]] = ()

    def save_pretrained(self, directory: str | os.PathLike, *, extra: Mapping[str, Any] | None = None) -> None:
        """Writes model.safetensors and config.json, each whole or not at all.

        Args:
            directory: the folder; it is made where there is none.
            extra: further keys of config.json, with plain values: `id2label`, the names of classes by their number
                ({"0": "zero", …}); `sampling`, `mixed_precision` and `choices`, how samples are drawn where nobody
                says otherwise.
                `read_config` gives them back.

        Raises:
            ValueError: a key of `extra` that loading would refuse, or that the configuration has itself.
            OSError: the folder cannot be written.
        """
        from safetensors.torch import save_file  # here, so that models can be made where it is not installed

        directory, extra = Path(directory), dict(extra or {})
        config = self.header() | dataclasses.asdict(self.config)
        for name in extra:
            if name in config or (self.extra_keys is not None and name not in self.extra_keys):
                known = "other names" if self.extra_keys is None else ", ".join(self.extra_keys)
                raise ValueError(f"extra: got {name!r}; expected {known} in the config.json of {self.title}")
        directory.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in untied_state(self).items()}
        write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
        write_atomically(directory / CONFIG_NAME, json.dumps(config | extra, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike,
        *,
        dtype: torch.dtype | str = torch.float32,
        weights: str = WEIGHTS_NAME,
        **overrides: Any,
    ) -> Model:
        """Loads what `save_pretrained` wrote, in eval mode on the CPU. No hub is asked.

        Args:
            path: the folder.
            dtype: dtype of the parameters, or its name ("bfloat16").
            weights: name of the file with the weights, such as ema.safetensors in a checkpoint of a run.
            overrides: fields of the configuration that no weight depends on (`free_fields`).

        Raises:
            FileNotFoundError: nothing there, or no such model in the folder.
            ValueError: a file is cut short, damaged or of another model; the message names it.
            TypeError: a field that cannot be changed.
        """
        path, dtype = Path(path), check_dtype(dtype)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; expected a checkpoint of {cls.title}")
        config, state = cls._read(path, weights, overrides)
        return cls._filled(config, state, path, dtype)

    @classmethod
    def from_config(cls: type[Model], config: Any) -> Model:
        """A model with random weights."""
        return cls(config)

    @classmethod
    def header(cls) -> dict[str, Any]:
        """The first keys of config.json, which say whose it is."""
        return {"_class_name": cls.__name__, "_fastdiff_version": __version__}

    # What a subclass with formats of its own replaces

    @classmethod
    def _read(cls, path: Path, weights: str, overrides: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """Configuration and weights of a folder."""
        values = cls._values_of(read_config(path), path)
        check_overrides(overrides, cls.free_fields)
        with naming_config(path, cls.title):
            config = cls._config_from({**values, **overrides})
        return config, read_tensors(path / weights, cls.title)

    @classmethod
    def _values_of(cls, config: dict[str, Any], path: Path) -> dict[str, Any]:
        """The configuration's values in a config.json. Raises ValueError where it is another model's."""
        kind, known = config.get("_class_name"), (cls.__name__, *cls.also_reads)
        if kind not in known:
            raise ValueError(
                f"{path / CONFIG_NAME}: _class_name: got {kind!r}; expected {' or '.join(map(repr, known))}"
            )
        return {name: value for name, value in config.items() if name[:1] != "_" and name not in cls.extra_keys}

    @classmethod
    def _config_from(cls, values: Mapping[str, Any]) -> Any:
        """The configuration of plain values. Raises TypeError, ValueError or KeyError where they do not fit."""
        return cls.config_class(**values)

    @classmethod
    def _filled(cls: type[Model], config: Any, state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> Model:
        """A model with the weights of `state`, in eval mode. Raises ValueError where they are another model's."""
        check_counts(dataclasses.asdict(config), state, path / CONFIG_NAME)
        with naming_config(path, cls.title), torch.device("meta"):  # no memory for sizes that the weights have not
            outline = cls.from_config(config)
        check_state(state, untied_state(outline), path, "its configuration")
        with naming_config(path, cls.title), torch.random.fork_rng(devices=[]):  # its first weights are replaced
            model = cls.from_config(config)
        model.load_state_dict(state, strict=False)  # tied weights have one name in the file
        return model.to(dtype).eval()


@contextlib.contextmanager
def naming_config(path: Path, title: str) -> Iterator[None]:
    """Makes errors about a configuration say which folder's it is; also those of torch for sizes that cannot be."""
    try:
        yield
    except Exception as error:  # numbers that are too large, negative sizes of tensors, and others
        message = f"{path / CONFIG_NAME}: not the configuration of {title}: {reason_of(error)}"
        raise ValueError(message) from error


# ------------------------------------------------------------------------------------------------ states


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without further names of a tensor that it has already: Hugging Face's encoders tie some."""
    kept: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # empty tensors, and those of the meta device, all have the address 0
        known = tensor.numel() > 0 and not tensor.is_meta
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if known else id(tensor)
        kept.setdefault(key, (name, tensor))
    return {name: tensor.detach() for name, tensor in kept.values()}


def check_overrides(overrides: Iterable[str], allowed: tuple[str, ...]) -> None:
    """Raises TypeError for a field that weights depend on."""
    for name in overrides:
        if name not in allowed:
            can = f"only {', '.join(allowed)} can" if allowed else "no field of this model can"
            raise TypeError(f"{name}: cannot be changed when loading a checkpoint; {can}")


# ------------------------------------------------------------------------------------------------ files


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of a model's config.json, extra keys such as `id2label` included.

    Raises FileNotFoundError where there is none and ValueError where it is not a JSON object; one line naming the file.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG_NAME} in it; expected a folder written by save_pretrained")
    return read_json(path)
