"""Text to ids and back, one way for all: what training adds, places to fill, words that are the mask token, chat."""

import functools
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_kinds import bert_like, gpt2_like, sentencepiece_like, with_holes
from transformers import AutoTokenizer

from fastdiff.data import MASK_WORD, TextCodec, TokenizerConfig, chat_template, load_tokenizer
from fastdiff.data.tokenization import decode_ids, encode_texts, ids_without_text, vocabulary_size

KINDS = {"sentencepiece": sentencepiece_like, "bert": bert_like, "gpt2": gpt2_like, "holes": with_holes}


def codec(tokenizer, **config):
    fields = dict(mask_token_id=tokenizer.mask_token_id, bos_token_id=None, eos_token_id=None, add_special_tokens=False)
    return TextCodec(tokenizer, SimpleNamespace(**(fields | config)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["red cat", " runs", "red <s>[SEP]</s> cat<|endoftext|>"])
def test_all_ways_give_the_ids_of_training(kind, text):
    tokenizer = KINDS[kind]()
    mine = codec(tokenizer, mask_token_id=tokenizer.mask_token_id or 3)
    (of_training,) = encode_texts(tokenizer, [text])
    assert mine.encode(text) == mine.encode_prompt(text) == mine.encode_inside(text) == of_training
    assert mine.prefix == [] and mine.encode("") == mine.encode_prompt("") == []


@functools.cache
def trained():
    return codec(load_tokenizer(TokenizerConfig("bpe", 303), ["to be or not"] * 3))


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_any_prompt_is_what_training_made_of_it(text):
    tokenizer = test_any_prompt_is_what_training_made_of_it.tokenizer
    mine = codec(tokenizer)
    if "<mask>" not in text:
        assert mine.encode_prompt(text) == encode_texts(tokenizer, [text])[0]
        assert mine.decode(mine.encode(text)) == text


test_any_prompt_is_what_training_made_of_it.tokenizer = load_tokenizer(
    TokenizerConfig("bpe", 303), ["to be or not"] * 3
)


def test_other_projects_models_get_what_their_tokenizers_put_before_a_text():
    """[SEP] and EoS, which say that a text has ended, stand before none that goes on."""
    bert, pieces, bytes_ = (codec(make(), add_special_tokens=True, mask_token_id=4) for make in
                            (bert_like, sentencepiece_like, gpt2_like))  # fmt: skip
    assert bert.encode("red cat") == [2, *bert.tokenizer("red cat", add_special_tokens=False)["input_ids"]]
    assert bert.encode("red cat") == bert.tokenizer("red cat")["input_ids"][:-1]
    assert pieces.encode("red cat") == pieces.tokenizer("red cat")["input_ids"]
    assert bytes_.prefix == [] and bytes_.encode(" red") == bytes_.tokenizer(" red")["input_ids"]
    assert bert.encode("red [SEP]")[-1] == 3 and codec(bert_like()).encode("red [SEP]")[-1] != 3
    assert (bert.start, pieces.start, bytes_.start) == ([2], [2], [bytes_.tokenizer.bos_token_id])


def test_a_text_of_fastdiffs_training_begins_behind_the_end_of_another():
    mine = codec(sentencepiece_like())
    assert mine.start == [mine.tokenizer.eos_token_id]
    assert codec(sentencepiece_like(eos_token=None)).start == [mine.tokenizer.bos_token_id]
    assert codec(sentencepiece_like(eos_token=None, bos_token=None)).start == []


@pytest.mark.parametrize("kind", ["sentencepiece", "bert", "holes"])
def test_places_to_fill(kind):
    tokenizer = KINDS[kind]()
    mine = codec(tokenizer)
    ids = mine.encode_prompt(f"red {tokenizer.mask_token}{tokenizer.mask_token} cat")
    assert ids.count(tokenizer.mask_token_id) == 2 and tokenizer.unk_token_id not in ids
    assert tokenizer.mask_token_id not in mine.encode(f"red {tokenizer.mask_token}")  # of a text to be scored


def test_a_word_that_is_the_mask_token_is_no_place_to_fill():
    """As with GPT-2 made a masked diffusion model, whose mask token 10541 is an ordinary one."""
    tokenizer = gpt2_like()
    (word,) = tokenizer(" mask")["input_ids"]
    mine = codec(tokenizer, mask_token_id=word)
    assert mine.mask_text == "<mask>" and tokenizer.mask_token is None
    ids = mine.encode_prompt(" red mask<mask> cat")
    assert ids.count(word) == 1 and ids.count(MASK_WORD) == 1 and ids.index(MASK_WORD) < ids.index(word)
    assert mine.as_seen(ids) == [*encode_texts(tokenizer, [" red mask"])[0], word, *tokenizer(" cat")["input_ids"]]
    assert mine.encode(" red mask") == encode_texts(tokenizer, [" red mask"])[0]
    assert mine.as_given(mine.encode(" mask")) == [MASK_WORD] and mine.decode([MASK_WORD]) == " mask"


def test_a_mask_token_that_the_tokenizer_has_but_does_not_name():
    """LLaDA's <|mdm_mask|>; "<mask>" serves there, too."""
    tokenizer = gpt2_like()
    tokenizer.add_tokens(["<|mdm_mask|>"], special_tokens=True)
    mask = tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    mine = codec(tokenizer, mask_token_id=mask, add_special_tokens=True)
    assert mine.encode_prompt("a<|mdm_mask|><mask>b").count(mask) == 2 and mine.mask_text == "<|mdm_mask|>"


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_one_more_than_the_largest_id(kind):
    tokenizer = KINDS[kind]()
    assert vocabulary_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1
    silent = ids_without_text(tokenizer, 300 + 50, kept=(310,))
    assert 310 not in silent and {*silent, *tokenizer.get_vocab().values(), 310} == set(range(350))
    assert all(decode_ids(tokenizer, [token], special_tokens=True) == "" for token in silent)


def test_holes_that_new_special_tokens_would_fill_wrongly(tmp_path):
    """Of seven tokens, so that the next one would get the id 7 of "red"; a word <pad> is the pad token."""
    with_holes(pad_token=None).save_pretrained(tmp_path)
    assert load_tokenizer(TokenizerConfig(str(tmp_path)), ()).pad_token_id == 0
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"<pad>"', '"blue"'))
    with pytest.raises(ValueError, match="name: got .*, whose ids have holes, so that <pad> would get the id 7 of ano"):
        load_tokenizer(TokenizerConfig(str(tmp_path)), ())


def test_half_a_character_is_one_line():
    for call in (codec(gpt2_like(), mask_token_id=1).encode, codec(gpt2_like(), mask_token_id=1).encode_prompt):
        with pytest.raises(ValueError, match="text: got half of a surrogate pair or bytes that are not UTF-8"):
            call("a\udcff")


# ---------------------------------------------------------------------------------------------- chat templates


def chatting(folder, template):
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return codec(AutoTokenizer.from_pretrained(folder), add_special_tokens=True)


def test_a_chat_template_writes_its_own_special_tokens(tmp_path):
    mine = chatting(tmp_path, "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    rows = mine.encode_chats(["red cat", "to <mask>"])
    assert rows[0] == mine.tokenizer("<s>red cat</s>", add_special_tokens=False)["input_ids"]
    assert rows[0].count(2) == 1 and rows[0][-1] == 3 and 4 in rows[1]


BAD_TEMPLATES = {
    "loops": ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "takes more than"),
    "writes": ("{% for i in range(90000) %}{% for j in range(90000) %}abcd{% endfor %}{% endfor %}", "takes more than"),
    "grows": ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{n.x}}",
              "1 GiB of memory"),
    "multiplies": ("{{ 'x' * 10**11 }}", "memory"),
    "raises": ("{{ raise_exception('no user\n may speak') }}", "TemplateError: no user"),
    "divides": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "is not a template": ("{% for %}", "TemplateSyntaxError"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_a_chat_template_that_cannot_be_used_is_one_line(tmp_path, kind, monkeypatch):
    template, message = BAD_TEMPLATES[kind]
    monkeypatch.setattr(chat_template, "_SECONDS", 0.5 if kind in ("loops", "writes") else 20)
    mine, started = chatting(tmp_path, template), time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        mine.encode_chats(["red"])
    assert str(error.value).startswith(str(tmp_path / "chat_template.jinja")) and "\n" not in str(error.value)
    assert time.monotonic() - started < 20


def test_no_chat_template():
    with pytest.raises(ValueError, match="chat: this tokenizer has no chat template; leave chat out"):
        codec(sentencepiece_like()).encode_chats(["red"])
