"""Small tokenizers of the kinds that models come with, built here."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def sentencepiece_like(words: str = "red cat runs to be or not 4 5", **special) -> PreTrainedTokenizerFast:
    """Unigram pieces with Metaspace, `<s>` before a text; its decoder keeps the space of a first word."""
    pieces = ["<unk>", "<pad>", "<s>", "</s>", "▁", *dict.fromkeys("▁" + word for word in words.split())]
    pieces += sorted({character for piece in pieces[4:] for character in piece} - {"▁"} - set(pieces))
    scores = [(piece, -float(len(pieces) if len(piece) == 1 else 1)) for piece in pieces]
    backend = Tokenizer(models.Unigram(scores, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    names = dict(unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>")
    return _wrapped(backend, names | special)


def bert_like(words: str = "red cat runs run to be or not", **special) -> PreTrainedTokenizerFast:
    """WordPiece in the template [CLS] … [SEP]; no BoS and EoS but these."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words.split()), "##s"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    names = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return _wrapped(backend, names | {"bos_token": "[CLS]", "eos_token": "[SEP]"} | special)


def gpt2_like(words: str = "red cat mask", **special) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, <|endoftext|>, and no mask token. " mask" is one ordinary token."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words.split():
        whole = "Ġ"
        for letter in word:
            merges.append((whole, letter))
            whole += letter
            vocabulary.setdefault(whole, len(vocabulary))
    vocabulary["<|endoftext|>"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    return _wrapped(backend, dict(eos_token=end, bos_token=end, unk_token=end) | special)


def with_holes(**special) -> PreTrainedTokenizerFast:
    """Words with the ids 0 … 4, 7 and 40: seven tokens, a vocabulary of 41."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<mask>": 3, "<unk>": 4, "red": 7, "cat": 40}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "mask", "unk")}
    return _wrapped(backend, names | special)


def _wrapped(backend: Tokenizer, names: dict) -> PreTrainedTokenizerFast:
    names = {name: token for name, token in names.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
