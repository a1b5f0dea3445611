"""Weights in files, own and foreign: read, freed of their wrappers, and compared with what a model has.

Training scripts put a state dict into other dicts (`WRAPPERS`), prefix its names (`SEGMENTS`), cut it into shards that
an index lists, and name files by variant (`model.fp16.safetensors`). Nothing that is read is executed, and no size is
believed before the files have it.
"""

import argparse
import logging
import pathlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from fastdiff.files import read_json
from fastdiff.reading import reading

# Dicts that hold a state dict, the first that is there; averaged weights come before those that were trained last.
WRAPPERS = (
    "ema", "ema_model", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module",
)  # fmt: skip
# Parts of names that wrappers of modules add: DDP, torch.compile, FSDP, activation checkpointing.
SEGMENTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}  # a path on another system is still a path
_SAFE = (
    argparse.Namespace,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    *((kind, f"{module}.{name}") for name, kind in _PATHS.items() for module in ("pathlib", "pathlib._local")),
)
# What a configuration calls the numbers of its parts; "labels" are names that transformers makes.
_COUNTS = re.compile(
    r"depth|n_layers?|(num_)?((hidden|encoder|decoder)_)?layers|layers_per_block|num_hidden_groups|inner_group_num|num_labels"
)
_COUNTERS = ("initted", "step")  # ema_pytorch's, beside the averaged model
_SHARD = re.compile(r"-\d+-of-\d+")
_BAD_SAFETENSORS = ": cut short, damaged or not a safetensors file"
_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ files


def read_tensors(path: Path, owner: str = "a model") -> dict[str, Any]:
    """The content of a .safetensors file, or of a PyTorch file (.pt, .bin), on the CPU. Nothing in it is executed.

    Args:
        path: the file.
        owner: the model whose weights it should hold, in the words of messages.

    Returns the tensors by name; a training checkpoint also holds dicts of them and its command line (`state_of`).
    Raises FileNotFoundError where there is no file, ValueError for a damaged one and for other content.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the weights of {owner}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # here, so that models can be made where it is not installed

        with reading(path, _BAD_SAFETENSORS):
            return load_file(path)
    problem = f": cut short, damaged, or more than tensors in it; expected a PyTorch checkpoint of {owner}"
    with reading(path, problem):
        if zipfile.is_zipfile(path):  # torch does not compress; what is larger inside than outside would fill memory
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("a compressed archive")
        with torch.serialization.safe_globals(list(_SAFE)):  # a command line with paths; nothing else is let in
            content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a state dict of {owner}")
    return content


def weight_files(folder: Path, names: tuple[str, ...], variant: str | None = None) -> list[Path]:
    """The file with a folder's weights, or its shards: of the first of `names` that it has.

    Args:
        names: such as "model.safetensors"; NAME.index.json may list shards instead.
        variant: "fp16" for model.fp16.safetensors or model.safetensors.index.fp16.json. None takes the files without a
            variant, and where there are none the only variant.

    Raises:
        FileNotFoundError: the folder has none of them, or lacks a shard.
        ValueError: several variants to choose from, or an index that is none; one line.
    """
    variant = variant_of(folder, names) if variant is None else variant
    for name in names:
        files = _of_variant(folder, name, variant)
        if files:
            _log.info("%s: weights in %s", folder, ", ".join(file.name for file in files))
            return files
    wanted = f" of the variant {variant!r}" if variant else ""
    raise FileNotFoundError(f"{folder}: no weights{wanted} in it; expected {' or '.join(names)}, or their shards")


def variant_of(folder: Path, names: tuple[str, ...]) -> str | None:
    """The only variant of a folder's weights; None where there are some without a variant, or none at all.

    Raises ValueError where there are several to choose from.
    """
    if any(_of_variant(folder, name, None) for name in names):
        return None
    found = {variant for name in names for variant in _variants(folder, name)}
    if len(found) > 1:
        raise ValueError(f"{folder}: has weights of the variants {', '.join(sorted(found))}; pass variant=")
    return next(iter(found), None)


def read_weights(folder: Path, names: tuple[str, ...], owner: str, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of `weight_files`, freed of wrappers (`state_of`).

    Raises as `weight_files`, `read_tensors` and `state_of`, and ValueError for a tensor that two shards have.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(folder, names, variant):
        part = state_of(read_tensors(file, owner), file)
        twice = state.keys() & part.keys()
        if twice:
            raise ValueError(f"{file}: {min(twice)} is in another shard, too; expected each tensor once")
        state.update(part)
    return state


def header_of(files: Iterable[Path]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the tensors in files, on the meta device: of safetensors the headers are read alone.

    Raises ValueError for a damaged file.
    """
    from safetensors import safe_open

    state: dict[str, Tensor] = {}
    for path in files:
        if path.suffix != ".safetensors":
            state |= {name: tensor.to("meta") for name, tensor in state_of(read_tensors(path), path).items()}
            continue
        with reading(path, _BAD_SAFETENSORS), safe_open(path, framework="pt") as file:
            for name in file.keys():
                empty = file.get_slice(name)[:0] if file.get_slice(name).get_shape() else file.get_tensor(name)
                state[name] = torch.empty(file.get_slice(name).get_shape(), dtype=empty.dtype, device="meta")
    return state


def _of_variant(folder: Path, name: str, variant: str | None) -> list[Path]:
    """The file `name`, or its shards; [] where there is neither."""
    stem, _, suffix = name.rpartition(".")
    own = f"{stem}.{variant}.{suffix}" if variant else name
    if (folder / own).is_file():
        return [folder / own]
    # transformers' and diffusers' two ways to name an index
    for index in (f"{own}.index.json", f"{name}.index.{variant}.json" if variant else f"{name}.index.json"):
        if (folder / index).is_file():
            return _shards(folder / index)
    return []


def _variants(folder: Path, name: str) -> set[str]:
    stem, _, suffix = name.rpartition(".")
    middle = r"\.([^.]+)"
    patterns = (
        rf"{re.escape(stem)}{middle}\.{suffix}(\.index\.json)?",
        rf"{re.escape(name)}\.index{middle}\.json",
    )
    matches = (re.fullmatch(pattern, file.name) for pattern in patterns for file in folder.iterdir())
    return {match[1] for match in matches if match and not _SHARD.search(match[1])}


def _shards(index: Path) -> list[Path]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise ValueError(f"{index}: weight_map: got {type(content).__name__}; expected names of shards by tensor")
    names = sorted(set(content.values()))
    for name in names:
        if name != Path(name).name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(
                f"{index}: weight_map: got the shard {name[:100]!r}; expected the name of a file beside it"
            )
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name}: no such file; expected the shard that {index.name} lists")
    return [index.parent / name for name in names]


# ------------------------------------------------------------------------------------------------ state dicts


def state_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, its names without what wrappers of modules add.

    The first of `WRAPPERS` that is there is opened. Raises ValueError, naming what was found, where there is none.
    """
    inside: list[str] = []
    while not (content and all(isinstance(value, Tensor) for value in content.values())):
        name = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping) and content[name]), None)
        if name is None or len(inside) > 3:
            where = f"{path}: {'.'.join(inside)}" if inside else str(path)
            if not content:
                raise ValueError(f"{where}: holds nothing; expected tensors by name")
            found = ", ".join(f"{str(key)[:60]} ({type(value).__name__})" for key, value in [*content.items()][:4])
            raise ValueError(f"{where}: holds {found}, …; expected tensors by name, or one of {', '.join(WRAPPERS)}")
        inside.append(name)
        content = content[name]
    if inside:
        _log.info("%s: read the weights in %s", path, ".".join(inside))
    state: dict[str, Tensor] = {}
    for name, tensor in content.items():
        bare = ".".join(part for part in str(name).split(".") if part not in SEGMENTS)
        if bare in state:
            raise ValueError(f"{path}: {name}: got two tensors of the name {bare}; expected one")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name}: got a tensor of {tensor.layout} on {tensor.device}; expected numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name}: got shape {list(tensor.shape)}; the file has fewer numbers for it")
        state[bare] = tensor
    return state


def without_prefix(state: Mapping[str, Tensor], *anchors: str) -> dict[str, Tensor]:
    """The tensors without the prefix that all names have in front of an anchor, the end of a name that must be there.

    Of several prefixes (a model beside its average in one state dict) the one that says "ema" counts, and the tensors
    under the others are left out. Where none fits, names stay as they are.
    """
    for anchor in anchors:
        ends = [name for name in state if name == anchor or name.endswith("." + anchor)]
        prefixes = [name.removesuffix(anchor) for name in ends]
        averaged = [prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix)]
        if len(prefixes) == 1 or len(averaged) == 1:
            chosen = prefixes[0] if len(prefixes) == 1 else averaged[0]
            others = tuple(prefix for prefix in prefixes if prefix != chosen and not chosen.startswith(prefix))
            left_out = _COUNTERS if averaged else ()
            kept = {name: t for name, t in state.items() if not name.startswith(others) and name not in left_out}
            return {name.removeprefix(chosen): tensor for name, tensor in kept.items()}
    return dict(state)


def check_state(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], path: Path, owner: str) -> None:
    """Raises ValueError where names, shapes or dtypes of weights are not those of a model's state dict.

    Args:
        state: the tensors that were read.
        model_state: the state dict of the model that should get it. Its floating-point tensors take any of float32,
            bfloat16, float16 and float64: other numbers (int8, float8) are no weights without their scales.
        path: where they were read; named in the message.
        owner: the model, in the message's words.
    """
    problems = []
    for name in sorted(model_state.keys() | state.keys()):
        if name not in state:
            problems.append(f"{name} is missing")
        elif name not in model_state:
            problems.append(f"{name} is unknown")
        else:
            found, expected = state[name], model_state[name]
            if found.shape != expected.shape:
                problems.append(f"{name} has shape {list(found.shape)}, expected {list(expected.shape)}")
            elif found.dtype not in (WEIGHT_DTYPES if expected.is_floating_point() else (expected.dtype,)):
                wanted = "float32, bfloat16 or float16" if expected.is_floating_point() else str(expected.dtype)
                problems.append(f"{name} has dtype {found.dtype}, expected {wanted.removeprefix('torch.')}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: the weights are not those of {owner}: {'; '.join(problems[:3])}{more}")


def check_dtypes(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError where a tensor's dtype is that of no weights, for models that another library builds."""
    for name, tensor in state.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype}, expected float32, bfloat16 or float16")


def check_counts(values: Any, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError where a configuration, as plain values, names more layers than there are tensors.

    Layers are modules, which cost memory and time before any tensor can be compared.
    """
    waiting = [("", values)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(key), entry) for key, entry in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, entry) for entry in value if isinstance(entry, Mapping)]
        elif isinstance(value, int | float) and _COUNTS.fullmatch(name) and value > len(state):
            raise ValueError(f"{path}: {name}: got {value} with {len(state)} tensors; expected the weights of as many")
