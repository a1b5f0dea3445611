"""A captioning recipe so small that a step takes milliseconds: squares in colours, seen by a random tiny ViT."""

import json
from pathlib import Path

import torch
import transformers
import yaml
from PIL import Image

COLORS = ("red", "green", "blue", "black", "orange", "purple")
VIT = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
)
RECIPE = {
    "task": "captioning",
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32},
    "tokenizer": {"name": "characters"},
    "captions": {"max_length": 20},
    "objective": {"condition_dropout_prob": 0.25, "likelihood_samples": 4},
    "training": {
        "batch_size": 8, "max_steps": 4, "checkpoint_every": 2, "keep_last": 3, "log_every": 2, "warmup_steps": 1,
        "mixed_precision": "no", "device": "cpu", "ema_decay": 0.5,
    },
    "sampling": {"num_images": 2, "generation": {"num_inference_steps": 3}},
}  # fmt: skip


def write_vit(folder: Path) -> Path:
    """A random ViT of 17 states, 16 wide, with its preprocessing."""
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).save_pretrained(folder)
    content = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def write_pictures(folder: Path) -> Path:
    """Twelve pictures of one square each, with one caption or two."""
    folder.mkdir()
    lines = []
    for number in range(12):
        color, edge = COLORS[number % 6], 4 + number
        picture = Image.new("RGB", (24, 20), "white")
        picture.paste(Image.new("RGB", (edge, edge), color), (2, 2))
        picture.save(folder / f"{number}.png")
        lines.append({"file": f"{number}.png", "captions": [f"a {color} square", f"{color}"][: 1 + number % 2]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_recipe(root: Path, name: str = "recipe.yaml", **changes) -> Path:
    """The recipe as a file in a folder that has the ViT and the pictures; `changes` are of its sections."""
    content = RECIPE | {
        "vision": {"name": str(root / "vit")},
        "data": {"name": "captions_folder", "folder": str(root / "pictures"), "image_size": 24,
                 "held_out_fraction": 0.3},
    }  # fmt: skip
    content |= {section: {**content.get(section, {}), **fields} for section, fields in changes.items()}
    (root / name).write_text(yaml.safe_dump(content))
    return root / name
