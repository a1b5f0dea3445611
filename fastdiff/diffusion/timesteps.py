"""Spacings of discrete timesteps: which levels the steps of a sampler visit.

Those of diffusers' schedulers follow Table 2 of Lin et al. (2023), "Common Diffusion Noise Schedules and Sample Steps
are Flawed"; those of facebookresearch/DiT come from Improved DDPM (Nichol & Dhariwal, 2021).
"""

import numpy as np

SPACINGS = ("strided", "trailing", "leading", "linspace", "respacing", "ddim_respacing")
DIFFUSERS_SPACINGS = ("trailing", "leading", "linspace")


def spaced_timesteps(spacing: str, total: int, count: int, offset: int = 0, *, is_solver: bool = False) -> list[int]:
    """`count` of the levels 0 … total - 1, falling.

    Args:
        spacing: one of `SPACINGS`; see `SamplerOptions.timestep_spacing`.
        offset: added to those of "leading".
        is_solver: spaces "leading" and "linspace" as diffusers' DPM-Solver++ does: count + 1 levels without the lowest.

    Raises ValueError where the spacing has no such number of levels, or levels beyond the last; one line.
    """
    stride, extra = total // count, int(is_solver)
    if spacing == "strided":
        levels = [stride * (index + 1) - 1 for index in reversed(range(count))]
    elif spacing == "trailing":  # by the cut: for some counts NumPy's rounding gives one level more, -1
        levels = (np.round(np.arange(total, 0, -total / count)).astype(int) - 1).tolist()[:count]
    elif spacing == "leading":
        stride = total // (count + extra)
        if not stride:
            raise ValueError(
                f"num_inference_steps: got {count} with timestep_spacing 'leading'; expected at most {total - 1}"
            )
        levels = [stride * index + offset for index in reversed(range(extra, count + extra))]
    elif spacing == "linspace":
        levels = np.linspace(0, total - 1, count + extra).round().astype(int)[::-1][:count].tolist()
    elif spacing == "respacing":
        levels = _respaced(total, count)
    else:
        levels = _ddim_respaced(total, count)
    if levels[0] >= total:
        raise ValueError(
            f"steps_offset: got {offset} with num_inference_steps {count}, whose first timestep would be {levels[0]}; "
            f"expected at most {total - 1 - levels[0] + offset}"
        )
    return levels


def _respaced(total: int, count: int) -> list[int]:
    """Evenly from 0 to total - 1, both among them. Their sums are rounded as they are added up."""
    stride, position, levels = (total - 1) / (count - 1) if count > 1 else 1.0, 0.0, []
    for _ in range(count):
        levels.append(round(position))
        position += stride
    return levels[::-1]


def _ddim_respaced(total: int, count: int) -> list[int]:
    """0, stride, 2·stride, … by the smallest whole stride that gives so many."""
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))[::-1]
    raise ValueError(
        f"num_inference_steps: got {count} with timestep_spacing 'ddim_respacing'; expected a number for which a whole "
        f"stride through {total} levels exists, such as {_nearest_ddim(total, count)}"
    )


def _nearest_ddim(total: int, count: int) -> int:
    return min((len(range(0, total, stride)) for stride in range(1, total)), key=lambda each: abs(each - count))
