"""Options that the commands of several kinds share. A field that is None stands for what the run's recipe says."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.sampling import samplers_for
from fastdiff.files import read_json
from fastdiff.recipes import read_recipe_file
from fastdiff.training.run_folder import locate

Sampling = TypeVar("Sampling")


class GenerationOptions(dict[str, Any]):
    """Decoding options that somebody gave, by field of `fastdiff.generation.MaskedDiffusionGenerationConfig`.

    A command's dataclass with a field of this type has all of these options; those not given are left out.
    """


def at_least(option: str, value: float | None, least: float) -> None:
    """Raises ValueError for an option of a command line that is given and too small."""
    if value is not None and value < least:
        raise ValueError(f"--{option.replace('_', '-')}: got {value}; expected at least {least}")


@dataclass
class RunOptions:
    """Options of every command on a run.

    Attributes:
        weights: averaged weights ("ema") or plain ones ("model"); for runs
        device: for example cpu or cuda; default: a GPU where there is one
    """

    weights: Literal["ema", "model"] = "ema"
    device: str | None = None


@dataclass
class DataOptions:
    """Options of commands that compare a run with the data that it was trained on.

    Attributes:
        accept_changed_data: go on although the data is not what the run was trained on; a line says what changed
    """

    accept_changed_data: bool = False


@dataclass
class SamplingOptions(RunOptions):
    """Options of commands that denoise samples.

    Attributes:
        guidance_scale: scale of classifier-free guidance; 1 means none
        num_inference_steps: number of denoising steps
        sampler: the way of denoising
        seed: seed of the first sample; sample i has seed + i
    """

    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    sampler: str | None = None
    seed: int | None = None

    @staticmethod
    def told(path: str) -> dict[str, str]:
        """What the help says of options for a run or a saved model: the values that it has, and the samplers that fit.

        Raises ValueError for a recipe or configuration that cannot be read.
        """
        config, saved = locate(path)[0].config, Path(path) / "config.json"
        content = read_recipe_file(config) if config.is_file() else read_json(saved) if saved.is_file() else {}
        sampling, diffusion = (content.get(name) or {} for name in ("sampling", "diffusion"))
        told = {name: f"default: {value}" for name, value in sampling.items() if isinstance(value, int | float | str)}
        if not config.is_file():
            return {"sampler": "euler, ddpm, ddim, dpm-solver++ or renoise", **told}
        fitting = samplers_for(DiffusionConfig(**diffusion))
        chosen = sampling.get("sampler") or fitting[0]
        return {**told, "sampler": f"of this run {', '.join(fitting)}; default: {chosen}"}

    def applied_to(self, sampling: Sampling) -> Sampling:
        """The recipe's part `sampling`, with what the command line says otherwise."""
        names = ("guidance_scale", "num_inference_steps", "sampler", "seed")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(sampling, **given)
