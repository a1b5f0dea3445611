"""scheduler_config.json: a Gaussian diffusion and its sampler in the terms of diffusers' schedulers, and exactly.

diffusers describes our discrete levels in full, and "ddim", "ddpm" and "dpm-solver++" on them: as DDIMScheduler,
DDPMScheduler and DPMSolverMultistepScheduler. What such a scheduler does with a file that we wrote is what `sample`
does, with two exceptions, where diffusers leaves noise in the image and we do not: its DDPM's last step adds some where
it starts above level 0, and with the spacing "strided" (ours where none is named; written as "trailing", which it is
where steps divide T) its DDIM ends above level 0 where steps do not divide T. Of a network that takes another time than
the level (`time_scale`) it knows nothing.

Of our continuous levels it describes those with predicted flow whose networks get 1000·t (num_train_timesteps·t) and
are sampled by "euler", as FlowMatchEulerDiscreteScheduler; `set_timesteps` of that takes our times as
sigmas=[1, 1 - 1/steps, …, 1/steps] (what diffusers' pipelines for flow models pass). For the others the file names no
class that diffusers knows.

The object "_fastdiff" has the fields of `DiffusionConfig`, "_fastdiff_sampler" those of `SamplerOptions`; diffusers
skips what begins with an underscore.
"""

import dataclasses
import json
import math
import os
import reprlib
from pathlib import Path
from types import NoneType
from typing import Any

from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.sampler_options import SamplerOptions
from fastdiff.files import read_json, write_atomically

SCHEDULER_CONFIG = "scheduler_config.json"
_FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
_DISCRETE_CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpm-solver++",
}
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_SPACINGS = ("trailing", "leading", "linspace")
_VARIANCES = {  # "fixed_small_log" is "fixed_small" by way of its logarithm
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
_DEFAULTS = {  # of the classes above
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_SAMPLER_DEFAULTS: dict[str, dict[str, Any]] = {  # of one class each: what is not named there, it does not have
    "DDIMScheduler": {
        "timestep_spacing": "leading",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
    },
    "DDPMScheduler": {
        "timestep_spacing": "leading",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "variance_type": "fixed_small",
    },
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"},
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
_BETAS = {"trained_betas", "rescale_betas_zero_snr", "thresholding"}
_SIGMAS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
_READ_BY = {  # those of `_REQUIRED` that each class has; it leaves the others unread
    "DDIMScheduler": _BETAS,
    "DDPMScheduler": _BETAS,
    "DPMSolverMultistepScheduler": _BETAS | _SIGMAS | {"use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"},
    _FLOW_CLASS: _REQUIRED.keys() - _BETAS - {"use_lu_lambdas", "use_flow_sigmas"},
}
_REQUIRED_OF_SOLVER = {  # the same of DPMSolverMultistepScheduler; the other classes leave these unread
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
}
_CLIPPING = ("DDIMScheduler", "DDPMScheduler")
_NUMBERS = {int: int, float: (int, float), float | None: (int, float, NoneType)}


def write_scheduler_config(directory: str | os.PathLike, config: DiffusionConfig, options: SamplerOptions) -> None:
    """See `Diffusion.save_pretrained`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = {**_written(config, options), "_fastdiff": dataclasses.asdict(config)}
    changed = {name: value for name, value in vars(options).items() if value != getattr(SamplerOptions, name)}
    if changed:
        values["_fastdiff_sampler"] = changed
    write_atomically(directory / SCHEDULER_CONFIG, json.dumps(values, indent=2) + "\n")


def _written(config: DiffusionConfig, options: SamplerOptions) -> dict[str, Any]:
    """Process and sampler by the class and keys of a scheduler of diffusers; another class's name where it has none."""
    sampler, terms = options.sampler_of(config), _process_terms(config)
    unknown = {"_class_name": "Diffusion", **(terms if config.is_discrete else {})}
    if options.timesteps is not None or (config.is_discrete and config.time_scale is not None):
        return unknown  # diffusers hands a network the level itself
    if not config.is_discrete:
        return {"_class_name": _FLOW_CLASS, **terms} if terms and sampler == "euler" else unknown
    spacing = options.timestep_spacing or ("linspace" if sampler == "dpm-solver++" else "strided")
    name = next(theirs for theirs, ours in _DISCRETE_CLASSES.items() if ours == sampler)
    clips = options.clip_sample is not None and options.clip_sample < math.inf
    clips_otherwise = clips and (name not in _CLIPPING or options.use_clipped_model_output)
    if spacing not in (*_SPACINGS, "strided") or clips_otherwise:
        return unknown
    values = {"_class_name": name, **terms}
    values |= {
        "timestep_spacing": spacing if spacing in _SPACINGS else "trailing",
        "steps_offset": options.steps_offset,
    }
    if name in _CLIPPING:
        values |= {"clip_sample": clips} | ({"clip_sample_range": options.clip_sample} if clips else {})
    if name == "DDIMScheduler":
        values["set_alpha_to_one"] = options.set_alpha_to_one
    if name == "DDPMScheduler" and options.variance_type is not None:
        values["variance_type"] = options.variance_type
    return values


def read_scheduler_config(directory: str | os.PathLike) -> tuple[DiffusionConfig, SamplerOptions]:
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


def _exact(values: dict[str, Any]) -> tuple[DiffusionConfig, SamplerOptions]:
    config = DiffusionConfig(**_fields(values, "_fastdiff", DiffusionConfig))
    for key, value in _process_terms(config).items():
        _check_agrees(key, values, value, "_fastdiff")
    options = SamplerOptions(**_fields(values, "_fastdiff_sampler", SamplerOptions))
    written, name = _written(config, options), values.get("_class_name")
    if name != written["_class_name"] and name in _DISCRETE_CLASSES and config.is_discrete:
        # diffusers made another of its schedulers from ours (`from_config`), which hands on what it does not know
        return config, _sampler_from(name, {**_DEFAULTS, **_SAMPLER_DEFAULTS[name], **values})
    named = "_fastdiff_sampler" if "_fastdiff_sampler" in values else "_fastdiff"
    for key, value in written.items():
        _check_agrees(key, values, value, named)
    return config, options


def _fields(values: dict[str, Any], name: str, kind: type) -> dict[str, Any]:
    fields = values.get(name, {})
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: got a JSON {type(fields).__name__}; expected an object")
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    for key, value in fields.items():
        if key not in known:
            raise ValueError(f"{name}: got {key!r}; expected {', '.join(known)}; install the fastdiff that wrote it")
        if known[key] in _NUMBERS:
            _check_number(f"{name}.{key}", value, _NUMBERS[known[key]])
    return fields


def _check_agrees(key: str, values: dict[str, Any], expected: Any, named: str) -> None:
    if values.get(key, expected) != expected:  # someone changed one of the two
        raise ValueError(f"{key}: got {values[key]!r}; expected {expected!r}, as {named} says; make them agree")


def _from_diffusers(values: dict[str, Any]) -> tuple[DiffusionConfig, SamplerOptions]:
    name = values.get("_class_name")
    _check_one_of("_class_name", name, (*_DISCRETE_CLASSES, _FLOW_CLASS))
    given = {**_DEFAULTS, **_SAMPLER_DEFAULTS.get(name, {}), **values}
    for key, expected in _REQUIRED.items():
        if key in _READ_BY[name] and values.get(key) not in (None, expected):
            got = reprlib.repr(values[key])  # trained_betas are a thousand numbers
            raise ValueError(f"{key}: got {got}; expected {expected!r}: fastdiff's samplers have no other")
    _check_number("num_train_timesteps", given["num_train_timesteps"], int)
    steps = {"num_train_timesteps": given["num_train_timesteps"]}
    if name == _FLOW_CLASS:
        options = SamplerOptions(sampler="euler", timestep_spacing="linspace")
        return DiffusionConfig(prediction_type="flow", **steps), options
    levels = {theirs: ours for ours, theirs in _BETA_SCHEDULES.items()}
    _check_one_of("beta_schedule", given["beta_schedule"], tuple(levels))
    _check_one_of("prediction_type", given["prediction_type"], _PREDICTIONS)
    betas = {}
    if given["beta_schedule"] != "squaredcos_cap_v2":
        betas = {key: given[key] for key in ("beta_start", "beta_end")}
        for key, value in betas.items():
            _check_number(key, value, (int, float))
    config = DiffusionConfig(
        prediction_type=given["prediction_type"], noise_levels=levels[given["beta_schedule"]], **steps, **betas
    )
    return config, _sampler_from(name, given)


def _sampler_from(name: str, given: dict[str, Any]) -> SamplerOptions:
    """How a scheduler of diffusers takes its steps. A key of another class is left unread, as diffusers leaves it."""
    known = _SAMPLER_DEFAULTS[name]
    _check_one_of("timestep_spacing", given["timestep_spacing"], _SPACINGS)
    options: dict[str, Any] = {"sampler": _DISCRETE_CLASSES[name], "timestep_spacing": given["timestep_spacing"]}
    if given["timestep_spacing"] == "leading":
        _check_number("steps_offset", given["steps_offset"], int)
        options["steps_offset"] = given["steps_offset"]
    for key in ("clip_sample", "set_alpha_to_one"):
        if key in known and not isinstance(given[key], bool):
            raise ValueError(f"{key}: got {given[key]!r}; expected true or false")
    if "clip_sample" in known and given["clip_sample"]:
        _check_number("clip_sample_range", given["clip_sample_range"], (int, float))
        options["clip_sample"] = given["clip_sample_range"]
    if "set_alpha_to_one" in known:
        options["set_alpha_to_one"] = given["set_alpha_to_one"]
    if "variance_type" in known:
        _check_one_of("variance_type", given["variance_type"], tuple(_VARIANCES))
        options["variance_type"] = _VARIANCES[given["variance_type"]]
    if name == "DPMSolverMultistepScheduler":
        for key, expected in _REQUIRED_OF_SOLVER.items():
            if given.get(key, expected) not in (expected, str(expected)):
                raise ValueError(
                    f"{key}: got {given[key]!r}; expected {expected!r}: fastdiff's dpm-solver++ has no other"
                )
    return SamplerOptions(**options)


def _check_one_of(name: str, value: Any, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(expected)}")


def _check_number(name: str, value: Any, kinds: type | tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name}: got {value!r}; expected {'a whole number' if kinds is int else 'a number'}")
