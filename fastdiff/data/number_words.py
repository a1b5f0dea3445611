"""Numbers and their words: pairs whose answers can be checked."""

import itertools
import random
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from fastdiff.errors import named

_SEED = 20260601  # fixed: every run has the same numbers


def number_words_version() -> str:
    """Version of num2words, which spells the numbers. Raises ModuleNotFoundError where it is missing."""
    try:
        return version("num2words")
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{named('name')}: got 'numbers', which needs the package num2words; run: pip install "
            "'fastdiff-kernels[text]'"
        ) from None


def check_languages(languages: Sequence[str], max_digits: int) -> None:
    """Raises ValueError for a code that num2words does not know, or in which it has no words for so many digits."""
    from num2words import CONVERTER_CLASSES

    for language in languages:
        if language not in CONVERTER_CLASSES:
            known = ", ".join(sorted(CONVERTER_CLASSES))
            raise ValueError(
                f"{named('languages')}: got {language!r}, which num2words does not know; expected some of {known}"
            )
        fitting = next(digits for digits in range(max_digits, -1, -1) if digits == 0 or _has_words(digits, language))
        if fitting < max_digits:
            raise ValueError(
                f"{named('max_digits')}: got {max_digits}; num2words has words of {language} for {fitting} digits at "
                f"most: set it to {fitting}, or leave {language} out"
            )


def _has_words(digits: int, language: str) -> bool:
    from num2words import num2words

    try:
        return bool(num2words(10**digits - 1, lang=language).strip())
    except Exception:  # its languages raise OverflowError, KeyError, IndexError, NotImplementedError, …
        return False


def number_pairs(
    max_digits: int, num_pairs: int, languages: Sequence[str] = ("en",), grouped: bool = False
) -> list[tuple[str, str]]:
    """("123", "one hundred and twenty-three"), …: no number twice, in an order of no meaning, always the same.

    With several languages ("de 123", "einhundertdreiundzwanzig"), …: in turn. `grouped` writes 1,234,567.

    Each count of digits is as likely as far as there are as many numbers: of 1 digit there are ten, and what they leave
    over goes to the longer ones.
    """
    from num2words import num2words

    generator = random.Random(_SEED)
    numbers: list[int] = []
    for digits in range(1, max_digits + 1):
        candidates = range(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
        quota = (num_pairs - len(numbers)) // (max_digits - digits + 1)
        numbers.extend(generator.sample(candidates, min(quota, len(candidates))))
    generator.shuffle(numbers)
    pairs = []
    for number, language in zip(numbers, itertools.cycle(languages)):
        digits = f"{number:,}" if grouped else str(number)
        pairs.append((f"{language} {digits}" if len(languages) > 1 else digits, num2words(number, lang=language)))
    return pairs
