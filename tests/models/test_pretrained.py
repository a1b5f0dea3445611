"""What all models share: folders that are written and read, what else config.json may hold, errors of one line."""

import json
import os
import stat
from dataclasses import dataclass

import pytest
import torch
from qgfd_models import make_model, qgfd_config
from torch import nn

from fastdiff.models import DiT, DiTConfig, Pretrained, QGFDBackbone, read_config
from fastdiff.models.length_heads import EndClassifier, LengthHead, LengthRegressor

NAMES = {"0": "zero", "1": "one", "2": "two"}


@dataclass
class LineConfig:
    width: int
    speed: float = 1.0


class Line(Pretrained):
    """A toy family: the base class needs no more than this."""

    config_class, title, free_fields = LineConfig, "a line", ("speed",)

    def __init__(self, config: LineConfig) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(config.width, config.width)
        self.tied = self.first


def make_dit():
    config = DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    return DiT(config)


MODELS = {
    "line": lambda: Line(LineConfig(3)),
    "dit": make_dit,
    "backbone": lambda: QGFDBackbone(qgfd_config()),
    "model": lambda: make_model("tabular"),
    "classifier": lambda: EndClassifier(8),
    "regression": lambda: LengthRegressor(8),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_saved_and_loaded_alike(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    random_state = torch.get_rng_state()
    model.save_pretrained(tmp_path / "new" / "folder", extra={"id2label": NAMES})
    again = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert again.config == model.config and not again.training
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
    assert read_config(tmp_path / "new" / "folder")["id2label"] == NAMES
    half = type(model).from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_weights_of_another_name(tmp_path):
    Line(LineConfig(3)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "ema.safetensors")
    Line.from_pretrained(tmp_path, weights="ema.safetensors")
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file; expected the weights of a line"):
        Line.from_pretrained(tmp_path)


def test_files_have_the_usual_mode(tmp_path):
    mask = os.umask(0o027)
    try:
        Line(LineConfig(3)).save_pretrained(tmp_path)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_only_free_fields_may_change(tmp_path):
    Line(LineConfig(3)).save_pretrained(tmp_path)
    assert Line.from_pretrained(tmp_path, speed=2.0).config == LineConfig(3, 2.0)
    with pytest.raises(TypeError, match="width: cannot be changed when loading a checkpoint; only speed can"):
        Line.from_pretrained(tmp_path, width=4)
    with pytest.raises(TypeError, match="depth: cannot be changed .*; no field of this model can"):
        EndClassifier(8).save_pretrained(tmp_path / "head")
        LengthHead.from_pretrained(tmp_path / "head", depth=4)


def test_extra_keys(tmp_path):
    with pytest.raises(
        ValueError, match="extra: got 'classes'; expected id2label, sampling, mixed_precision, choices in"
    ):
        make_dit().save_pretrained(tmp_path, extra={"classes": NAMES})
    with pytest.raises(ValueError, match="extra: got 'head'; expected other names in the config.json of a length head"):
        EndClassifier(8).save_pretrained(tmp_path, extra={"head": "regression"})
    assert not list(tmp_path.iterdir())  # refused before anything is written
    make_dit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "classes": NAMES}))
    with pytest.raises(ValueError, match="config.json: not the configuration of a DiT: .*classes"):
        DiT.from_pretrained(tmp_path)


def test_either_kind_of_length_head(tmp_path):
    EndClassifier(8).save_pretrained(tmp_path, extra={"window": 3})
    head = LengthHead.from_pretrained(tmp_path)
    assert type(head) is EndClassifier and head.hidden_size == 8 and read_config(tmp_path)["window"] == 3
    with pytest.raises(ValueError, match="config.json: .* got 'classifier'; expected 'regression'"):
        LengthRegressor.from_pretrained(tmp_path)


def test_folders_of_version_0_1_0(tmp_path):
    """Their config.json, word by word; the weights' names have not changed since."""
    dit = {"input_size": [8, 8], "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2,
           "mlp_ratio": 4.0, "num_classes": 3, "learn_sigma": False, "norm": "layer", "norm_eps": 1e-06,
           "mlp_norm_eps": None, "norm_elementwise_affine": False, "qkv_bias": True, "mlp_activation": "gelu_tanh",
           "class_dropout_prob": 0.1, "frequency_embedding_size": 256, "frequency_shift": 0.0,
           "embedders_per_block": False, "attention": "auto", "gradient_checkpointing": False}  # fmt: skip
    make_dit().save_pretrained(tmp_path / "dit")
    written = {"_class_name": "DiT", "_fastdiff_version": "0.1.0", **dit}
    (tmp_path / "dit" / "config.json").write_text(json.dumps(written))
    assert DiT.from_pretrained(tmp_path / "dit").config == DiTConfig(**{**dit, "input_size": (8, 8)})
    EndClassifier(8).save_pretrained(tmp_path / "head")
    written = {"model_type": "fastdiff_length_head", "fastdiff_version": "0.1.0", "head": "classifier"}
    (tmp_path / "head" / "config.json").write_text(json.dumps(written | {"hidden_size": 8, "model_hash": "x"}))
    assert LengthHead.from_pretrained(tmp_path / "head").kind == "classifier"


def test_config_files_that_are_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in it; expected a folder written by save_pretrained"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder; expected a checkpoint of a line"):
        Line.from_pretrained(tmp_path / "nowhere")
    for content, match in (("{", "config.json: not a JSON file"), ("[1]", "config.json: got a JSON list; expected")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=match) as caught:
            read_config(tmp_path)
        assert "\n" not in str(caught.value)
