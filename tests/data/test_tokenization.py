"""Tokenizers: trained ones give text back as it was, foreign ones get what they lack."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdiff.data import TokenizerConfig, load_tokenizer
from fastdiff.data.tokenization import encode_texts, tokenizer_fingerprint

TEXTS = ["To be, or not to be, that is the question:\n", "Whether 'tis nobler in the mind to suffer\n"] * 3
SPECIALS = ["<pad>", "<bos>", "<eos>", "<mask>", "<unk>"]


@pytest.fixture(scope="session")
def bpe():
    return load_tokenizer(TokenizerConfig("bpe", vocab_size=303), iter(TEXTS))


@pytest.fixture(scope="session")
def characters():
    return load_tokenizer(TokenizerConfig("characters"), iter(["one\n", "two-three, four"]))


def test_special_tokens_come_first(bpe, characters):
    for tokenizer in (bpe, characters):
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        assert tokenizer.convert_ids_to_tokens(range(5)) == SPECIALS
        named = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "mask", "unk")]
        assert named == [0, 1, 2, 3, 4]


def test_the_vocabulary_is_as_large_as_asked_for(bpe):
    assert len(bpe) == 303
    words = encode_texts(bpe, TEXTS[:1])[0]
    assert len(words) < len(TEXTS[0])  # merges were learnt


@settings(deadline=None, max_examples=300)
@given(st.text())
@example(" two  spaces , and 'quotes' do n't \r\n\t\x00 é😀﷽ <mask> <eos></s> ")
def test_any_text_comes_back(bpe, text):
    assert bpe.decode(encode_texts(bpe, [text])[0]) == text
    assert bpe.decode(bpe(text)["input_ids"]) == text


@settings(deadline=None)
@given(st.text("one\ntw-hr, fu"))
def test_known_characters_come_back(characters, text):
    ids = encode_texts(characters, [text])[0]
    assert characters.decode(ids) == text and len(ids) == len(text)


def test_an_unknown_character(characters):
    assert encode_texts(characters, ["oxo"])[0][1] == characters.unk_token_id


def test_nothing_is_added_to_a_text(bpe, characters):
    for tokenizer in (bpe, characters):
        assert encode_texts(tokenizer, ["", "one", "one one"])[0] == []
        assert tokenizer("")["input_ids"] == [] and not set(tokenizer("one")["input_ids"]) & {0, 1, 2, 3, 4}
    assert encode_texts(bpe, []) == []


def test_special_tokens_in_a_corpus_are_text(bpe):
    assert bpe("a<mask>b")["input_ids"].count(bpe.mask_token_id) == 1  # infilling needs it
    assert not set(encode_texts(bpe, ["a<mask>b<eos>"])[0]) & {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["bpe", "characters"])
def test_the_same_texts_give_the_same_tokenizer(name):
    config = TokenizerConfig(name, vocab_size=330)
    first, again = (load_tokenizer(config, iter(TEXTS)) for _ in range(2))
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(again)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(load_tokenizer(config, ["tea"]))


@pytest.mark.parametrize("name", ["bpe", "characters"])
def test_saved_and_loaded(tmp_path, name):
    tokenizer = load_tokenizer(TokenizerConfig(name, vocab_size=330), TEXTS)
    tokenizer.save_pretrained(tmp_path)
    text = TEXTS[0] + " , <eos> mind "
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(TokenizerConfig(str(tmp_path)), ())):
        assert len(loaded) == len(tokenizer) and loaded.convert_ids_to_tokens(range(5)) == SPECIALS
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_a_foreign_tokenizer_gets_what_it_lacks(tmp_path):
    """One with GPT-2's single special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary | {"<|endoftext|>": 256}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, bos_token=end, unk_token=end, clean_up_tokenization_spaces=True
    ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(TokenizerConfig(str(tmp_path)), ())
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (256, 256)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer)) == (257, 258, 259)
    text = "do n't touch , this ."
    assert tokenizer.decode(encode_texts(tokenizer, [text])[0]) == text


@pytest.mark.parametrize("kind", ["missing", "empty folder", "unknown id"])
def test_no_such_tokenizer(tmp_path, monkeypatch, kind):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no waiting for a network
    name = {"missing": str(tmp_path / "none"), "empty folder": str(tmp_path), "unknown id": "nobody/nothing"}[kind]
    with pytest.raises(
        FileNotFoundError, match="expected 'bpe', 'characters' or a Hugging Face tokenizer's folder"
    ) as error:
        load_tokenizer(TokenizerConfig(name), ())
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_vocabulary_too_small_for_bytes():
    with pytest.raises(ValueError, match="vocab_size: got 200; expected at least 300"):
        TokenizerConfig("bpe", vocab_size=200)
