import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fastdiff.recipes import plain
from fastdiff.training.randomness import generator


class Bell(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log_spread = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):  # [B] -> negative log likelihoods [B], without their constant
        return 0.5 * ((x - self.mean) / self.log_spread.exp()).square() + self.log_spread


def save_bell(model, folder: Path):
    save_file({name: tensor.detach() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "Bell"}))


class ToyTask:
    unit = "numbers"
    partial_gradients = False

    def __init__(self, recipe):
        self.config, self.model = recipe, Bell()

    def batch(self, step, slots):
        training = self.config.training
        x = torch.randn(training.batch_size, generator=generator(training.seed, step))
        return {"x": self.config.data.mean + x[slots.start : slots.stop]}

    def weight(self, batch):
        return float(len(batch["x"]))

    def loss(self, model, batch):
        return model(batch["x"]).sum()

    def sample_ids(self, step):
        return []

    def save(self, model, folder: Path):
        save_bell(model, folder)

    def validate(self, model):
        return {"mean": model.mean.item()}

    def preview(self, model, path: Path):
        path.write_bytes(b"a picture")

    def data_sets(self):
        return {}  # numbers that are drawn

    def facts(self):
        return {"kind": "toy"}

    def recipe(self):
        return plain(dataclasses.asdict(self.config))
