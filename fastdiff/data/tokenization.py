"""Tokenizers trained on the corpus, and any of Hugging Face's."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff.data.text_config import TokenizerConfig
from fastdiff.errors import named, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges")  # how the names of a tokenizer's files begin
TRAINED_TOKENIZERS = ("bpe", "characters")
_LONGEST_WORD = 64
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")
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
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else config.name, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such id, no network, no tokenizer in the folder
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{named('name')}: got {config.name!r}, which cannot be loaded ({reason}); {expected}"
        ) from None
    missing = [name for name in SPECIAL_TOKENS if name != "unk_token" and getattr(tokenizer, name) is None]
    before = tokenizer.get_vocab()
    tokenizer.add_special_tokens({name: SPECIAL_TOKENS[name] for name in missing})
    for name in missing:
        new = SPECIAL_TOKENS[name] not in before
        if new and getattr(tokenizer, f"{name}_id") in before.values():  # ids are counted from the number of tokens
            raise ValueError(
                f"{named('name')}: got {config.name!r}, whose ids have holes, so that {SPECIAL_TOKENS[name]} would get "
                f"the id {getattr(tokenizer, f'{name}_id')} of another token; name a {name} in its files"
            )
    tokenizer.clean_up_tokenization_spaces = False  # it would make decoded text differ from the tokens' own
    return tokenizer


def load_saved_tokenizer(folder: str | Path, model_type: str = "") -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder, beside a model of a type (config.json's `model_type`), as it is. No code is run.

    Raises FileNotFoundError where there is none that can be loaded; one line.
    """
    from transformers import AutoTokenizer, Qwen2Tokenizer

    if not has_tokenizer(folder):  # transformers would make one that knows no words
        raise FileNotFoundError(f"{folder}: no tokenizer that can be loaded: expected tokenizer.json in it")
    # Dream's own class is code in its repository; what it does is Qwen2's tokenizer.
    is_dream = model_type.lower() == "dream"
    kind = Qwen2Tokenizer if is_dream else AutoTokenizer
    try:
        options = {} if is_dream else {"trust_remote_code": False}
        return kind.from_pretrained(str(folder), **options)
    except Exception as error:  # transformers and tokenizers raise what they like on missing and damaged files
        raise FileNotFoundError(
            f"{folder}: no tokenizer that can be loaded (tokenizer.json, tokenizer_config.json): {one_line(error)}"
        ) from error


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has files of a tokenizer."""
    return any(file.name.startswith(_FILES) for file in Path(folder).iterdir())


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """1 + the largest id: `len(tokenizer)` counts tokens, which are fewer where ids have holes."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def ids_without_text(tokenizer: "PreTrainedTokenizerBase", vocab_size: int, kept: Collection[int] = ()) -> list[int]:
    """Ids below `vocab_size` that a tokenizer does not have, but for `kept`: they would decode to nothing.

    Vocabularies of models are padded beyond the tokenizer's largest id, and tokenizers have holes in their ids.
    """
    known = {*tokenizer.get_vocab().values(), *kept}
    return [token for token in range(vocab_size) if token not in known]


def check_text(text: str) -> None:
    """Raises ValueError where a text has half of a surrogate pair, such as for bytes that were no UTF-8."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("text: got half of a surrogate pair or bytes that are not UTF-8; expected characters")


def decode_ids(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], *, special_tokens: bool = False) -> str:
    """Text of ids as it is in their tokens, special tokens left out or written; half characters become U+FFFD."""
    return tokenizer.decode(list(ids), skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False)


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
    tokenizer.train_from_iterator(_in_words(documents), trainer)
    return tokenizer


def _in_words(documents: Iterable[str]) -> Iterator[str]:
    """Documents, cut within words of more than 64 characters: each merge of training walks through them.

    Chinese and DNA have no spaces: a line of theirs is a word.
    """
    for document in documents:
        start = 0
        for word in _LONG_WORD.finditer(document):
            for cut in range(word.start() + _LONGEST_WORD, word.end(), _LONGEST_WORD):
                yield document[start:cut]
                start = cut
        yield document[start:]


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
