"""Vision encoders: pixels and states are those of transformers itself on checkpoints in its exact formats."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open

from fastdiff.models.vision_encoder import VisionEncoderConfig, load_vision_encoder

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SQUARE = dict(**SIZES, image_size=32, patch_size=8)
# Of each kind: its model, the processor's name in published files, what that says, and where the tokens lie.
KINDS = {
    "clip": ("CLIPVisionConfig", SQUARE, "CLIPFeatureExtractor",
             dict(size=32, crop_size=32, resample=3, image_mean=[0.48, 0.45, 0.4], image_std=[0.26, 0.26, 0.27]),
             (4, 4, 1)),
    "siglip": ("SiglipVisionConfig", SQUARE, "SiglipImageProcessor", dict(size=dict(height=32, width=32)), (4, 4, 0)),
    "vit": ("ViTConfig", SQUARE, "ViTImageProcessor", dict(size=dict(height=32, width=32), resample=2), (4, 4, 1)),
    "dinov2": ("Dinov2Config", {**SQUARE, "image_size": 48}, "BitImageProcessor",
               dict(size=dict(shortest_edge=40), crop_size=dict(height=32, width=32)), (4, 4, 1)),
}  # fmt: skip
needs_efficientnet = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="no efficientnet-lite-pytorch"
)


def checkpoint(folder, kind: str):
    """A random model in transformers' format with a preprocessor_config.json, and its processor."""
    name, fields, processor, preprocessing, _ = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, name)(**fields)).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor, **preprocessing}))
    short = processor.removesuffix("FeatureExtractor").removesuffix("ImageProcessor")
    return model, getattr(transformers, f"{short}ImageProcessorPil").from_pretrained(folder)


def pictures(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pixels_and_states_are_those_of_transformers(kind, tmp_path):
    model, processor = checkpoint(tmp_path, kind)
    encoder = load_vision_encoder(VisionEncoderConfig(str(tmp_path)))
    assert tuple(encoder.grid) == KINDS[kind][4] and encoder.num_tokens == sum(encoder.grid[:1]) * 4 + encoder.grid[2]
    assert encoder.hidden_size == 16
    pixels = pictures(3, 44, 52)
    shown = processor([Image.fromarray(each) for each in pixels], return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.pixel_values(as_tensor(pixels)), shown)
    expected = model(pixel_values=shown).last_hidden_state
    states = encoder.encode(as_tensor(pixels), batch_size=3)
    assert torch.equal(states, expected) and states.shape == (3, encoder.num_tokens, 16)
    torch.testing.assert_close(encoder.encode(as_tensor(pixels), batch_size=1), expected, atol=1e-5, rtol=1e-5)
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())


@torch.no_grad()
def test_the_tower_of_a_whole_clip_is_as_it_is_alone(tmp_path):
    text = dict(SIZES, vocab_size=50, max_position_embeddings=8)
    config = transformers.CLIPConfig(vision_config=SQUARE, text_config=text, projection_dim=8)
    torch.manual_seed(0)
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:  # the names that published files have
        assert {"vision_model.embeddings.class_embedding", "text_model.final_layer_norm.bias"} <= set(file.keys())
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32})
    )
    encoder, images = load_vision_encoder(VisionEncoderConfig(str(tmp_path))), as_tensor(pictures(2, 32, 32))
    expected = whole.vision_model(pixel_values=encoder.pixel_values(images)).last_hidden_state
    assert torch.equal(encoder.encode(images), expected)
    assert type(encoder.model).__name__ == "CLIPVisionModel"  # no text model beside it


def test_grey_images_are_three_channels(tmp_path):
    checkpoint(tmp_path, "vit")
    encoder, grey = load_vision_encoder(VisionEncoderConfig(str(tmp_path))), as_tensor(pictures(2, 32, 32))[:, :1]
    assert torch.equal(encoder.encode(grey), encoder.encode(grey.expand(-1, 3, -1, -1)))


def test_positions_are_added_to_the_picture_alone(tmp_path):
    checkpoint(tmp_path, "vit")
    images = as_tensor(pictures(1, 32, 32))
    plain = load_vision_encoder(VisionEncoderConfig(str(tmp_path)))
    placed = load_vision_encoder(VisionEncoderConfig(str(tmp_path), positions="sincos"))
    added = placed.encode(images) - plain.encode(images)
    assert plain.fingerprint != placed.fingerprint
    assert not added[0, 0].any() and len({tuple(row.tolist()) for row in added[0].round(decimals=3)}) == 17


def test_the_fingerprint_knows_weights_and_preprocessing(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        checkpoint(folder, "vit")
    content = json.loads((folders[1] / "preprocessor_config.json").read_text())
    (folders[1] / "preprocessor_config.json").write_text(json.dumps(content | {"image_mean": [0.4, 0.5, 0.5]}))
    weights = folders[2] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    found = [load_vision_encoder(VisionEncoderConfig(str(folder))).fingerprint for folder in folders]
    assert len(set(found)) == 3
    checkpoint(tmp_path / "d", "vit")
    assert load_vision_encoder(VisionEncoderConfig(str(tmp_path / "d"))).fingerprint == found[0]


def written(folder, kind="vit", **changes):
    checkpoint(folder, kind)
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return folder


WRONG = {
    "an unknown processor": (lambda f: written(f, image_processor_type="LevitImageProcessor"),
                             "image_processor_type: got 'LevitImageProcessor'; expected one of CLIPImageProcessor"),
    "no processor": (lambda f: written(f, image_processor_type=None), "image_processor_type: got None"),
    "another size": (lambda f: written(f, size=dict(height=40, width=40)), r"40, 40\] pixels, which the model"),
    "damaged JSON": (lambda f: (written(f) / "preprocessor_config.json").write_text("{"), "not JSON"),
    "no preprocessing": (lambda f: (written(f) / "preprocessor_config.json").unlink(), "no such file"),
    "a text model": (lambda f: transformers.BertModel(transformers.BertConfig(
        vocab_size=9, max_position_embeddings=8, **SIZES)).save_pretrained(f), "type 'bert'; expected a vision"),
    "half of the weights": (lambda f: (written(f) / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:2000]), "cut short"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case, tmp_path):
    make, message = WRONG[case]
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_vision_encoder(VisionEncoderConfig(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_other_shapes_and_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder; expected efficientnet_lite0, clip"):
        load_vision_encoder(VisionEncoderConfig("./nowhere"))
    with pytest.raises(ValueError, match="name: got ''"):
        VisionEncoderConfig("")
    encoder = load_vision_encoder(VisionEncoderConfig(str(written(tmp_path))))
    with pytest.raises(ValueError, match=r"expected \[N, 1 or 3, H, W\]"):
        encoder.encode(torch.zeros(1, 2, 8, 8))


@needs_efficientnet
def test_the_feature_map_of_efficientnet():
    from fastdiff.evaluation import image_features

    encoder = load_vision_encoder(VisionEncoderConfig(positions="none"))
    images = as_tensor(pictures(2, 20, 20))
    states = encoder.encode(images)
    assert states.shape == (2, 49, 1280) and tuple(encoder.grid) == (7, 7, 0)
    torch.testing.assert_close(states.mean(1), image_features(images), atol=1e-5, rtol=1e-4)
    top = images.clone()
    top[:, :, :4] = -images[:, :, :4]  # what changes at the top changes the top's tokens most
    change = (encoder.encode(top) - states).square().mean(-1).view(2, 7, 7)
    assert (change[:, :2].mean((1, 2)) > change[:, 5:].mean((1, 2))).all()


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastdiff-kernels\[images\]'"):
        load_vision_encoder(VisionEncoderConfig())
