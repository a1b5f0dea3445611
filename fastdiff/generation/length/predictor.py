"""The predictor of lengths: a rule, read off one forward pass, and a threshold, calibrated or its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.generation.length import rules
from fastdiff.generation.length.calibration import Calibration, check_coverage, check_made_for
from fastdiff.generation.length.probe import Probe, check_window, probe_window
from fastdiff.models.masked_lm_config import LENGTH_FORMATS

_PROBABILITY = (lambda x: 0.5 <= x < 1, "a probability in [0.5, 1)")
_PARAMETERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "cdf": _PROBABILITY,
    "crossing": _PROBABILITY,
    "classifier": _PROBABILITY,
    "constant": (lambda x: x >= 0 and float(x).is_integer(), "a whole number of tokens, 0 or above"),
    "quantile": (lambda x: 0 < x < 1, "a number between 0 and 1"),
    "daedal": (lambda x: 0 < x < 1, "a probability between 0 and 1"),
}
_SHAPING_RULES = {"quantile": 0.75, "daedal": 0.5}  # whose number, here as published, shapes the prediction


@dataclass(frozen=True, eq=False)
class LengthPrediction:
    """Bounds of a batch.

    Attributes:
        bounds: one per row, 0 … W tokens before EoS; W: nothing is cropped.
        probe: the pass over the whole window that was read; None for "constant", which needs none, and "daedal" and
            "rho", whose rows have windows of their own.
        passes: forward passes made.
        reading: what the rule read, float64: levels `[B, W]` of a curve (see `fastdiff.generation.length.rules`), or
            predicted lengths `[B]`.
    """

    bounds: list[int]
    probe: Probe | None
    passes: int
    reading: Tensor


class LengthPredictor:
    """Bounds the lengths of answers before they are generated.

    Args:
        model: a `fastdiff.models.MaskedDiffusionLM`, or one wrapped by peft.
        window: masks behind each prompt, W: the longest answer with its EoS.
        rule: one of LENGTH_RULES; each is described in `fastdiff.generation.length.rules`. "constant" is the bound that
            ignores the prompt.
        length_format: how answers ended in training, "eos_fill", "pad_fill" or "eos_only"; None is that of the model's
            config. Needed where that is None (foreign checkpoints).
        end_token_ids: None is EoS, and PAD too for "pad_fill" (but for the rule "argmax", which is about EoS).
        parameter: the rule's number without a calibration: the threshold on F of "cdf" (None: coverage, at least .5),
            "crossing" and "classifier" (.5), the bound of "constant" (W). Calibrated or not: the "quantile" (.75), the
            confidence up to which "daedal" grows (.5). None for the others.
        calibration: what `calibrate` or `load_calibration` gave; its threshold at `coverage` is used.
        coverage: share of reference answers that bounds are to hold for, in (0, 1).
        head: the learned head of "classifier" (states `[B, W, D]` to logits `[B, W]` of P(length ≤ i)) and
            "regression" (`prompt_mean` `[B, D]` to expected lengths `[B]`, in tokens).

    `threshold` is what the rule's curve is compared with, as a level -log(1 - F), or what is added to its prediction;
    `calibrated` whether it comes from a calibration.

    Raises:
        ValueError: an argument does not fit, the format or the end token is missing, or the calibration was made for
            another rule, window, format or checkpoint; one line.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int,
        rule: str = "cdf",
        length_format: str | None = None,
        end_token_ids: Sequence[int] | None = None,
        parameter: float | None = None,
        calibration: Calibration | None = None,
        coverage: float = 0.95,
        head: nn.Module | None = None,
    ) -> None:
        if rule not in rules.LENGTH_RULES:
            raise ValueError(f"rule: got {rule!r}; expected one of {', '.join(rules.LENGTH_RULES)}")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window: got {window!r}; expected a number of tokens, 1 or above")
        if (head is None) == (rule in ("classifier", "regression")):
            expected = "one of fastdiff.models.length_heads" if head is None else "None"
            raise ValueError(f"head: got {type(head).__name__} with the rule {rule!r}; expected {expected}")
        self.model, self.window, self.rule, self.head = model, window, rule, head
        self.coverage = check_coverage(coverage)
        self.length_format = _length_format(model, length_format)
        self.end_token_ids = _end_token_ids(model, self.length_format, rule, end_token_ids)
        _check_parameter(rule, parameter, calibration is not None)
        self.parameter = parameter
        if rule in _SHAPING_RULES:
            default = _SHAPING_RULES[rule] if calibration is None else calibration.parameter
            self.parameter = default if parameter is None else float(parameter)
        self.calibrated = calibration is not None
        self.threshold = self._calibrated(calibration) if self.calibrated else self._threshold()

    def identity(self) -> dict[str, Any]:
        """What a calibration of this predictor belongs to, beside the weights."""
        kept = self.parameter if self.rule in _SHAPING_RULES else None
        names = ("rule", "window", "length_format", "end_token_ids")
        return {**{name: getattr(self, name) for name in names}, "parameter": kept}

    def _threshold(self) -> float:
        """The rule's own, without calibration."""
        if self.rule in rules.CURVE_RULES:
            default = max(self.coverage, 0.5) if self.rule == "cdf" else 0.5
            return rules.level_of(default if self.parameter is None else self.parameter)
        if self.rule == "constant":
            return float(self.window if self.parameter is None else self.parameter)
        return 0.0

    def _calibrated(self, calibration: Calibration) -> float:
        for name, value in self.identity().items():
            made = getattr(calibration, name)
            if made != value:
                raise ValueError(
                    f"calibration: made for {name} = {made!r}; this predictor has {value!r}: calibrate it again"
                )
        check_made_for(calibration, self.model, self.head, "calibration")
        threshold = calibration.threshold(self.coverage)
        return threshold + rules.TIE_MARGIN if self.rule in rules.CURVE_RULES else threshold

    @torch.no_grad()
    def probe(
        self,
        input_ids: Tensor,  # int64 [B, P]
        attention_mask: Tensor | None = None,  # bool or 0/1 [B, P]
        *,
        window: int | None = None,
        encoder_hidden_states: Tensor | None = None,  # [B, M, cross_attention_dim]
        encoder_attention_mask: Tensor | None = None,  # bool or 0/1 [B, M]
        prompt_mean: Tensor | None = None,  # [B, D]
    ) -> Probe:
        """One forward pass over prompts and windows of masks; its last block computes the windows alone.

        Args:
            input_ids, attention_mask: the prompts, padded on the left or the right; each is seen as it is alone.
            window: masks per row; None is the predictor's.
            encoder_hidden_states, encoder_attention_mask: what the prompts' condition was encoded to.
            prompt_mean: `mean_embedding(model, ids, mask)` of the encoder's input, where there is an encoder.

        A model with a timestep embedding gets time 1, all masks.
        Raises TypeError or ValueError, naming the argument, where a prompt is empty or leaves no room for the window.
        """
        return probe_window(
            self.model,
            input_ids,
            attention_mask,
            self.window if window is None else window,
            self.end_token_ids,
            likeliest=self.rule in rules.EXPANSION_RULES,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            prompt_mean=prompt_mean,
        )

    def bounds(self, probe: Probe) -> list[int]:
        """The bound of each row of a pass over the whole window.

        Raises ValueError for "daedal" and "rho", which make passes of their own: call the predictor.
        """
        return self._bounds(self.read(probe))

    def scores(self, predicted: Probe | LengthPrediction, lengths: Tensor | Sequence[int]) -> Tensor:  # float64 [B]
        """Conformal scores of reference lengths, infinite where a length is the window's or more.

        The bound at a threshold is right where the score is at most the threshold; for predictions also where the
        length is 0, for curves also where the score is at most the level of F = 0.5.

        Raises ValueError as `bounds` does.
        """
        reading = predicted.reading if isinstance(predicted, LengthPrediction) else self.read(predicted)
        lengths = rules.as_lengths(lengths, len(reading), reading.device)
        return rules.scores(self.rule, reading, lengths, self.window)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **encoder: Any) -> LengthPrediction:
        """Bounds of a batch of prompts, each row's its own. Arguments and errors as in `probe`.

        One pass; none for "constant". "daedal" and "rho" pass growing or shrinking windows of the rows that are not
        done, at most one pass per step of 8 tokens.
        """
        mask = check_window(self.model, input_ids, attention_mask, self.window)  # before any pass of a smaller window
        if self.rule in rules.EXPANSION_RULES:
            reading, passes = self._expand(input_ids, mask, encoder)
            return LengthPrediction(self._bounds(reading), None, passes, reading)
        if self.rule == "constant":
            reading = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
            return LengthPrediction(self._bounds(reading), None, 0, reading)
        probe = self.probe(input_ids, mask, **encoder)
        reading = self.read(probe)
        return LengthPrediction(self._bounds(reading), probe, 1, reading)

    def _bounds(self, reading: Tensor) -> list[int]:
        return rules.bounds(self.rule, reading, self.threshold, self.window).tolist()

    @torch.no_grad()
    def read(self, probe: Probe) -> Tensor:  # float64 [B, W] levels or [B] lengths
        """What the rule makes of a pass over the whole window, before any threshold; see `LengthPrediction.reading`.

        Raises ValueError as `bounds` does.
        """
        ends, rule = probe.end_log_prob, self.rule
        if rule in rules.EXPANSION_RULES:
            raise ValueError(f"probe: the rule {rule!r} makes passes of its own; call the predictor with the prompts")
        if ends.shape[1] != self.window:
            raise ValueError(f"probe: got one of {ends.shape[1]} masks per row; expected window = {self.window}")
        if rule == "cdf":
            return rules.cdf_levels(ends, self.length_format)
        if rule == "crossing":
            return rules.crossing_levels(ends)
        if rule == "quantile":
            return rules.quantile_lengths(ends, self.parameter)
        if rule == "argmax":
            return rules.argmax_lengths(self._end_logits(probe.states))
        if rule == "classifier":
            return rules.classifier_levels(self._apply_head(probe.states, ends.shape))
        if rule == "regression":
            if probe.prompt_mean is None:
                raise ValueError("prompt_mean: got None; pass the mean embedding of the encoder's input")
            return rules.regression_lengths(self._apply_head(probe.prompt_mean, ends.shape[:1]), self.window)
        return torch.zeros(len(ends), dtype=torch.float64, device=ends.device)

    def _end_logits(self, states: Tensor) -> Tensor:  # [B, W]
        ends = torch.tensor(self.end_token_ids, device=states.device)
        return self.model.head.logits_of(states, ends).float().logsumexp(-1)

    def _apply_head(self, features: Tensor, shape: torch.Size) -> Tensor:
        own = next(self.head.parameters(), features)
        output = self.head(features.to(own.dtype))
        if output.shape != shape:
            raise ValueError(f"head: gave shape {list(output.shape)}; expected {list(shape)} for {self.rule!r}")
        return output

    def _expand(self, input_ids: Tensor, attention_mask: Tensor | None, encoder: dict) -> tuple[Tensor, int]:
        """The window that each row reaches, less one for EoS, as a length `[B]`; and the passes made."""
        start = min(rules.EXPANSION_START, self.window)
        reached, direction = [start] * len(input_ids), [0] * len(input_ids)
        waiting, passes = {start: list(range(len(input_ids)))}, 0  # rows by the window that they are asked with next
        while waiting:
            window, rows = waiting.popitem()
            of_rows = torch.tensor(rows, device=input_ids.device)
            mask = None if attention_mask is None else attention_mask[of_rows]
            inputs = {name: None if t is None else t[of_rows] for name, t in encoder.items()}
            probe, passes = self.probe(input_ids[of_rows], mask, window=window, **inputs), passes + 1
            for row, step in zip(rows, self._steps(probe).tolist(), strict=True):
                reached[row] = rules.next_window(window, step, direction[row], self.window)
                direction[row] = direction[row] or step
                if reached[row] != window:
                    waiting.setdefault(reached[row], []).append(row)
        return torch.tensor(reached, dtype=torch.float64, device=input_ids.device) - 1, passes

    def _steps(self, probe: Probe) -> Tensor:  # int64 [B]
        if self.rule == "daedal":
            return rules.daedal_steps(probe.end_log_prob, probe.end_is_likeliest, self.parameter)
        return rules.rho_steps(probe.end_is_likeliest)


def _length_format(model: nn.Module, given: str | None) -> str:
    """The format given, or that of the model's config."""
    own = model.config.length_format
    known = ", ".join(LENGTH_FORMATS)
    if given is None and own is None:
        raise ValueError(f"length_format: the model's config names none; pass the one it was trained with: {known}")
    if given is not None and given not in LENGTH_FORMATS:
        raise ValueError(f"length_format: got {given!r}; expected one of {known}")
    if given is not None and own is not None and given != own:
        raise ValueError(f"length_format: got {given!r}; expected {own!r}, the one that the model's config names")
    return own if given is None else given


def _end_token_ids(model: nn.Module, length_format: str, rule: str, given: Sequence[int] | None) -> tuple[int, ...]:
    """The ids given, or those of the model's config that the format calls for; in rising order, each once."""
    config = model.config
    if given is None:
        ends = config.eos_token_id
        given = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        if not given:
            raise ValueError("eos_token_id: the model's config has none, so no answer has an end; pass end_token_ids")
        if length_format == "pad_fill" and rule != "argmax":
            if config.pad_token_id is None:
                raise ValueError("pad_token_id: the model's config has none, which 'pad_fill' needs; set it")
            given = [*given, config.pad_token_id]
    fitting = (0 <= token < config.vocab_size and token != config.mask_token_id for token in given)
    if not len(given) or not all(fitting):
        raise ValueError(
            f"end_token_ids: got {list(given)}; expected ids from 0 to {config.vocab_size - 1}, at least one and not "
            f"the mask token {config.mask_token_id}"
        )
    return tuple(sorted({int(token) for token in given}))


def _check_parameter(rule: str, parameter: float | None, calibrated: bool) -> None:
    """Raises ValueError for a number that the rule has not, or has no use for."""
    if parameter is None:
        return
    if rule not in _PARAMETERS:
        raise ValueError(f"parameter: got {parameter!r}; the rule {rule!r} has none: leave it out")
    fits, expected = _PARAMETERS[rule]
    if isinstance(parameter, bool) or not isinstance(parameter, int | float) or not fits(parameter):
        raise ValueError(f"parameter: got {parameter!r} with the rule {rule!r}; expected {expected}")
    if calibrated and rule not in _SHAPING_RULES:
        raise ValueError(f"parameter: got {parameter!r} with a calibration, whose threshold takes its place; drop one")
