"""Tokenizers trained on the corpus, and any of Hugging Face's."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.data.text_config import TokenizerConfig
from fastdiff.errors import named, one_line
from fastdiff.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TRAINED_TOKENIZERS = ("bpe", "characters")
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "unk_token": "<unk>",
}  # ids 0 … 4 of trained tokenizers


def load_tokenizer(config: TokenizerConfig, documents: Iterable[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer that a recipe names; transformers' `PreTrainedTokenizerFast`, but for foreign ones of other kinds.

    "bpe" and "characters" are trained on `documents` (the same documents give the same tokenizer), have the special
    tokens <pad>, <bos>, <eos>, <mask>, <unk> with ids 0 … 4 and add none by themselves. "bpe" is byte-level: any text
    comes back from its tokens as it was. "characters" knows those of `documents`; others become <unk>.

    Any other name is a folder or hub id for transformers' `AutoTokenizer`; `documents` are not read. Where it has no
    pad, bos, eos or mask token, <pad>, <bos>, <eos>, <mask> are added, in this order, at the end of its vocabulary (a
    model must then have as many embeddings). GPT-2's <|endoftext|> stays its eos and bos.

    Raises:
        FileNotFoundError: there is no such tokenizer, or the hub cannot be reached; one line.
    """
    if config.name == "bpe":
        return _wrap(_train_bpe(documents, config.vocab_size))
    if config.name == "characters":
        return _wrap(_character_tokenizer(documents))
    from transformers import AutoTokenizer

    expected = "expected 'bpe', 'characters' or a Hugging Face tokenizer's folder or hub id"
    path = Path(config.name).expanduser()
    if not path.is_dir() and config.name.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"{named('name')}: got {config.name!r}, which is not a folder; {expected}")
    try:
        tokenizer = read_tokenizer(path if path.is_dir() else config.name, AutoTokenizer)
    except (ValueError, OSError) as error:  # no such id, no network, no tokenizer in the folder
        raise FileNotFoundError(
            f"{named('name')}: got {config.name!r}, which cannot be loaded ({one_line(error)[:300]}); {expected}"
        ) from None
    missing = [name for name in SPECIAL_TOKENS if name != "unk_token" and getattr(tokenizer, name) is None]
    tokenizer.add_special_tokens({name: SPECIAL_TOKENS[name] for name in missing})
    tokenizer.clean_up_tokenization_spaces = False  # it would make decoded text differ from the tokens' own
    return tokenizer


def read_tokenizer(place: str | Path, kind: Any) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or hub id, by a class of transformers such as `AutoTokenizer`.

    Raises ValueError where its files are damaged, OSError where there are none; one line that names the place.
    """
    with reading(place, ": no tokenizer that can be loaded (tokenizer.json, tokenizer_config.json)"):
        return kind.from_pretrained(str(place))


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of texts, nothing added to them; special tokens that are spelled out in a text are plain text."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # texts longer than a model takes are expected: they are cut into windows
    )
    return encoded["input_ids"]


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of what decides token ids: vocabulary, merges, normalisation and special tokens; kept by save and load."""
    content = {"special": {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL_TOKENS}}
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        content["backend"] = {key: state[key] for key in state if key not in ("padding", "truncation")}
    else:
        content |= {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _train_bpe(documents: Iterable[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte, seen or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _character_tokenizer(documents: Iterable[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted(set().union(*map(set, documents)))
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS.values(), *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _wrap(tokenizer) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)
