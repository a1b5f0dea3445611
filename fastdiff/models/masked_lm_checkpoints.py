"""Reading masked diffusion language models: finding the files, telling the format, checking names and shapes."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor

from fastdiff.data.tokenization import load_saved_tokenizer
from fastdiff.device import check_dtype
from fastdiff.errors import reason_of
from fastdiff.files import read_json
from fastdiff.models.masked_lm_config import MaskedDiffusionLMConfig
from fastdiff.models.masked_lm_layouts import (
    ADAPTABLE,
    EMBEDDING,
    HEAD,
    KNOWN,
    LAYOUTS,
    MODEL_TYPES,
    grow_vocabulary,
)
from fastdiff.models.pretrained import CONFIG_NAME, naming_config
from fastdiff.models.weights import check_counts, check_state, header_of, read_weights, variant_of, weight_files

GPT2_MASK_TOKEN_ID = 10541  # DiffuGPT's: a token that text hardly ever has
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_FIELDS = {field.name for field in dataclasses.fields(MaskedDiffusionLMConfig)}


def load_masked_lm(cls: type, path: Any, args: tuple, kwargs: dict[str, Any], native: Callable) -> Any:
    """See `MaskedDiffusionLM.from_pretrained`; `native` is that of transformers."""
    if kwargs.get("config") is not None or kwargs.get("state_dict") is not None:
        return native(path, *args, **kwargs)
    config = read_model_config(path, kwargs)
    if _model_type(config) == cls.config_class.model_type:
        return _load_native(cls, path, config, args, kwargs, native)
    folder, kwargs = snapshot_folder(path, kwargs), {**kwargs}
    state = read_weights(folder, _WEIGHTS, "a language model", kwargs.pop("variant", None))
    return _load_foreign(cls, folder, config, state, kwargs)


def load_gpt2(cls: type, source: Any, mask_token_id: int | None, pad_token_id: int | None, kwargs: dict) -> Any:
    """See `MaskedDiffusionLM.from_gpt2`."""
    tokens = {"mask_token_id": mask_token_id, "pad_token_id": pad_token_id}
    kwargs = {**kwargs, **{name: token for name, token in tokens.items() if token is not None}}
    if isinstance(source, torch.nn.Module):
        state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
        folder, config = None, source.config.to_dict()
    else:
        folder = snapshot_folder(source, kwargs)
        config = read_model_config(folder, kwargs)
        state = read_weights(folder, _WEIGHTS, "a language model", kwargs.pop("variant", None))
    if _model_type(config) != "gpt2":
        raise ValueError(f"from_gpt2: got a model of type {_model_type(config)!r}; expected gpt2: use from_pretrained")
    return _load_foreign(cls, folder, config, state, kwargs)


def _load_native(
    cls: type, path: Any, config: dict[str, Any], args: tuple, kwargs: dict[str, Any], native: Callable
) -> Any:
    wants_report = kwargs.pop("output_loading_info", False)
    exactly = not kwargs.get("ignore_mismatched_sizes")
    if exactly and not kwargs.get("subfolder"):
        folder = snapshot_folder(path, kwargs)
        kwargs["variant"] = kwargs.get("variant") or variant_of(folder, _WEIGHTS)
        _check_native(cls, folder, config, kwargs)
    try:
        model, report = native(path, *args, output_loading_info=True, **kwargs)
    except (SafetensorError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{path}: weights missing, cut short or damaged: {reason_of(error)}") from error
    kinds = {"missing_keys": "missing", "mismatched_keys": "of another shape", "unexpected_keys": "unknown"}
    problems = [f"{name} is {text}" for key, text in kinds.items() for name in sorted(map(str, report[key]))]
    if problems and exactly:  # transformers would go on, with random weights or without some
        raise ValueError(f"{path}: the weights are not those of its configuration: {'; '.join(problems[:3])}")
    return (model, report) if wants_report else model


def _check_native(cls: type, folder: Path, config: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Compares the files' headers with the configuration, before transformers makes a model of its sizes.

    Raises FileNotFoundError and ValueError, one line.
    """
    state = header_of(weight_files(folder, _WEIGHTS, kwargs["variant"]))
    made = own_config(config | kwargs, state, folder)
    if made.tie_word_embeddings:
        state.pop(HEAD, None)
    check_state(state, _outline(cls, made)[1], folder, "its configuration")


def own_config(values: dict[str, Any], state: dict[str, Tensor], folder: Path) -> MaskedDiffusionLMConfig:
    """The configuration in a config.json of ours, for these tensors. Raises ValueError where it does not fit."""
    check_counts(values, state, folder / CONFIG_NAME)
    with naming_config(folder, "a masked diffusion language model"):
        fields = MaskedDiffusionLMConfig.__annotations__.keys() & values.keys()
        return MaskedDiffusionLMConfig(**{name: values[name] for name in fields})


def _outline(cls: type, config: MaskedDiffusionLMConfig) -> tuple[Any, dict[str, Tensor]]:
    """A model of a configuration, and the tensors that its files have: no memory and no time is taken by weights."""
    with torch.device("meta"):
        model = cls(config)
    expected = dict(model.state_dict())
    if config.tie_word_embeddings:
        expected.pop(HEAD)
    return model, expected


def _load_foreign(cls: type, folder: Path | None, config: dict, state: dict[str, Tensor], kwargs: dict) -> Any:
    where, kind = folder or "model", _model_type(config)
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
    dtype = None if dtype == "auto" else check_dtype(dtype)
    attention = kwargs.pop("attn_implementation", None)
    overrides = {name: value for name, value in kwargs.items() if name not in _HUB}
    for name in overrides:
        if name not in _FIELDS:
            raise TypeError(
                f"{name}: not an option for a checkpoint of type {kind!r}; expected dtype, attn_implementation, "
                f"{', '.join(_HUB)} or a field of MaskedDiffusionLMConfig"
            )
    if config.get("quantization_config"):
        raise ValueError(f"{where}: its weights are quantised; expected float32, bfloat16 or float16")
    check_counts(config, state, where / CONFIG_NAME if folder else where)
    try:
        fields, state = LAYOUTS[kind](config, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: not a {kind} checkpoint that can be loaded: {reason_of(error)}") from error
    fields |= _special_tokens(folder, kind, config, overrides, fields["vocab_size"])
    fields["add_special_tokens"] = True
    fields |= overrides
    if kind in ADAPTABLE:
        wanted = [fields[name] for name in ("mask_token_id", "pad_token_id") if fields[name] is not None]
        fields["vocab_size"] = max(fields["vocab_size"], *(token + 1 for token in wanted))
        if fields["vocab_size"] > len(state[EMBEDDING]) + len(wanted):
            raise ValueError(f"{where}: special tokens {wanted} are beyond its {len(state[EMBEDDING])} ids")
        grow_vocabulary(state, fields["vocab_size"])
    try:
        made = cls.config_class(**fields, attn_implementation=attention)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {reason_of(error)}") from error
    return build_masked_lm(cls, made, state, dtype, where)


def build_masked_lm(
    cls: type, config: MaskedDiffusionLMConfig, state: dict[str, Tensor], dtype: Any, where: Any
) -> Any:
    """A model in eval mode with the tensors of `state`, a tied head left out; dtype None is theirs.

    Raises ValueError, naming `where`, for other names, shapes or dtypes than the configuration's.
    """
    check_counts(config.to_diff_dict(), state, where)
    model, expected = _outline(cls, config)
    check_state(state, expected, where, "its configuration")
    dtype = state[EMBEDDING].dtype if dtype is None else dtype
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.dtype = dtype
    return model.eval()


def _special_tokens(folder: Path | None, kind: str, config: dict, overrides: dict, vocab_size: int) -> dict[str, Any]:
    """mask, pad, bos and eos ids: those of the configuration, else of the tokenizer, else of the layout.

    End tokens are those of generation_config.json where it names some. What no embedding can be is none: ids below 0,
    BoS and EoS beyond the vocabulary, as of a configuration whose defaults were made for another one.
    """
    names = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
    given = {name: config.get(name) for name in names}
    given["eos_token_id"] = _end_tokens(folder, given["eos_token_id"])
    tokens = {name: _possible(name, value, vocab_size) for name, value in given.items()}
    missing = [name for name, value in tokens.items() if value is None and name not in overrides]
    tokenizer, without = None, ""
    if missing and folder is not None:
        try:
            tokenizer = load_saved_tokenizer(folder, str(config.get("model_type")))
        except FileNotFoundError as error:  # a model may come without one
            without = f" ({error})"
    for name in missing if tokenizer is not None else ():
        tokens[name] = _possible(name, getattr(tokenizer, name), vocab_size)
    if kind == "gpt2" and tokens["mask_token_id"] is None and vocab_size > GPT2_MASK_TOKEN_ID:
        tokens["mask_token_id"] = GPT2_MASK_TOKEN_ID
    if kind == "gpt2" and tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = vocab_size
    if tokens["mask_token_id"] is None and "mask_token_id" not in overrides:
        raise ValueError(
            f"{folder or 'model'}: neither configuration nor tokenizer has a mask token: pass "
            f"mask_token_id= (in training --model.mask_token_id){without}"
        )
    return tokens


def _end_tokens(folder: Path | None, own: int | list[int] | None) -> int | list[int] | None:
    """EoS of config.json, or all end tokens of generation_config.json, that of config.json first."""
    file = None if folder is None else folder / "generation_config.json"
    ends = read_json(file).get("eos_token_id") if file is not None and file.is_file() else None
    if not isinstance(ends, list) or not ends:
        return own if ends is None or ends == [] else ends
    return sorted(ends, key=lambda token: token != own)


def _possible(name: str, value: int | list[int] | None, vocab_size: int) -> int | list[int] | None:
    """The ids that a token of this name can have."""
    most = float("inf") if name in ("mask_token_id", "pad_token_id") else vocab_size  # a row is added for these
    if isinstance(value, list):
        return [token for token in value if 0 <= token < most] or None
    return value if value is not None and 0 <= value < most else None


def _model_type(config: dict[str, Any]) -> str:
    kind = str(config.get("model_type") or "").lower()
    return kind or MODEL_TYPES.get(str((config.get("architectures") or [""])[0]).lower(), "")


def read_model_config(path: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """config.json of a folder or hub id, of a format that `MaskedDiffusionLM.from_pretrained` knows.

    Raises FileNotFoundError where there is none, ValueError for another format (the message lists the known ones).
    """
    if os.path.isdir(path):
        file = Path(path) / CONFIG_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no {CONFIG_NAME} in it; expected the folder of a language model")
    else:
        file = Path(_from_hub(path, kwargs, lambda hub: hf_hub_download(str(path), CONFIG_NAME, **hub)))
    config = read_json(file)
    kind = _model_type(config)
    if kind != MaskedDiffusionLMConfig.model_type and kind not in LAYOUTS:
        given = config.get("model_type") or config.get("architectures")
        raise ValueError(f"{file}: a model of type {given!r}; expected one of {KNOWN}")
    return config


def snapshot_folder(path: Any, kwargs: dict[str, Any]) -> Path:
    """A folder as it is; of a hub id that of its snapshot, with configuration, tokenizer and weights.

    Args:
        path: a folder or a hub id.
        kwargs: options of the hub's download; others are not looked at.

    Raises FileNotFoundError where there is neither, ValueError for a file; one line.
    """
    if os.path.isdir(path):
        return Path(path)
    folder = Path()
    for weights in ("*.safetensors", "pytorch_model*.bin"):  # the second only of repositories without the first
        wanted = {"allow_patterns": [*_TEXTS, weights]}
        folder = Path(_from_hub(path, kwargs, lambda hub, wanted=wanted: snapshot_download(str(path), **wanted, **hub)))
        if list(folder.glob(weights)):
            break
    return folder


def _from_hub(path: Any, kwargs: dict[str, Any], download: Callable[[dict], str]) -> str:
    if os.path.isfile(path):
        raise ValueError(f"{path}: a file; expected the folder that holds it and {CONFIG_NAME}")
    parent = os.path.dirname(os.path.abspath(path)) if os.path.dirname(str(path)) else ""
    if os.path.isdir(parent):  # meant as a path; asking the hub takes a minute where it cannot be reached
        raise FileNotFoundError(f"{path}: no such folder in {parent}; name one that is there, or a hub id")
    try:
        return download({name: kwargs[name] for name in _HUB if name in kwargs})
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path}: not a local folder, and could not be downloaded from the Hugging Face Hub: {reason_of(error)}"
        ) from error
