"""Options that the commands of several kinds share. A field that is None stands for what the run's recipe says."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.sampler_config import SamplerConfig
from fastdiff.diffusion.sampler_options import samplers_for
from fastdiff.files import read_json
from fastdiff.recipes import read_recipe_file
from fastdiff.training.run_folder import locate

Sampling = TypeVar("Sampling", bound=SamplerConfig)


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
        data_path: the file or folder of the data, where it does not lie where the run's recipe says
    """

    accept_changed_data: bool = False
    data_path: str | None = None


@dataclass
class SamplingOptions(RunOptions):
    """Options of commands that denoise samples.

    Attributes:
        guidance_scale: scale of classifier-free guidance; 1 means none
        num_inference_steps: number of denoising steps
        sampler: the way of denoising
        timestep_spacing: which noise levels the steps visit: strided, or trailing, leading and linspace as in
            diffusers, or respacing and ddim_respacing as in facebookresearch/DiT ("50", "ddim50")
        steps_offset: added to the timesteps of leading
        timesteps: the noise levels themselves, in falling order, with commas
        variance_type: noise of ddpm: learned_range, fixed_small or fixed_large
        seed: seed of the first sample; sample i has seed + i
    """

    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    sampler: str | None = None
    timestep_spacing: str | None = None
    steps_offset: int | None = None
    timesteps: str | None = None
    variance_type: str | None = None
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
        """The recipe's part `sampling`, with what the command line says otherwise.

        Raises ValueError for an option that cannot be one; whether it fits the run, `check_sampler` says.
        """
        fields = {field.name for field in dataclasses.fields(SamplingOptions)} | {"guidance_channels"}
        fields -= {field.name for field in dataclasses.fields(RunOptions)}
        given: dict[str, Any] = {name: getattr(self, name) for name in fields if hasattr(self, name)}
        if self.timesteps is not None:
            try:
                given["timesteps"] = [float(part) for part in self.timesteps.split(",")]
            except ValueError:
                raise ValueError(f"--timesteps: got {self.timesteps!r}; expected numbers with commas") from None
        return sampling.replaced(given)
