"""What a text-to-image model attends to in a prompt, at chosen timesteps of its denoising."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.device import autocast, evaluating
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.prompts import sample_prompts
from fastdiff.diffusion.sampling import make_steps
from fastdiff.nn.attention_maps import attention_maps, cross_attentions, depends_on_time, sink_share


@dataclass(frozen=True)
class PromptAttention:
    """The cross-attention maps of some prompts, and the samples drawn on the way.

    Attributes:
        maps: by timestep, in the order in which they were asked for, one tensor a prompt: float32 [layers, H, Q, K],
            K its tokens after `leading_keys` others. Rows of K sum to 1.
        visited: by timestep, the one that sampling visits and of which the maps are: the nearest.
        layers: names of the cross-attention modules.
        leading_keys: 1 of a DiT, whose first key is the time; 0 of a Q-Former.
        depends_on_time: False of a Q-Former, which reads a prompt once: its maps are the same at all timesteps.
        samples: float32 [B, C, H, W].
    """

    maps: dict[float, list[Tensor]]
    visited: dict[float, float]
    layers: tuple[str, ...]
    leading_keys: int
    depends_on_time: bool
    samples: Tensor

    def sink_share(self) -> float:
        """The share of attention on the first token, mean over prompts, timesteps, layers, heads and queries."""
        shares = [sink_share(each[None], self.leading_keys) for rows in self.maps.values() for each in rows]
        return float(torch.cat(shares).mean())

    def even_share(self) -> float:
        """What `sink_share` would be if all keys of a prompt got the same attention."""
        return float(torch.tensor([1 / each.shape[-1] for rows in self.maps.values() for each in rows]).mean())

    def keys(self, tokens: Sequence[str]) -> list[str]:
        """Names of a prompt's keys, given its tokens: the time, where there is such a key, comes first."""
        return ["(time)"] * self.leading_keys + list(tokens)


@torch.no_grad()
def prompt_attention(
    model: nn.Module,
    diffusion: Diffusion,
    text_states: Tensor,  # [B, S, text_dim] or [B, S, K, text_dim]
    text_mask: Tensor,  # bool [B, S], True = a token
    attention_timesteps: Sequence[float],
    *,
    num_inference_steps: int | None = None,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    autocast_dtype: torch.dtype | None = None,
    **options: Any,
) -> PromptAttention:
    """Draws a sample a prompt, and keeps what the model attends to at some timesteps.

    Args:
        model: a `TextToImage`.
        diffusion: its process.
        text_states, text_mask: of the prompts, as `TextStates.pad` gives them.
        attention_timesteps: of a discrete process levels 0 … T - 1, else noise times from 0 (the image) to 1 (noise).
            The nearest one that the sampler visits is taken. (The sampler's own `timesteps` are one of `options`.)
        num_inference_steps, callback, autocast_dtype, options: as of `sample_prompts`.

    Raises:
        ValueError: no attention_timesteps, or one outside the schedule; a model without cross-attention. And as
            `sample_prompts`.
    """
    cross_attentions(model)
    plan = make_steps(
        diffusion, num_inference_steps, {name: value for name, value in options.items() if name not in _OF_PROMPTS}
    )
    steps = nearest_steps(plan.times.tolist(), attention_timesteps, diffusion)
    device = next(model.parameters()).device
    text_states, text_mask = text_states.to(device), text_mask.to(device)
    over_time, count = depends_on_time(model), len(text_states)

    def after_step(step: int, *rest: Any) -> None:
        if over_time:
            captured.after_step(step)
        if callback is not None:
            callback(step, *rest)

    with attention_maps(model, set(steps) if over_time else None, rows=count) as captured:
        with evaluating(model), autocast(device, autocast_dtype):
            condition = model.condition(text_states, text_mask)
        samples = sample_prompts(
            model,
            diffusion,
            condition,
            num_inference_steps=num_inference_steps,
            callback=after_step,
            autocast_dtype=autocast_dtype,
            **options,
        )
    lengths = (captured.leading_keys + text_mask.sum(1)).tolist()
    maps = {}
    for timestep, step in zip(attention_timesteps, steps, strict=True):
        of_step = captured[step if over_time else 0]
        maps[timestep] = [each[..., :length] for each, length in zip(of_step, lengths, strict=True)]
    times = plan.times.tolist()
    visited = dict(zip(attention_timesteps, (times[step] for step in steps), strict=True))
    return PromptAttention(maps, visited, captured.layers, captured.leading_keys, over_time, samples)


_OF_PROMPTS = ("null", "guidance_scale", "guidance_interval", "guidance_channels", "seed", "sample_size", "progress")


def nearest_steps(times: Sequence[float], attention_timesteps: Sequence[float], diffusion: Diffusion) -> list[int]:
    """The sampling step nearest to each timestep.

    Args:
        times: the t of each step, as `Steps.times` has them.
        attention_timesteps: as of `prompt_attention`.

    Raises ValueError for none of them, for one twice, and for one outside the schedule.
    """
    discrete = diffusion.config.is_discrete
    last = diffusion.config.num_train_timesteps - 1 if discrete else 1
    if not attention_timesteps or len(set(attention_timesteps)) < len(attention_timesteps):
        raise ValueError(f"attention_timesteps: got {list(attention_timesteps)}; expected one or more, each once")
    for timestep in attention_timesteps:
        if not 0 <= timestep <= last:
            kind = f"a level of the schedule, 0 … {last}" if discrete else "a noise time, 0 to 1"
            raise ValueError(f"attention_timesteps: got {timestep}; expected {kind}")
    return [min(range(len(times)), key=lambda step: abs(times[step] - wanted)) for wanted in attention_timesteps]
