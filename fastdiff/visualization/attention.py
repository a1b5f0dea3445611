"""Cross-attention maps as pictures: queries against the tokens of a prompt, and where in the image each token acts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastdiff.data.images import to_bytes
from fastdiff.diffusion.prompt_attention import PromptAttention
from fastdiff.files import write_atomically
from fastdiff.visualization.figures import any_names, save_figure, shown, width_of

_CELL = 0.3  # inches of a token, and of a query where there are few
_MOST_ROWS = 16  # queries with a row of their own; more share the height of so many
_PANELS_A_ROW = 3
_SHADES = "viridis"
_SAME = "the same at every timestep: a Q-Former reads a prompt once"

Average = Literal["all", "heads", "none"]


@dataclass(frozen=True)
class AttentionPanel:
    """One heatmap.

    Attributes:
        map: [Q, K], rows that sum to 1.
        keys: K names, on the x axis.
        title: above it.
    """

    map: Tensor
    keys: Sequence[str]
    title: str


@any_names()
def save_attention_heatmaps(
    panels: Sequence[AttentionPanel],
    path: str | Path,
    *,
    columns: int = _PANELS_A_ROW,
    title: str | None = None,
    query_label: str = "query",
) -> Path:
    """Writes a PNG with a heatmap a panel, each on a scale of its own from 0, with its colour bar.

    Raises ValueError for no panels, and for a map that is not [Q, K] with K names.
    """
    for panel in panels:
        if panel.map.ndim != 2 or panel.map.shape[1] != len(panel.keys):
            raise ValueError(
                f"panels: got a map {list(panel.map.shape)} with {len(panel.keys)} keys; expected [Q, K] and K names"
            )
    if not panels:
        raise ValueError("panels: got none; expected at least one")
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    longest = max(width_of(shown(key)) for panel in panels for key in panel.keys)
    widest, highest = max(len(panel.keys) for panel in panels), max(len(panel.map) for panel in panels)
    width = max(_CELL * widest, 0.065 * max(width_of(panel.title) for panel in panels), 1.6) + 0.9
    height = _CELL * min(highest, _MOST_ROWS) + 0.075 * longest + 0.7
    figure = Figure(
        figsize=(max(columns * width, 0.085 * len(title or "")), lines * height + (0.4 if title else 0.1)),
        layout="constrained",
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, panel in zip(axes.flat, panels, strict=False):
        _draw(figure, place, panel, query_label)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    return save_figure(figure, path, dpi=130)


def _draw(figure: Figure, axes: Axes, panel: AttentionPanel, query_label: str) -> None:
    image = axes.imshow(panel.map.numpy(), cmap=_SHADES, vmin=0, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, pad=0.02, aspect=16).ax.tick_params(labelsize=7)
    axes.set_xticks(range(len(panel.keys)), [shown(key) for key in panel.keys], rotation=90, fontsize=8)
    if len(panel.map) <= _MOST_ROWS:
        axes.set_yticks(range(len(panel.map)))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel(query_label, fontsize=8)
    axes.set_title(panel.title, fontsize=8)


def save_prompt_attention(
    attention: PromptAttention,
    prompts: Sequence[str],
    tokens: Sequence[Sequence[str]],
    folder: str | Path,
    *,
    average: Average = "all",
) -> list[Path]:
    """Writes attention_t<timestep>.png for each timestep, and attention.npz; the files, in this order.

    A model whose maps do not depend on the timestep gets one attention.png instead, which says so.

    Args:
        attention: what `prompt_attention` gave.
        prompts: its prompts.
        tokens: of each prompt, as `TextEncoder.tokens` gives them.
        folder: is made where there is none.
        average: over "all" layers and heads (a heatmap a prompt), over "heads" (one a prompt and layer), or "none".

    The .npz has, as arrays, "prompt<i>_t<timestep>": float32 [layers, H, Q, K]; "prompt<i>_keys": the K names;
    "prompts"; "layers": the modules' names; "timesteps", and "visited": the nearest ones that sampling visited.

    Raises ValueError where prompts, tokens and maps do not fit each other, and for another `average`.
    """
    if average not in ("all", "heads", "none"):
        raise ValueError(f"average: got {average!r}; expected 'all', 'heads' or 'none'")
    keys = [attention.keys(each) for each in tokens]
    for rows in attention.maps.values():
        if not len(prompts) == len(keys) == len(rows) or any(
            each.shape[-1] != len(names) for each, names in zip(rows, keys, strict=True)
        ):
            raise ValueError(
                f"tokens: got {[len(names) for names in keys]} keys of {len(prompts)} prompts; expected "
                f"{[each.shape[-1] for each in rows]}, those of the maps"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for timestep, rows in attention.maps.items():
        panels = [panel for row in zip(prompts, rows, keys, strict=True) for panel in _panels(*row, average)]
        of_image = attention.depends_on_time
        visited = attention.visited[timestep]
        name = f"attention_t{_number(timestep)}.png" if of_image else "attention.png"
        what = {"all": "mean of layers and heads", "heads": "mean of heads", "none": "each head"}[average]
        nearest = "" if visited == timestep else f" (nearest visited: {_number(visited)})"
        when = f"timestep {_number(timestep)}{nearest}" if of_image else _SAME
        label = "image token" if of_image else "query"
        written.append(
            save_attention_heatmaps(panels, folder / name, title=f"attention: {when}; {what}", query_label=label)
        )
        if not of_image:
            break
    return [*written, _save_arrays(attention, prompts, keys, folder / "attention.npz")]


def _panels(prompt: str, maps: Tensor, keys: Sequence[str], average: Average) -> Iterator[AttentionPanel]:
    name = shown(prompt)
    if average == "all":
        yield AttentionPanel(maps.mean((0, 1)), keys, name)
        return
    for layer, heads in enumerate(maps):
        if average == "heads":
            yield AttentionPanel(heads.mean(0), keys, f"{name}, layer {layer}")
        else:
            for head, each in enumerate(heads):
                yield AttentionPanel(each, keys, f"{name}, layer {layer}, head {head}")


def _number(timestep: float) -> str:
    return f"{timestep:g}"


def _save_arrays(attention: PromptAttention, prompts: Sequence[str], keys: Sequence[Sequence[str]], path: Path) -> Path:
    arrays = {
        "prompts": np.array(prompts),
        "layers": np.array(attention.layers),
        "timesteps": np.array(list(attention.maps)),
        "visited": np.array([attention.visited[each] for each in attention.maps]),
    }
    for index, names in enumerate(keys):
        arrays[f"prompt{index}_keys"] = np.array(names)
        for timestep, rows in attention.maps.items():
            arrays[f"prompt{index}_t{_number(timestep)}"] = rows[index].numpy()

    def write(target: Path) -> None:
        with target.open("wb") as file:  # a name would get another suffix
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)
    return path


@any_names()
def save_token_maps(
    attention: PromptAttention,
    timestep: float,
    prompts: Sequence[str],
    tokens: Sequence[Sequence[str]],
    path: str | Path,
    *,
    images: Tensor | None = None,
) -> Path:
    """Writes a PNG that shows where in the image each token is attended to, mean of layers and heads (as in DAAM).

    A row a prompt: its image, then a map a key, each on a scale of its own from 0 (as Tang et al. 2022, "What the
    DAAM", show them), with the key's share of all attention below its name.

    Args:
        attention, prompts, tokens: as of `save_prompt_attention`.
        timestep: one of those that the maps were taken at.
        path: path of the PNG.
        images: float [B, 1 or 3, H, W] in [-1, 1]; None is the samples, where they are images and no latents.

    Raises ValueError for a Q-Former, whose queries are no places of an image, and for tokens that do not form a square.
    """
    rows = attention.maps[timestep]
    side = math.isqrt(rows[0].shape[2])
    if not attention.depends_on_time or side * side != rows[0].shape[2]:
        raise ValueError(
            f"attention: got maps of {rows[0].shape[2]} queries; expected those of a DiT's image tokens, in a square"
        )
    images = attention.samples if images is None else images
    pictures = to_bytes(images[: len(rows)]) if images.shape[1] in (1, 3) else None
    names = [attention.keys(each) for each in tokens]
    columns = max(map(len, names)) + 1
    figure = Figure(figsize=(0.95 * columns, 1.35 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, maps, keys, prompt in zip(range(len(rows)), rows, names, prompts, strict=True):
        if pictures is not None:
            axes[line, 0].imshow(pictures[line].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axes[line, 0].set_title(f"{shown(prompt)}\n", fontsize=7, loc="left")
        mean = maps.mean((0, 1))
        for place, key, each in zip(axes[line, 1:], keys, mean.T, strict=False):
            place.imshow(each.view(side, side).numpy(), cmap=_SHADES, vmin=0, interpolation="nearest")
            place.set_xlabel(f"{shown(key)}\n{float(each.mean()):.0%}", fontsize=7)
    for place in axes.flat:
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_visible(False)
        if not place.images:
            place.set_visible(place.get_title(loc="left") != "")
    figure.suptitle(f"timestep {_number(timestep)}; mean of layers and heads", fontsize=9)
    return save_figure(figure, path, dpi=130)
