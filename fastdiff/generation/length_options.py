"""The options of a `LengthPredictor`, checked and filled in from the model's config."""

from collections.abc import Callable, Sequence

from torch import nn

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
SHAPING_RULES = {"quantile": 0.75, "daedal": 0.5}  # whose number, here as published, shapes the prediction


def length_format_of(model: nn.Module, given: str | None) -> str:
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


def end_token_ids_of(model: nn.Module, length_format: str, rule: str, given: Sequence[int] | None) -> tuple[int, ...]:
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


def check_parameter(rule: str, parameter: float | None, calibrated: bool) -> None:
    """Raises ValueError for a number that the rule has not, or has no use for."""
    if parameter is None:
        return
    if rule not in _PARAMETERS:
        raise ValueError(f"parameter: got {parameter!r}; the rule {rule!r} has none: leave it out")
    fits, expected = _PARAMETERS[rule]
    if isinstance(parameter, bool) or not isinstance(parameter, int | float) or not fits(parameter):
        raise ValueError(f"parameter: got {parameter!r} with the rule {rule!r}; expected {expected}")
    if calibrated and rule not in SHAPING_RULES:
        raise ValueError(f"parameter: got {parameter!r} with a calibration, whose threshold takes its place; drop one")
