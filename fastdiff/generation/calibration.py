"""Split conformal calibration of length bounds (Vovk et al. 2005; Angelopoulos and Bates 2023).

`fastdiff.generation.length` is the public module.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff.data.tokenization import tokenizer_fingerprint
from fastdiff.files import write_atomically
from fastdiff.generation.canvas import padded
from fastdiff.generation.length_probe import mean_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.generation.length import LengthPredictor

CALIBRATION_FILE = "length_calibration.json"
_HASHED_VALUES = 65_536  # of a tensor
_SPECIAL_TOKENS = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
_AGAIN = "calibrate again for this one (python -m fastdiff.evaluate RUN --length does so), or delete the file"


def check_coverage(coverage: float) -> float:
    """The coverage as a float. Raises ValueError outside (0, 1)."""
    if isinstance(coverage, bool) or not isinstance(coverage, int | float) or not 0 < coverage < 1:
        raise ValueError(f"coverage: got {coverage!r}; expected a number between 0 and 1, without either, such as 0.95")
    return float(coverage)


def pairs_needed(coverage: float) -> int:
    """The fewest pairs from which a threshold of this coverage can be read: coverage / (1 - coverage), rounded up."""
    exact = Fraction(str(check_coverage(coverage)))  # 0.95 as it is written: products of floats may pass an integer
    return math.ceil(exact / (1 - exact))


@dataclass(frozen=True)
class Calibration:
    """Conformal scores of a rule on held-out pairs; see `calibrate`.

    Attributes:
        rule, window, length_format, end_token_ids, parameter: those of the predictor; parameter is None for rules
            whose number the calibration replaces.
        scores: a pair each, in rising order; infinite for answers that don't fit into the window with their EoS.
        model_hash, tokenizer_hash: `model_hash` and `fastdiff.data.tokenization.tokenizer_fingerprint`.
        head_hash: `model_hash` of the learned head, None for rules without one.
    """

    rule: str
    window: int
    length_format: str
    end_token_ids: tuple[int, ...]
    parameter: float | None
    scores: tuple[float, ...]
    model_hash: str
    tokenizer_hash: str
    head_hash: str | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs that were scored."""
        return len(self.scores)

    def threshold(self, coverage: float) -> float:
        """The ⌈(n + 1) · coverage⌉-th smallest of the n scores.

        Raises ValueError for a coverage outside (0, 1), or one that needs more pairs (the message says how many).
        """
        _check_enough(self.num_pairs, coverage, "calibration")
        return self.scores[math.ceil((self.num_pairs + 1) * Fraction(str(float(coverage)))) - 1]


def _check_enough(pairs: int, coverage: float, name: str) -> None:
    needed = pairs_needed(coverage)
    if pairs < needed:
        raise ValueError(
            f"{name}: got {pairs} pairs; a coverage of {coverage:g} needs at least {needed}: calibrate with more, or "
            "ask for less coverage"
        )


@torch.no_grad()
def model_hash(model: nn.Module) -> str:
    """A hash of a model's weights and special tokens, the same in float32 and bfloat16.

    sha256 over the name, shape and up to 65 536 evenly spaced values of each tensor of the state dict, rounded to
    bfloat16, and the special token ids of its config, where it has one.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    special = {name: getattr(config, name, None) for name in _SPECIAL_TOKENS}
    digest.update(json.dumps(special, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        values = tensor.detach().reshape(-1)[:: max(1, math.ceil(tensor.numel() / _HASHED_VALUES))]
        digest.update(values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def prompt_inputs(model: nn.Module, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What `LengthPredictor` takes for prompts of token ids: padded on the right, on the model's device.

    Prompts of a model with an encoder of its own go through it, and the text begins with BoS, as in decoding.
    Raises ValueError for an empty prompt, or where such a model has no BoS token.
    """
    empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
    if empty or not len(prompts):
        raise ValueError(f"prompts: {f'prompt {empty[0]} is empty' if empty else 'got none'}; pass at least one token")
    ids, mask = padded(prompts, model.head_weight.device)
    if not model.config.num_encoder_layers:
        return {"input_ids": ids, "attention_mask": mask}
    if model.config.bos_token_id is None:
        raise ValueError("bos_token_id: the model's config has none, from which a model with encoder starts; set it")
    return {
        "input_ids": torch.full((len(ids), 1), model.config.bos_token_id, device=ids.device),
        "encoder_hidden_states": model.encode(ids, mask),
        "encoder_attention_mask": mask,
        "prompt_mean": mean_embedding(model, ids, mask),
    }


def calibrate(
    predictor: "LengthPredictor",
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

    - The new pair and the calibration pairs are exchangeable, such as independent draws from one distribution. Pairs of
      other prompts, tasks or languages than those in use give no guarantee; nor do the pairs that trained the model or
      a head.
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
        pairs: (prompt ids, answer ids without EoS), of at least `pairs_needed(coverage)` pairs.
        coverage: in (0, 1).
        tokenizer: whose tokens they are; its hash is kept.
        batch_size: prompts a forward pass.
        progress: shows a bar.

    Raises:
        ValueError: too few pairs for the coverage, coverage outside (0, 1), a tokenizer without end token, an empty
            prompt, or one that leaves no room for the window; one line.
    """
    _check_enough(len(pairs), coverage, "pairs")
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
    predictor: "LengthPredictor", scores: Sequence[float], tokenizer: "PreTrainedTokenizerBase"
) -> Calibration:
    """The calibration that conformal scores of a predictor's rule make, in any order."""
    return Calibration(
        **predictor.identity(),
        scores=tuple(sorted(scores)),
        model_hash=model_hash(predictor.model),
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        head_hash=None if predictor.head is None else model_hash(predictor.head),
    )


def save_calibrations(path: str | os.PathLike, calibrations: Sequence[Calibration]) -> Path:
    """Writes calibrations, one a rule, as JSON: whole or not at all, in place of those that were there.

    Args:
        path: a checkpoint's folder, in which the file is length_calibration.json, or a file.

    Returns the file's path. Raises ValueError for two of one rule, OSError where it cannot be written.
    """
    entries = {}
    for calibration in calibrations:
        if calibration.rule in entries:
            raise ValueError(f"calibrations: got two of the rule {calibration.rule!r}; expected one a rule")
        entry = dataclasses.asdict(calibration)
        entry["scores"] = [score if math.isfinite(score) else None for score in calibration.scores]
        entries[calibration.rule] = entry
    file = _file(path)
    text = json.dumps({"calibrations": entries}, indent=1, allow_nan=False) + "\n"
    write_atomically(file, text)
    return file


def load_calibration(
    path: str | os.PathLike,
    rule: str,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    head: nn.Module | None = None,
) -> Calibration:
    """Reads the calibration of a rule, made for this model, tokenizer and learned head.

    Args:
        path: a checkpoint's folder, or the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has no such rule, or was made for another checkpoint, tokenizer or head; one line.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; calibrate the rule {rule!r} first, and save it there")
    try:
        entries = json.loads(file.read_text())["calibrations"]
        calibrations = {name: _from_entry(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not a length calibration, or damaged ({reason}); calibrate again") from None
    if rule not in calibrations:
        known = ", ".join(calibrations) or "none"
        raise ValueError(f"{file}: has no calibration of the rule {rule!r}; expected one of {known}, or calibrate it")
    calibration = calibrations[rule]
    if calibration.tokenizer_hash != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{file}: this calibration was made with another tokenizer; {_AGAIN}")
    check_made_for(calibration, model, head, str(file))
    return calibration


def check_made_for(calibration: Calibration, model: nn.Module, head: nn.Module | None, name: str) -> None:
    """Raises ValueError where a calibration was made for other weights."""
    if calibration.model_hash != model_hash(model):
        raise ValueError(f"{name}: this calibration was made for another checkpoint (or its other weights); {_AGAIN}")
    if calibration.head_hash != (None if head is None else model_hash(head)):
        raise ValueError(f"{name}: this calibration was made for another learned head; {_AGAIN}")


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path / CALIBRATION_FILE if path.is_dir() else path


def _from_entry(entry: dict[str, Any]) -> Calibration:
    scores = tuple(math.inf if score is None else float(score) for score in entry["scores"])
    if list(scores) != sorted(scores):
        raise ValueError("scores are not in rising order")
    return Calibration(**{**entry, "scores": scores, "end_token_ids": tuple(entry["end_token_ids"])})
