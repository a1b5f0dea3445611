"""scheduler_config.json: a Gaussian diffusion in the terms of diffusers' schedulers, and exactly.

diffusers describes our discrete levels in full, as a DDIMScheduler: the β table, and what the network predicts. Of our
continuous levels it describes those with predicted flow whose networks get 1000·t (num_train_timesteps·t), as a
FlowMatchEulerDiscreteScheduler. For the others the file names no class that diffusers knows. The object "_fastdiff" has
the fields of `DiffusionConfig`; diffusers skips what begins with an underscore.
"""

import dataclasses
import json
import os
from pathlib import Path
from types import NoneType
from typing import Any

from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.files import read_json, write_atomically

SCHEDULER_CONFIG = "scheduler_config.json"
_FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
_DISCRETE_CLASSES = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_DEFAULTS = {  # of the classes above
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}
_REQUIRED = {  # what our samplers cannot do otherwise, or `DiffusionConfig` cannot say
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
_NUMBERS = {int: int, float: (int, float), float | None: (int, float, NoneType)}


def write_scheduler_config(directory: str | os.PathLike, config: DiffusionConfig) -> None:
    """See `Diffusion.save_pretrained`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    class_name = "DDIMScheduler" if config.is_discrete else _FLOW_CLASS
    terms = _process_terms(config)
    values: dict[str, Any] = {"_class_name": class_name if terms else "Diffusion", **terms}
    if config.is_discrete:  # how `sample` draws by DDIM: from the last level, to the image itself
        values |= {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0, "clip_sample": False}
    values["_fastdiff"] = dataclasses.asdict(config)
    write_atomically(directory / SCHEDULER_CONFIG, json.dumps(values, indent=2) + "\n")


def read_scheduler_config(directory: str | os.PathLike) -> DiffusionConfig:
    """See `Diffusion.from_pretrained`."""
    directory = Path(directory)
    files = [directory / SCHEDULER_CONFIG, directory / "scheduler" / SCHEDULER_CONFIG]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{directory}: no {SCHEDULER_CONFIG} in it or in its folder scheduler; expected a folder written by "
            "Diffusion.save_pretrained or by diffusers"
        )
    values = read_json(file)
    try:
        return _exact(values) if "_fastdiff" in values else _from_diffusers(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _process_terms(config: DiffusionConfig) -> dict[str, Any]:
    """The process by the keys of diffusers' schedulers; empty where none of them describes it."""
    terms: dict[str, Any] = {"num_train_timesteps": config.num_train_timesteps}
    if not config.is_discrete:
        is_theirs = config.prediction_type == "flow" and config.time_scale in (None, config.num_train_timesteps)
        return terms if is_theirs else {}
    terms |= {
        "beta_schedule": _BETA_SCHEDULES[config.noise_levels],
        "prediction_type": config.prediction_type,
    }
    if config.noise_levels != "cosine":
        terms["beta_start"], terms["beta_end"] = config.beta_range
    return terms


def _exact(values: dict[str, Any]) -> DiffusionConfig:
    fields = values["_fastdiff"]
    if not isinstance(fields, dict):
        raise ValueError(f"_fastdiff: got a JSON {type(fields).__name__}; expected an object")
    known = {field.name: field.type for field in dataclasses.fields(DiffusionConfig)}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(
                f"_fastdiff: got {name!r}; expected {', '.join(known)}; install the fastdiff that wrote it"
            )
        if known[name] in _NUMBERS:
            _check_number(f"_fastdiff.{name}", value, _NUMBERS[known[name]])
    config = DiffusionConfig(**fields)
    for key, value in _process_terms(config).items():
        if values.get(key, value) != value:  # someone changed one of the two
            raise ValueError(f"{key}: got {values[key]!r}; expected {value!r}, as _fastdiff says; make them agree")
    return config


def _from_diffusers(values: dict[str, Any]) -> DiffusionConfig:
    name, given = values.get("_class_name"), {**_DEFAULTS, **values}
    _check_one_of("_class_name", name, (*_DISCRETE_CLASSES, _FLOW_CLASS))
    for key, expected in _REQUIRED.items():
        if values.get(key) not in (None, expected):
            raise ValueError(f"{key}: got {values[key]!r}; expected {expected!r}: fastdiff's samplers have no other")
    _check_number("num_train_timesteps", given["num_train_timesteps"], int)
    steps = {"num_train_timesteps": given["num_train_timesteps"]}
    if name == _FLOW_CLASS:
        return DiffusionConfig(prediction_type="flow", **steps)
    levels = {theirs: ours for ours, theirs in _BETA_SCHEDULES.items()}
    _check_one_of("beta_schedule", given["beta_schedule"], tuple(levels))
    _check_one_of("prediction_type", given["prediction_type"], _PREDICTIONS)
    betas = {}
    if given["beta_schedule"] != "squaredcos_cap_v2":
        betas = {key: given[key] for key in ("beta_start", "beta_end")}
        for key, value in betas.items():
            _check_number(key, value, (int, float))
    return DiffusionConfig(
        prediction_type=given["prediction_type"], noise_levels=levels[given["beta_schedule"]], **steps, **betas
    )


def _check_one_of(name: str, value: Any, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(expected)}")


def _check_number(name: str, value: Any, kinds: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name}: got {value!r}; expected {'a whole number' if kinds is int else 'a number'}")
