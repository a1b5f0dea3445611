"""Measures of captions: against the published program's numbers, by hand, and at their edges."""

import random

import pytest
import torch

from fastdiff.evaluation import (
    attribute_accuracy,
    caption_scores,
    cider_d,
    commonest_words_baseline,
    diversity,
    nearest_picture_baseline,
)
from fastdiff.evaluation.captions import markdown_of, words

REFERENCES = [
    ["A small red square at the top left.", "a red square, small"],
    ["Two large blue circles.", "two big blue circles on white", "a pair of circles"],
    ["a dog runs on the grass"],
    ["The dog's ball is red.", "a red ball on the grass"],
    ["a man rides a bike down the street"],
    ["a t-shirt"],
]
CANDIDATES = [
    "a small red square at the top",
    "two large blue circles circles circles",
    "a dog dog runs on the grass in the sun of a warm day",
    "a red ball",
    "a woman",
    "a t-shirt",
]
# of pycocoevalcap 1.2 (cider.Cider, bleu.Bleu), given these words joined by spaces
PUBLISHED_CIDER_D = [5.582975904, 2.573991694, 1.836254409, 3.007234111, 0.0, 5.0]
PUBLISHED_BLEU4 = 0.5161910496


def test_scores_are_those_of_the_published_program():
    assert cider_d(CANDIDATES, REFERENCES) == pytest.approx(PUBLISHED_CIDER_D, abs=2e-9)
    scores = caption_scores(CANDIDATES, REFERENCES)
    assert scores.cider_d == pytest.approx(sum(PUBLISHED_CIDER_D) / 6, abs=2e-9)
    assert scores.bleu4 == pytest.approx(PUBLISHED_BLEU4, abs=1e-9)


def test_random_texts_have_the_published_programs_scores():
    cider = pytest.importorskip(
        "pycocoevalcap.cider.cider", reason="NOT TESTED: pip install --no-deps pycocoevalcap==1.2"
    )
    rng = random.Random(0)

    def sentence(least):
        return " ".join(rng.choice("abcdefghijkl"[: rng.randint(1, 12)]) for _ in range(rng.randint(least, 14)))

    for _ in range(20):
        references = [[sentence(1) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 12))]
        candidates = [sentence(0) if rng.random() < 0.5 else rng.choice(texts)[:9] for texts in references]
        theirs = cider.Cider().compute_score(
            dict(enumerate(references)), {index: [text] for index, text in enumerate(candidates)}
        )
        assert cider_d(candidates, references) == pytest.approx(theirs[1].tolist(), abs=1e-9)


def test_words():
    assert words("A T-shirt, don't!  (two_words) -- Été 2") == ["a", "t-shirt", "don't", "two", "words", "été", "2"]
    assert words("...") == []


def test_word_f1_and_exact_match():
    scores = caption_scores(
        ["a red red ball", "Blue Sky!", "", "x"], [["a red ball"], ["sky", "blue sky"], ["a"], ["y"]]
    )
    # 2·3 of 4 + 3 words; all; none; none
    assert scores.word_f1 == pytest.approx((6 / 7 + 1 + 0 + 0) / 4)
    assert scores.exact_match == 0.25 and scores.pictures == 4
    assert scores.bleu4 == 0  # no four words in a row
    perfect = caption_scores(["a b c d e", "f g h i"], [["a b c d e"], ["f g h i"]])
    assert perfect.bleu4 == pytest.approx(1) and perfect.cider_d == pytest.approx(10)
    assert perfect.word_f1 == perfect.exact_match == 1
    table = markdown_of({"model": perfect, "commonest words": scores})
    assert "| CIDEr-D | 10.000 |" in table and "| exact match | 100.0% | 25.0% |" in table
    assert perfect.to_markdown().count("\n") == 6 and perfect.to_dict()["pictures"] == 2


def test_no_words_and_one_picture():
    assert caption_scores([""], [[""]]).to_dict() == dict(pictures=1, bleu4=0, cider_d=0, word_f1=0, exact_match=0)
    assert cider_d(["a b"], [["a b"]]) == [0]  # of one picture every n-gram weighs log 1


def test_commonest_words():
    # "a cat" agrees in 2·2 of 4, 2·1 of 4 and twice 2·1 of 3 words; "a" in twice 2 of 3 and twice all
    assert commonest_words_baseline([["a cat"], ["a dog"], ["a"], ["a"]]) == "a"
    assert commonest_words_baseline([["a cat"], ["a cat"], ["a dog"]]) == "a cat"
    assert commonest_words_baseline([["a cat"], ["a cat"], ["a dog"]], most_words=1) == "a"
    assert commonest_words_baseline([["?"]]) == ""


@pytest.mark.parametrize("places", [None, 5])
def test_nearest_pictures(places):
    generator = torch.Generator().manual_seed(0)
    shape = (600, 8) if places is None else (600, places, 8)
    known = torch.randn(shape, generator=generator)
    order = torch.randperm(600, generator=generator)
    asked = (known[order] + 0.01 * torch.randn(shape, generator=generator)).half()
    texts = [f"picture {index}" for index in range(600)]
    assert nearest_picture_baseline(known + 7, asked + 7, texts) == [texts[index] for index in order.tolist()]


def test_diversity():
    same = diversity([["a cat", "a cat!", "A cat"]])
    assert (same.distinct_captions, same.distinct_words, same.pairwise) == (1 / 3, 1 / 3, 0)
    unlike = diversity([["a cat", "the dog"], ["", ""]])
    assert (unlike.distinct_captions, unlike.distinct_words, unlike.pairwise) == (0.75, 0.5, 0.5)
    assert set(unlike.to_dict()) == {"distinct_captions", "distinct_words", "pairwise"}


def test_attribute_accuracy():
    def parse(text):
        return {"size": int(text[0]), "color": int(text[1])} if len(text) == 2 else None

    wanted = {"size": torch.tensor([0, 1, 2, 3]), "color": torch.tensor([5, 5, 5, 5])}
    assert attribute_accuracy(["05", "14", "95", "nothing"], wanted, parse) == {"size": 0.5, "color": 0.5, "all": 0.25}
    with pytest.raises(ValueError, match="wanted: got {'size': 4, 'color': 4} values; expected 1 each"):
        attribute_accuracy(["05"], wanted, parse)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: caption_scores([], []), "candidates: got 0, and references of 0 pictures; expected as many"),
        (lambda: caption_scores(["a"], [["a"], ["b"]]), "candidates: got 1, and references of 2 pictures"),
        (lambda: caption_scores(["a"], [[]]), r"references: got \[\] of picture 0; expected a list of texts"),
        (lambda: cider_d(["a"], ["a"]), "references: got 'a' of picture 0; expected a list of texts"),
        (lambda: diversity([["a", "b"], ["a"]]), "samples: got a picture with 1 captions; expected two"),
        (lambda: diversity([]), "samples: got none"),
        (
            lambda: nearest_picture_baseline(torch.zeros(2, 3), torch.zeros(1, 4), ["a", "b"]),
            r"features_train: got shape \(2, 3\), features_held_out \(1, 4\) and 2 captions; expected",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
