"""What benchmarks of decoding share: contenders, rates, held-out prompts in batches of one length, exact matches."""

from collections.abc import Callable

import measure
import torch
from masked_lm_baselines import llada_generate
from torch import Tensor

from fastdiff.data.text import load_text_data
from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.generation.length import LengthPredictor
from fastdiff.models import MaskedDiffusionLM
from fastdiff.tasks.masked_lm.run import LanguageModel, load_language_model, load_length_predictor


def contender(
    model: MaskedDiffusionLM, prompts: list[Tensor], predictor: LengthPredictor | None = None, **options
) -> Callable[[], list[Tensor]]:
    """New tokens of each batch of prompts, by fastdiff."""
    config = MaskedDiffusionGenerationConfig(**options)

    def new_tokens(ids: Tensor) -> Tensor:
        return generate(model, ids, None, config, length_predictor=predictor).sequences[:, ids.shape[1] :]

    return lambda: [new_tokens(ids) for ids in prompts]


def public(model: MaskedDiffusionLM, prompts: list[Tensor], new: int, block: int, steps: int) -> Callable:
    """The same by the public loop."""
    arguments = (new, block, steps, model.config.mask_token_id)
    return lambda: [llada_generate(model, ids, *arguments)[:, ids.shape[1] :] for ids in prompts]


def rates(case: str, seconds: dict[str, float], tokens: int, targets: dict[str, float]) -> measure.Row:
    """A row in tokens/s; speed-ups over the public loop of every contender."""
    values = {name: tokens / value for name, value in seconds.items()}
    speedups = {name: value / values["public loop"] for name, value in values.items() if name != "public loop"}
    return measure.Row(case, "tokens/s", values, speedups, targets)


def held_out(recipe, tokenizer, batch: int, count: int) -> tuple[list[Tensor], list[list[int]]]:
    """Batches of prompts of one length each, 16 of a length in turn, and the answers, in the order of the prompts."""
    part = load_text_data(recipe.data, tokenizer).held_out
    by_length, prompts, answers = {}, [], []
    for i in range(len(part)):
        by_length.setdefault(len(part.conditions.document(i)), []).append(i)
    for start in range(0, len(part), 16):  # the same prompts for every size of batch
        for indices in by_length.values():
            if len(indices) < start + 16:
                continue
            for first in range(start, start + 16, batch):
                chosen = indices[first : first + batch]
                prompts.append(torch.stack([part.conditions.document(i) for i in chosen]).to(measure.DEVICE))
                answers += [part.targets.document(i).tolist() for i in chosen]
            if len(answers) >= count:
                return prompts, answers
    return prompts, answers


def exact_matches(batches: list[Tensor], answers: list[list[int]], eos: int) -> float:
    """The share of rows that are the answer up to their first end token."""
    rows = [row for batch in batches for row in batch.tolist()]
    return sum(row == answer for row, answer in zip(ended(rows, eos), answers, strict=True)) / len(answers)


def ended(rows: list[list[int]], eos: int) -> list[list[int]]:
    """Rows up to their first end token."""
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def length_modes(run: str, new: int, block: int, coverage: float) -> tuple[LanguageModel, dict[str, tuple]]:
    """A run with a calibration, and ways to decode with it: by name, a predictor or None, and options."""
    loaded = load_language_model(run, device=measure.DEVICE)
    fixed = dict(max_new_tokens=new, block_length=block)
    auto = dict(**fixed, length="auto", coverage=coverage)
    predictor = load_length_predictor(loaded, MaskedDiffusionGenerationConfig(**auto))
    if not predictor.calibrated:
        raise ValueError(f"{run} has no calibration; run python -m fastdiff.evaluate {run} --length")
    one_block = LengthPredictor(loaded.model, window=new, rule="constant", parameter=block - 1, coverage=coverage)
    threshold = dict(unmasking_rule="threshold", threshold=0.9)
    return loaded, {
        "fixed": (None, fixed),
        "fixed, early stop": (None, dict(**fixed, early_stop=True)),
        "auto": (predictor, auto),
        "auto, one block": (one_block, auto),
        "fixed, dual cache, threshold": (None, dict(**fixed, **threshold, dual_cache=True)),
        "auto, dual cache, threshold": (predictor, dict(**auto, **threshold, dual_cache=True)),
        "auto, threshold": (predictor, dict(**auto, **threshold)),
        "auto, threshold, probe reused": (predictor, dict(**auto, **threshold, reuse_probe=True)),
    }
