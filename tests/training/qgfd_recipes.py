"""Recipes of QGFD models so small that a step takes milliseconds, on real data."""

import copy
from pathlib import Path

import yaml

BASE = {
    "task": "qgfd",
    "backbone": {
        "latent_dim": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "dropout": 0.0,
        "time_conditioning": "adaln",
    },
    "diffusion": {"prediction_type": "flow", "noise_levels": "uniform"},
    "objective": {"validation_samples": 8},
    "training": {
        "batch_size": 6, "max_steps": 6, "checkpoint_every": 2, "log_every": 2, "warmup_steps": 2,
        "mixed_precision": "no", "device": "cpu",
    },
    "sampling": {"num_inference_steps": 2, "num_samples": 2, "evaluation_samples": 0},
}  # fmt: skip
SMALL = {"hidden_size": 16, "num_heads": 2}
SECTIONS = {
    "text": {
        "text": SMALL,
        "tokenizer": {"name": "characters"},
        "text_data": {"name": "text_folder", "path": "TEXTS", "min_length": 8, "max_length": 12},
    },
    "image": {"image": SMALL, "image_data": {"name": "digits"}},
    "audio": {
        "audio": {**SMALL, "spectral_windows": [64]},
        "audio_data": {"name": "audio_folder", "folder": "SOUNDS", "sampling_rate": 4000, "num_samples": 256},
    },
    "video": {
        "video": SMALL,
        "video_data": {"num_frames": 2, "frame_size": 12, "digit_size": 8, "videos_per_digit": 1},
    },
    "tabular": {"tabular": SMALL, "tabular_data": {"name": "iris"}},
}
POEM = (
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. Rough winds do shake the buds.\n"
)


def write_data(folder: Path) -> None:
    """Texts and sounds, below `folder`."""
    import numpy as np
    from scipy.io import wavfile

    texts = folder / "texts"
    texts.mkdir()
    for index in range(4):
        (texts / f"{index}.txt").write_text(POEM * 3)
    for pitch in (300, 500):
        sounds = folder / "sounds" / str(pitch)
        sounds.mkdir(parents=True)
        for index in range(3):
            time = np.arange(400 + 40 * index) / 4000
            wavfile.write(sounds / f"{index}.wav", 4000, (0.5 * np.sin(2 * np.pi * pitch * time)).astype(np.float32))


def recipe_of(data: Path, *modalities: str, **sections) -> dict:
    """A recipe of these modalities; `sections` are merged into its own."""
    recipe = copy.deepcopy(BASE)
    for modality in modalities:
        recipe |= copy.deepcopy(SECTIONS[modality])
    if "text_data" in recipe:
        recipe["text_data"]["path"] = str(data / "texts")
    if "audio_data" in recipe:
        recipe["audio_data"]["folder"] = str(data / "sounds")
    for name, fields in sections.items():
        recipe[name] = {**recipe.get(name, {}), **fields}
    return recipe


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path
