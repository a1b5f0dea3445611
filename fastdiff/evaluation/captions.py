"""How good captions are: BLEU-4, CIDEr-D, word F1 and exact match, what plain baselines reach, and diversity.

Words: a text in lower case is cut into runs of letters and digits; an apostrophe or a hyphen between two of them joins
them ("don't" and "t-shirt" are one word each), and all else divides and is dropped. The published figures for COCO come
from another tokenizer (PTBTokenizer, in Java): on plain English sentences both cut alike.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0  # of the penalty for unlike lengths, in words
_BASELINE_PICTURES = 5000  # of which the number of commonest words is chosen
_BLOCK = 512  # pictures compared with all others at once

NGrams = Counter[tuple[str, ...]]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Measures of one caption a picture against its references.

    Attributes:
        pictures: how many.
        bleu4: BLEU-4 of all captions together, 0 … 1, without smoothing: 0 where no four words in a row are right.
        cider_d: mean CIDEr-D, 0 … 10. It depends on all references, so compare values of the same pictures alone.
        word_f1: mean F1 of the words, with repetitions, against the reference where it is highest.
        exact_match: share of captions that have the words of a reference, in their order.
    """

    pictures: int
    bleu4: float
    cider_d: float
    word_f1: float
    exact_match: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """As a table."""
        return markdown_of({"captions": self})


@dataclass(frozen=True)
class Diversity:
    """How unlike several captions of the same picture are; means over pictures.

    Attributes:
        distinct_captions: share of a picture's captions that are different texts.
        distinct_words: distinct words of a picture's captions by all their words (Li et al. 2016: distinct-1).
        pairwise: 1 − word F1, mean of the pairs of captions: 0 where all have the same words, 1 where none is shared.
    """

    distinct_captions: float
    distinct_words: float
    pairwise: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def words(text: str) -> list[str]:
    """The words of a text, as all measures here take it; see above."""
    return _WORD.findall(text.lower())


def markdown_of(scores: Mapping[str, CaptionScores]) -> str:
    """A table: a row a measure, a column for each of `scores` by its name."""
    columns = list(scores.values())
    rows = [["", *scores], ["---", *["---:"] * len(columns)]]
    rows.append(["pictures", *(str(each.pictures) for each in columns)])
    rows.append(["BLEU-4", *(f"{each.bleu4:.3f}" for each in columns)])
    rows.append(["CIDEr-D", *(f"{each.cider_d:.3f}" for each in columns)])
    rows.append(["word F1", *(f"{each.word_f1:.1%}" for each in columns)])
    rows.append(["exact match", *(f"{each.exact_match:.1%}" for each in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def caption_scores(candidates: Sequence[str], references: References) -> CaptionScores:
    """Scores one caption a picture.

    Args:
        candidates: N captions; an empty one scores 0.
        references: of each picture, one or more.

    Raises:
        ValueError: no captions, unlike numbers, or a picture without references. ModuleNotFoundError: no sacrebleu.
    """
    _check(candidates, references)
    found = [words(text) for text in candidates]
    known = [[words(text) for text in texts] for texts in references]
    return CaptionScores(
        len(candidates),
        _bleu4(found, known),
        math.fsum(_cider_d(found, known)) / len(found),
        math.fsum(max(_f1(each, one) for one in texts) for each, texts in zip(found, known, strict=True)) / len(found),
        sum(bool(each) and each in texts for each, texts in zip(found, known, strict=True)) / len(found),
    )


def cider_d(candidates: Sequence[str], references: References) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015, section 8): 0 … 10.

    For n = 1 … 4: a text is a vector of its counts of n-grams, each times the logarithm of pictures by pictures whose
    references have it. A caption's vector, cut off at the reference's, and the reference's give a cosine, which is
    multiplied by exp(−(difference of lengths)² / 72). Means over n and the references, times 10. Counts are not divided
    by the length: so does the published program.

    Args, Raises: as `caption_scores`.
    """
    _check(candidates, references)
    return _cider_d([words(text) for text in candidates], [[words(text) for text in texts] for texts in references])


def commonest_words_baseline(references: References, most_words: int = 20) -> str:
    """One caption for every picture: the commonest words of the references, commonest first.

    As many as give the highest mean word F1 of these references (of every k-th picture, where there are more than
    5 000), so that it is the strongest of its kind.

    Args:
        references: of the pictures to train on, one or more each.
        most_words: at most so many.
    """
    _check(references, references)
    every = max(-(-len(references) // _BASELINE_PICTURES), 1)
    cut = [[words(text) for text in texts] for texts in references[::every]]
    counts = Counter(word for texts in references for text in texts for word in words(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:most_words]

    def total(count: int) -> float:
        return math.fsum(max(_f1(ranked[:count], one) for one in texts) for texts in cut)

    return " ".join(ranked[: max(range(1, len(ranked) + 1), key=total, default=0)])


def nearest_picture_baseline(features_train: Tensor, features_held_out: Tensor, captions: Sequence[str]) -> list[str]:
    """The caption of the training picture that is nearest to each held-out one, by the cosine of their features.

    Args:
        features_train: [N, F], or [N, M, F] of M places, whose mean is taken; the mean of all is taken away.
        features_held_out: [K, F] or [K, M, F].
        captions: N of them.

    Raises:
        ValueError: shapes that do not fit.
    """
    shapes = tuple(features_train.shape), tuple(features_held_out.shape)
    fits = len(shapes[0]) == len(shapes[1]) in (2, 3) and shapes[0][1:] == shapes[1][1:]
    if not fits or len(features_train) != len(captions) or not len(captions):
        raise ValueError(
            f"features_train: got shape {shapes[0]}, features_held_out {shapes[1]} and {len(captions)} captions; "
            "expected [N, F] or [N, M, F], [K, F] or [K, M, F], and N captions"
        )
    known, asked = (_of_pictures(each) for each in (features_train, features_held_out))
    mean = known.mean(dim=0)
    known, asked = F.normalize(known - mean, dim=1), F.normalize(asked - mean, dim=1)
    nearest = [(part @ known.T).argmax(dim=1) for part in asked.split(_BLOCK)]
    return [captions[index] for part in nearest for index in part.tolist()]


def diversity(samples: Sequence[Sequence[str]]) -> Diversity:
    """Compares the captions of each picture with one another.

    Args:
        samples: of each picture, two captions or more.

    Raises:
        ValueError: no pictures, or one with fewer than two captions.
    """
    if not samples or min(map(len, samples)) < 2:
        got = "none" if not samples else f"a picture with {min(map(len, samples))} captions"
        raise ValueError(f"samples: got {got}; expected two captions of a picture or more")
    texts, shares, unlike = [], [], []
    for captions in samples:
        cut = [words(text) for text in captions]
        every = list(itertools.chain.from_iterable(cut))
        pairs = [1 - _f1(one, other) if one or other else 0.0 for one, other in itertools.combinations(cut, 2)]
        texts.append(len(set(map(tuple, cut))) / len(cut))
        shares.append(len(set(every)) / max(len(every), 1))
        unlike.append(math.fsum(pairs) / len(pairs))
    return Diversity(*(math.fsum(each) / len(samples) for each in (texts, shares, unlike)))


def attribute_accuracy(
    candidates: Sequence[str], wanted: Mapping[str, Tensor], parse: Callable[[str], Mapping[str, int] | None]
) -> dict[str, float]:
    """The share of captions that say the right value, by attribute; "all" is the share that says all of them.

    Args:
        candidates: N captions.
        wanted: int [N] by attribute: what the pictures show, such as `CaptionedData.attributes` has it.
        parse: the values that a caption says, such as `fastdiff.data.shapes.parse_caption`; None, or an attribute that
            is missing, is wrong.

    Raises:
        ValueError: no captions, no attributes, or unlike numbers.
    """
    counts = {name: len(values) for name, values in wanted.items()}
    if not candidates or set(counts.values()) != {len(candidates)}:
        raise ValueError(f"wanted: got {counts or 'no attribute'} values; expected {len(candidates)} each, 1 or more")
    said = [parse(text) or {} for text in candidates]
    right = {name: torch.tensor([each.get(name) == value for each, value in zip(said, values.tolist(), strict=True)])
             for name, values in wanted.items()}  # fmt: skip
    shares = {name: float(each.double().mean()) for name, each in right.items()}
    return {**shares, "all": float(torch.stack(list(right.values())).all(0).double().mean())}


def _check(candidates: Sequence[object], references: References) -> None:
    if len(candidates) != len(references) or not references:
        raise ValueError(
            f"candidates: got {len(candidates)}, and references of {len(references)} pictures; expected as many, 1 or "
            "more"
        )
    bare = next((index for index, texts in enumerate(references) if isinstance(texts, str) or not len(texts)), None)
    if bare is not None:
        raise ValueError(f"references: got {references[bare]!r} of picture {bare}; expected a list of texts")


def _bleu4(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """0 … 1, by sacrebleu (Papineni et al. 2002), the words being cut already."""
    from sacrebleu.metrics import BLEU

    most = max(map(len, references))
    streams = [[" ".join(texts[i]) if i < len(texts) else None for texts in references] for i in range(most)]
    bleu = BLEU(tokenize="none", smooth_method="none", force=True)  # force: captions may end with " ."
    return bleu.corpus_score([" ".join(text) for text in candidates], streams).score / 100


def _cider_d(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    known = [[_ngrams(text) for text in texts] for texts in references]
    pictures = Counter(itertools.chain.from_iterable(set().union(*grams) for grams in known))
    logarithm = math.log(len(references))
    weights = {gram: logarithm - math.log(count) for gram, count in pictures.items()}

    def vectors(grams: NGrams) -> list[dict[tuple[str, ...], float]]:
        """One for each n; n-grams that no reference has weigh as if one picture had them."""
        split: list[dict[tuple[str, ...], float]] = [{} for _ in _ORDERS]
        for gram, count in grams.items():
            split[len(gram) - 1][gram] = count * weights.get(gram, logarithm)
        return split

    scores = []
    for text, grams_of, texts in zip(candidates, known, references, strict=True):
        own = vectors(_ngrams(text))
        total = 0.0
        for grams, reference in zip(grams_of, texts, strict=True):
            penalty = math.exp(-((len(text) - len(reference)) ** 2) / (2 * _SIGMA**2))
            cosines = [_clipped_cosine(*pair) for pair in zip(own, vectors(grams), strict=True)]
            total += penalty * sum(cosines) / len(_ORDERS)
        scores.append(10 * total / len(texts))
    return scores


def _clipped_cosine(candidate: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    shared = candidate.keys() & reference.keys()
    product = math.fsum(min(candidate[gram], reference[gram]) * reference[gram] for gram in shared)
    norms = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    return product / norms if norms else 0.0


def _ngrams(text: Sequence[str]) -> NGrams:
    return Counter(tuple(text[start : start + n]) for n in _ORDERS for start in range(len(text) - n + 1))


def _f1(one: Sequence[str], other: Sequence[str]) -> float:
    """2 · words in common / words of both; 0 where both are empty."""
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / max(len(one) + len(other), 1)


def _of_pictures(features: Tensor) -> Tensor:  # [N, F] or [N, M, F] -> float32 [N, F]
    return features.float() if features.ndim == 2 else features.float().mean(dim=1)
