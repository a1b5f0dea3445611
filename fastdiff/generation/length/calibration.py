"""Calibrations of length bounds: conformal scores, what they belong to, and the file beside a checkpoint."""

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
from torch import nn

from fastdiff.data.tokenization import tokenizer_fingerprint
from fastdiff.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_FILE = "length_calibration.json"
_HASHED_VALUES = 65_536  # per tensor
_SPECIAL_TOKENS = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
_AGAIN = "calibrate again for this one (python -m fastdiff.evaluate RUN --length does so), or delete the file"


# Rules whose predictions are not what they once were: scores of the other form say nothing of this one.
RULE_VERSIONS = {"daedal": 2}  # 2: its confidence is divided by 32, however few positions say EoS


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
        scores: one per pair, in rising order; infinite for answers that don't fit into the window with their EoS.
        model_hash, tokenizer_hash: `model_hash` and `fastdiff.data.tokenization.tokenizer_fingerprint`.
        head_hash: `model_hash` of the learned head, None for rules without one.
        rule_version: which form of the rule was scored (`RULE_VERSIONS`); files that say nothing have 1.
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
    rule_version: int = 1

    @property
    def num_pairs(self) -> int:
        """Pairs that were scored."""
        return len(self.scores)

    def threshold(self, coverage: float) -> float:
        """The ⌈(n + 1) · coverage⌉-th smallest of the n scores.

        Raises ValueError for a coverage outside (0, 1), or one that needs more pairs (the message says how many).
        """
        check_enough_pairs(self.num_pairs, coverage, "calibration")
        return self.scores[math.ceil((self.num_pairs + 1) * Fraction(str(float(coverage)))) - 1]


def check_enough_pairs(pairs: int, coverage: float, name: str) -> None:
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


def save_calibrations(path: str | os.PathLike, calibrations: Sequence[Calibration]) -> Path:
    """Writes calibrations, one per rule, as JSON: whole or not at all, instead of those that were there.

    Args:
        path: a checkpoint's folder, in which the file is length_calibration.json, or a file.

    Returns the file's path. Raises ValueError for two of one rule, OSError where it cannot be written.
    """
    entries = {}
    for calibration in calibrations:
        if calibration.rule in entries:
            raise ValueError(f"calibrations: got two of the rule {calibration.rule!r}; expected one per rule")
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
    if calibration.rule_version != RULE_VERSIONS.get(rule, 1):
        raise ValueError(f"{file}: this calibration was made with another form of the rule {rule!r}; {_AGAIN}")
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
