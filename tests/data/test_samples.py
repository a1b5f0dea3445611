"""Sentences, and the split into a part to train on and a held-out part."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data.corpora import Corpus, Pair
from fastdiff.data.samples import (
    SENTENCES_BETWEEN,
    Samples,
    Split,
    paragraphs,
    plain_line,
    sentence_ends,
    sentence_pair,
    tail_start,
)


def corpus(records, long_documents=False):
    return Corpus("here", "", lambda: iter(records), long_documents)


def sentences(text):
    limits = [0, *sentence_ends(text), len(text)]
    return [text[start:end].strip() for start, end in zip(limits, limits[1:], strict=False)]


@pytest.mark.parametrize(
    "expected",
    [
        ["One sentence"],
        ["One.", "Two!", "Three?", "Four… five.", "Élan."],
        ['"Stop!"', "he did.", "“Now?”", "(Yes.)", "Then"],
        ["Mr. Brown met Dr. Who, e.g. Tom.", "They left."],
        ["Version 3.5 of a.b.c costs 4.", "Cheap."],
        ["FIRST WITCH.", "Where the place?"],
    ],
)
@pytest.mark.parametrize("space", [" ", "\n", "\n\n  "])
def test_sentences(expected, space):
    if "he did." in expected:  # a small letter does not begin a sentence
        expected = ['"Stop!" he did.', "“Now?”", "(Yes.)", "Then"]
    assert sentences(space.join(expected)) == [re.sub(r"\s+", " ", s) if space == " " else s for s in expected]


def test_pairs_of_sentences():
    text = "Once there was a cat.  It slept.\nIt woke. The end."
    assert sentence_pair(text, last=False) == ("Once there was a cat.", "  It slept.\nIt woke. The end.")
    assert sentence_pair(text, last=True) == (
        "Once there was a cat." + SENTENCES_BETWEEN + "The end.",
        "  It slept.\nIt woke. ",
    )
    assert sentence_pair("Only one.", last=False) is None
    assert sentence_pair("Only. Two.", last=True) is None


@settings(deadline=None)
@given(st.lists(st.sampled_from(["A b.", "C", "“D!”", "e?", " ", "\n", "(F."]), max_size=12).map("".join))
def test_the_parts_of_a_text_are_the_text(text):
    if pair := sentence_pair(text, last=False):
        assert pair.prompt + pair.answer == text.strip()
    if pair := sentence_pair(text, last=True):
        first, last = pair.prompt.split(SENTENCES_BETWEEN)
        assert first + pair.answer + last == text.strip()


def test_long_documents_are_cut_into_paragraphs():
    text = "\n\nAct one. It begins.\nHere. \n \nShort\n\n\nAct two. It ends."
    assert paragraphs(text) == ["Act one. It begins.\nHere.", "Short", "Act two. It ends."]
    samples = Samples(corpus([text], long_documents=True), "first_sentence")
    assert list(samples) == [("Act one.", " It begins.\nHere."), ("Act two.", " It ends.")]
    assert samples.left_out == {"texts of fewer than 2 sentences": 1}
    assert len(list(Samples(corpus([text]), "first_sentence"))) == 1


def test_plain_lines():
    text = "  To be, or not to be,--that is\n\n'Tis o'er-run!\n***\nHAMLET.\nHAMLET.\n\u00c9tienne \u2014 16th\n"
    samples = Samples(corpus([text, "HAMLET."]), "plain_line")
    assert [tuple(pair) for pair in samples] == [
        ("to be or not to be that is", "To be, or not to be,--that is"),
        ("tis oer run", "'Tis o'er-run!"),
        ("hamlet", "HAMLET."),
        ("\u00e9tienne 16th", "\u00c9tienne \u2014 16th"),
    ]
    assert samples.left_out == {"repeated lines": 2, "lines without a letter or digit": 2}


def parts(split):
    return [[sample for held_out, sample in split if held_out == side] for side in (False, True)]


@pytest.mark.parametrize("pairs", [False, True])
def test_split_by_sample(pairs):
    records = [f"Document {i % 150}.\nLines." for i in range(200)]  # fifty of them twice
    if pairs:
        records = [Pair(text, "same") for text in records]
    split = Split(Samples(corpus(records), "pairs" if pairs else "documents"), 0.1)
    train, held_out = parts(split)
    assert sorted(train + held_out) == sorted(records) and not set(train) & set(held_out)
    assert len(set(held_out)) == 15
    assert parts(split) == [train, held_out]
    texts = list(split.training_texts())
    assert len(texts) == len(train) * (2 if pairs else 1) and texts[0] == (train[0].prompt if pairs else train[0])
    random.Random(1).shuffle(records)
    shuffled = Split(Samples(corpus(records), "pairs" if pairs else "documents"), 0.1)
    assert [sorted(part) for part in parts(shuffled)] == [sorted(train), sorted(held_out)]


def test_few_documents_lose_their_ends():
    records = ["".join(f"line {i} of {name}\n" for i in range(100)) for name in "abc"]
    split = Split(Samples(corpus(records), "documents"), 0.1)
    train, held_out = parts(split)
    assert [head + tail for head, tail in zip(train, held_out, strict=True)] == records
    for tail in held_out:
        assert tail.startswith("line ") and 0.1 <= len(tail) / len(records[0]) < 0.12
    assert list(split.training_texts()) == train


@pytest.mark.parametrize("text", ["one line of many words", "a\nb", "a b\n", "x  \n\n\n", "first\n" + "long " * 50])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_tail_start(text, fraction):
    cut = tail_start(text, fraction)
    head, tail = text[:cut], text[cut:]
    assert head.strip()
    if re.search(r"\S\s+\S", text):
        assert tail.strip() and head[-1] in " \n"
    else:
        assert not tail


@pytest.mark.parametrize("records", [[Pair("a", "b")], [Pair("a", "b")] * 5, [Pair("a", "b"), Pair(" ", "c")]])
def test_too_few_pairs(records):
    with pytest.raises(ValueError, match="here has 1 pair; expected at least 2"):
        Split(Samples(corpus(records), "pairs"), 0.1)


def test_nothing_left():
    with pytest.raises(ValueError, match="here has no text to train on; found 2 texts of fewer than 3 sentences"):
        Split(Samples(corpus(["One. Two.", "Three"]), "first_and_last"), 0.1)
    with pytest.raises(ValueError, match="found 1 pairs with an empty prompt or answer"):
        Split(Samples(corpus([Pair("", "x")]), "pairs"), 0.1)
    with pytest.raises(ValueError, match="found nothing"):
        Split(Samples(corpus([]), "documents"), 0.1)


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        ("O'er-run, Sir!", "oer run sir"),
        ("नमस्ते, दुनिया!", "नमस्ते दुनिया"),
        ("สวัสดี (ครับ)", "สวัสดี ครับ"),
        ("Cafe\u0301, NA\u0308IVE.", "cafe\u0301 na\u0308ive"),
        ("می\u200cخواهم؟", "می\u200cخواهم"),
        ("क्\u200dष", "क्\u200dष"),
    ],
)
def test_plain_lines_keep_what_letters_are_made_of(line, plain):
    assert plain_line(line) == plain


@pytest.mark.parametrize("text", ["ACGT" * 250, "天地玄黄宇宙洪荒" * 125, "e\u0301" * 500])
def test_the_end_of_a_line_without_spaces_is_held_out(text):
    pieces = [(piece.held_out, piece.sample) for piece in Split(Samples(corpus([text]), "documents"), 0.1)]
    assert [held_out for held_out, _ in pieces] == [False, True] and "".join(part for _, part in pieces) == text
    assert len(pieces[1][1]) == pytest.approx(100, abs=1) and pieces[1][1][0] != "\u0301"
    assert tail_start("x", 0.1) == 1 and tail_start("  x ", 0.5) == 4
