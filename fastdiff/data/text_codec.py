"""One way from text to token ids and back: what training did to texts is what generation and evaluation do."""

import copy
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastdiff.data.chat_template import render_chat
from fastdiff.data.tokenization import check_text, decode_ids, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MASK_TEXT = "<mask>"
# In a prompt's ids: the mask token as a word of the text, which the model sees as a mask token and nothing fills.
MASK_WORD = -1


class TextCodec:
    """A tokenizer as a model's training used it.

    fastdiff's training adds nothing to a text, and special tokens that are spelled out in one are text. The other
    projects' models (`config.add_special_tokens`) were trained on what their tokenizers make of a text by themselves:
    the tokens put before it (BoS, [CLS]) are put there here, too. What a tokenizer puts behind a text (EoS, [SEP]) says
    that it has ended, and is left out of what a model is to go on with.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's `MaskedDiffusionLMConfig`: its special tokens and add_special_tokens are read.

    Attributes:
        mask_text: how a place to fill is written in a prompt: the mask token's own text, "<mask>" where the tokenizer
            names no mask token.
        prefix: ids that every text begins with.
        start: ids of a text that nothing is known of: the prefix; where there is none, BoS for other projects' models,
            and for fastdiff's the EoS that closes the text before, as in packed training data. The second is taken
            where the first is missing.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: Any) -> None:
        self.tokenizer, self.mask_token_id = tokenizer, int(config.mask_token_id)
        self.adds_special_tokens = bool(config.add_special_tokens)
        self.bos_token_id: int | None = config.bos_token_id
        if self.bos_token_id is None:
            self.bos_token_id = tokenizer.bos_token_id
        own = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        self.end_token_ids = () if own is None else (own,) if isinstance(own, int) else tuple(own)
        self.prefix = self._prefix() if self.adds_special_tokens else []
        begin = [[] if self.bos_token_id is None else [self.bos_token_id], list(self.end_token_ids[:1])]
        self.start = self.prefix or (begin[0] or begin[1] if self.adds_special_tokens else begin[1] or begin[0])
        self.markers = self._mask_texts()
        self.mask_text = self.markers[0]

    @cached_property
    def _filling(self) -> Any:
        return _with_masks(self.tokenizer, self.markers)  # of a large vocabulary this takes a second

    def encode(self, text: str) -> list[int]:
        """Ids of a text as training had them, without end; [] for an empty one. Nothing in it is to be filled.

        Raises ValueError for half of a surrogate pair, which is no character.
        """
        return [*self.prefix, *self.encode_inside(text)] if text else []

    def encode_inside(self, text: str) -> list[int]:
        """The same for a text within another one: without prefix."""
        check_text(text)
        if not self.adds_special_tokens:
            return encode_texts(self.tokenizer, [text])[0]
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def encode_prompt(self, text: str) -> list[int]:
        """As `encode`, with the mask token for each place to fill, and MASK_WORD where a word is the mask token."""
        return [*self.prefix, *self._fill(text, self.adds_special_tokens)] if text else []

    def encode_chats(self, messages: Sequence[str]) -> list[list[int]]:
        """Ids of users' messages, each put into the tokenizer's chat template, which writes its own special tokens.

        Raises ValueError, naming the file, where there is no template, or it raises or does not end.
        """
        return [self._fill(text, special=True) for text in render_chat(self.tokenizer, messages)]

    def as_given(self, ids: Sequence[int]) -> list[int]:
        """Ids of a text as a prompt of which nothing is to be filled: the mask token becomes MASK_WORD."""
        return [MASK_WORD if token == self.mask_token_id else token for token in ids]

    def as_seen(self, ids: Sequence[int]) -> list[int]:
        """Ids of a prompt as the model sees them: MASK_WORD is the mask token."""
        return [self.mask_token_id if token == MASK_WORD else token for token in ids]

    def decode(self, ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """Text of ids, special tokens left out or written; half characters become U+FFFD."""
        return decode_ids(self.tokenizer, self.as_seen(ids), special_tokens=special_tokens)

    def _prefix(self) -> list[int]:
        """What the tokenizer itself puts before a text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def _mask_texts(self) -> list[str]:
        own, added = self.tokenizer.mask_token, self.tokenizer.added_tokens_decoder.get(self.mask_token_id)
        texts = [own] if own is not None else [] if added is None else [added.content]
        return [*texts, *([DEFAULT_MASK_TEXT] if own is None and DEFAULT_MASK_TEXT not in texts else [])]

    def _fill(self, text: str, special: bool) -> list[int]:
        check_text(text)
        if self.tokenizer.is_fast:
            self._filling.encode_special_tokens = not special
            encoding = self._filling.encode(text, add_special_tokens=False)
            ids, tokens = encoding.ids, encoding.tokens
        else:
            ids = self._filling(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens = self._filling.convert_ids_to_tokens(ids)
        given = self.as_given(ids)
        return [self.mask_token_id if t in self.markers else i for t, i in zip(tokens, given, strict=True)]


def _with_masks(tokenizer: "PreTrainedTokenizerBase", markers: Sequence[str]) -> Any:
    """A tokenizer that takes mask texts as tokens even where the special tokens in a text are text; a new one.

    It is one of the package tokenizers; for a tokenizer in Python its copy, where special tokens in a text are such.
    """
    if not tokenizer.is_fast:
        known = copy.deepcopy(tokenizer)
        known.add_tokens([text for text in markers if text not in known.get_vocab()], special_tokens=True)
        return known
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    added = {token["content"]: token for token in state["added_tokens"]}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    for text in markers:
        if text not in added:
            added[text] = {"id": 1 + max(tokenizer.get_vocab().values()), "content": text, **plain}
        added[text]["special"] = False
    state["added_tokens"] = list(added.values())
    return Tokenizer.from_str(json.dumps(state))
