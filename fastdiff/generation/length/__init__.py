"""How long an answer will be, read off the first forward pass, with every token of the answer still masked.

    predictor = LengthPredictor(model, window=256)
    calibration = calibrate(predictor, pairs, coverage=0.95, tokenizer=tokenizer)
    predictor = LengthPredictor(model, window=256, calibration=calibration, coverage=0.95)
    predictor(input_ids, attention_mask).bounds  # one per row: crop its window at bound + 1, room for EoS

A length counts the tokens before EoS. A bound is right where it is at least the length.
"""

from fastdiff.generation.length.calibration import (
    CALIBRATION_FILE,
    Calibration,
    load_calibration,
    model_hash,
    pairs_needed,
    save_calibrations,
)
from fastdiff.generation.length.conformal import calibrate
from fastdiff.generation.length.predictor import LengthPrediction, LengthPredictor
from fastdiff.generation.length.probe import Probe, mean_embedding, prompt_inputs
from fastdiff.generation.length.rules import LENGTH_RULES

__all__ = [
    "CALIBRATION_FILE",
    "LENGTH_RULES",
    "Calibration",
    "LengthPrediction",
    "LengthPredictor",
    "Probe",
    "calibrate",
    "load_calibration",
    "mean_embedding",
    "model_hash",
    "pairs_needed",
    "prompt_inputs",
    "save_calibrations",
]
