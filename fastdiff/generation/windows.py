"""Windows of rows whose length was predicted: how wide they are, and which rows are decoded together."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.length import LengthPredictor

# What a pass costs beside its tokens, in tokens: launches, and matrix products too small to be fast. An estimate.
PASS_OVERHEAD = 256


class PredictedWindows(NamedTuple):
    """Tokens that each row begins with, forward passes made for that, and the probe's states `[B, W, D]`."""

    windows: list[int]
    passes: int
    states: Tensor | None


def default_predictor(model: nn.Module, config: MaskedDiffusionGenerationConfig) -> LengthPredictor | None:
    """The rule "cdf", which takes the model at its word, for length="auto"; None for "fixed".

    End tokens are those of the generation config, else of the model's. Raises what `LengthPredictor` raises.
    """
    if config.length == "fixed":
        return None
    ends = config.eos_token_id
    if ends is not None:
        ends = [ends] if isinstance(ends, int) else list(ends)
        ends += [model.config.pad_token_id] if model.config.length_format == "pad_fill" else []
    return LengthPredictor(model, window=config.max_new_tokens, end_token_ids=ends, coverage=config.coverage)


def predict_windows(
    predictor: LengthPredictor,
    config: MaskedDiffusionGenerationConfig,
    input_ids: Tensor,  # int64 [B, P]
    attention_mask: Tensor | None,  # bool [B, P]
    encoder_states: Tensor | None,  # [B, M, D]
    encoder_mask: Tensor | None,  # bool [B, M]
    prompt_mean: Tensor | None,  # [B, D]
) -> PredictedWindows:
    """A row's bound and an end token, rounded up to `config.growth`, at most max_new_tokens.

    A bound of the predictor's whole window says nothing: that window is taken.
    """
    prediction = predictor(
        input_ids,
        attention_mask,
        encoder_hidden_states=encoder_states,
        encoder_attention_mask=encoder_mask,
        prompt_mean=prompt_mean,
    )
    growth, windows = config.growth, []
    for bound in prediction.bounds:
        needed = min(bound + 1, predictor.window)
        windows.append(min(-(-needed // growth) * growth, config.max_new_tokens))
    states = None if prediction.probe is None else prediction.probe.states
    if config.reuse_probe and (states is None or max(windows) > predictor.window):
        raise ValueError("reuse_probe: the predictor's pass does not cover the rows' windows; leave it out")
    return PredictedWindows(windows, prediction.passes, states)


def buckets(lengths: Sequence[int], windows: Sequence[int]) -> list[list[int]]:
    """Rows that are decoded together, so that short ones are not computed as wide as long ones.

    A row of a bucket costs the bucket's longest `lengths` (prompt and window) per step and takes steps in proportion to
    its window; a bucket costs `PASS_OVERHEAD` in each of its longest row's. The cheapest cut of the rows in order of
    length, by dynamic programming; rows keep their order within a bucket.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], windows[row]))
    cheapest: list[tuple[float, int]] = [(0.0, 0)]  # of the first n rows: cost, and where the last bucket begins
    for end in range(1, len(order) + 1):
        width, steps, longest, best = lengths[order[end - 1]], 0, 0, (float("inf"), 0)
        for begin in range(end - 1, -1, -1):
            window = windows[order[begin]]
            steps, longest = steps + window, max(longest, window)
            cost = cheapest[begin][0] + width * steps + PASS_OVERHEAD * longest
            best = min(best, (cost, begin))
        cheapest.append(best)
    cuts, end = [], len(order)
    while end:
        begin = cheapest[end][1]
        cuts.append(sorted(order[begin:end]))
        end = begin
    return cuts[::-1]
