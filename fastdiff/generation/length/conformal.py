"""Split conformal calibration of length bounds (Vovk et al. 2005; Angelopoulos and Bates 2023)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from fastdiff.data.tokenization import tokenizer_fingerprint
from fastdiff.generation.length.calibration import RULE_VERSIONS, Calibration, check_enough_pairs, model_hash
from fastdiff.generation.length.predictor import LengthPredictor
from fastdiff.generation.length.probe import prompt_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def calibrate(
    predictor: LengthPredictor,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    coverage: float = 0.95,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int = 32,
    progress: bool = False,
) -> Calibration:
    """Scores a predictor's rule on held-out pairs, for bounds that reference lengths exceed rarely.

    What is guaranteed (split conformal prediction): with the threshold of the result at `coverage` (or another coverage
    asked of it later), the probability that the bound for a new pair's prompt is at least its answer's length is at
    least `coverage`, whatever the model, the rule and the distribution of the pairs.

    Under these conditions:

    - The new pair and the calibration pairs are exchangeable, such as independent draws from one distribution. There is
      no guarantee if calibration pairs differ in kind (prompts, task, language) from those met in use, or were used to
      train the model or a head.
    - The rule, its number, the window and the coverage were chosen on other data than these pairs.
    - Model, tokenizer, window, format and end tokens are the same in use: loading checks it.
    - It is about the lengths of reference answers, in tokens before EoS, not of what the model would write.
    - An answer as long as the window or longer does not fit with its EoS: its length counts as infinite, and it is
      never covered. Where more than 1 - coverage of the answers are, the threshold is infinite and nothing is cropped.
    - It is marginal: over draws of the calibration pairs and the new pair together. It holds neither for each prompt
      nor for each kind of prompt (long answers may be covered less), and one set of n pairs has a realised coverage
      that varies about it with a standard deviation near sqrt(coverage · (1 - coverage) / n): .01 with 500 pairs.

    Args:
        predictor: the rule to calibrate, with or without a calibration of its own, which does not count.
        pairs: (prompt ids, answer ids without EoS), at least `pairs_needed(coverage)` of them.
        coverage: share of answers that bounds are to hold for, in (0, 1).
        tokenizer: the tokenizer of these ids; its hash is kept.
        batch_size: prompts per forward pass.
        progress: shows a bar.

    Raises:
        ValueError: too few pairs for the coverage, coverage outside (0, 1), a tokenizer without end token, an empty
            prompt, or one that leaves no room for the window; one line.
    """
    check_enough_pairs(len(pairs), coverage, "pairs")
    for i, (prompt, answer) in enumerate(pairs):
        whole = all(isinstance(side, Sequence | Tensor) and not isinstance(side, str) for side in (prompt, answer))
        if not whole or not len(prompt):
            raise ValueError(f"pairs[{i}]: got {(prompt, answer)!r:.80}; expected token ids of a prompt and its answer")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: it has no end token (eos_token), so no answer has an end; set one and train with it"
        )
    scores: list[float] = []
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # prompts of like lengths together
    with tqdm(total=len(pairs), unit="pair", desc=f"calibrating {predictor.rule}", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = [pairs[i] for i in order[start : start + batch_size]]
            predicted = predictor(**prompt_inputs(predictor.model, [prompt for prompt, _ in batch]))
            scores += predictor.scores(predicted, [len(answer) for _, answer in batch]).tolist()
            bar.update(len(batch))
    return calibration_of(predictor, scores, tokenizer)


def calibration_of(
    predictor: LengthPredictor, scores: Sequence[float], tokenizer: "PreTrainedTokenizerBase"
) -> Calibration:
    """The calibration that conformal scores of a predictor's rule make, in any order."""
    return Calibration(
        **predictor.identity(),
        scores=tuple(sorted(scores)),
        model_hash=model_hash(predictor.model),
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        head_hash=None if predictor.head is None else model_hash(predictor.head),
        rule_version=RULE_VERSIONS.get(predictor.rule, 1),
    )
