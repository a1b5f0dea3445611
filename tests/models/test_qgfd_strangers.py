"""QGFD folders from strangers: nothing in them is run or downloaded, and nothing is built of sizes they claim."""

import dataclasses
import json
import os
import sys

import pytest
import torch
from qgfd_models import PRETRAINED, make_batch, make_model, write_checkpoints
from safetensors.torch import load_file, save_file

from fastdiff.models import QGFDBackbone, QGFDModel
from fastdiff.models.length_heads import EndClassifier, LengthHead
from fastdiff.models.qgfd.adapters.huggingface import load_encoder

CODE = "import os, sys\nsys.stderr.write('STRANGERS CODE RAN')\nos.environ['STRANGER'] = 'ran'\nclass Evil: pass\n"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """Fails where the user is asked, a kernel or a file is fetched, or the stranger's code runs."""

    def never(*args, **options):
        raise AssertionError(f"asked or fetched: {args}")

    monkeypatch.setattr("builtins.input", never)
    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    for name in ("get_kernel", "load_and_register_attn_kernel"):
        for module in [m for key, m in sys.modules.items() if key.startswith("transformers") and m]:
            if name in vars(module):
                monkeypatch.setattr(module, name, never)
    (tmp_path / "evil.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield
    assert "STRANGER" not in os.environ and "evil" not in sys.modules


def changed(folder, change):
    """Changes config.json: `change` of its values, in place."""
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


HARMLESS = {
    "auto_map": {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForTextEncoding")},
    "auto_map of the hub": {"AutoModel": "stranger/evil--evil.Evil"},
    "attn_implementation": "stranger/evil-kernel",
    "_attn_implementation": "stranger/evil-kernel:Evil",
    "_attn_implementation_internal": "stranger/evil-kernel",
    "_experts_implementation": "stranger/evil-kernel",
    "experts_implementation": "stranger/evil-kernel",
    "trust_remote_code": True,
}


@pytest.mark.parametrize("modality", PRETRAINED)
@pytest.mark.parametrize("key", HARMLESS)
def test_what_names_code_is_dropped(checkpoints, tmp_path, nothing_runs, modality, key):
    model = make_model(modality, checkpoint=checkpoints[modality]).eval()
    model.save_pretrained(tmp_path / "model")
    assert not any("implementation" in name for name in getattr(model.config, modality).backbone_config)

    def change(values):
        values[modality]["backbone_config"][key.partition(" ")[0]] = HARMLESS[key]

    changed(tmp_path / "model", change)
    again, batch = QGFDModel.from_pretrained(tmp_path / "model"), make_batch(modality)
    with torch.no_grad():
        expected, found = (each.adapter().encode(batch).tokens for each in (model, again))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("key", ["auto_map", "attn_implementation", "_attn_implementation"])
def test_a_pretrained_encoder_runs_nothing_either(checkpoints, tmp_path, nothing_runs, key):
    config = json.loads((checkpoints["image"] / "config.json").read_text()) | {key: HARMLESS[key]}
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vit" / "model.safetensors").symlink_to(checkpoints["image"] / "model.safetensors")
    (tmp_path / "vit" / "evil.py").write_text(CODE)
    encoder, values = load_encoder(str(tmp_path / "vit"), "image")
    assert type(encoder).__name__ == "ViTModel" and key not in values


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="bert"), "backbone_config: got model_type 'bert'; modality 'image' takes one of vit, deit"),
        (dict(model_type="t5", auto_map=HARMLESS["auto_map"]), "got model_type 't5'"),
        (dict(model_type=None), "got model_type None"),
        (dict(hidden_size="many"), "backbone_config: not a vit that can be built"),
        (dict(num_hidden_layers=1e7), "config.json: num_hidden_layers: got 10000000.0 with "),
        (dict(num_labels=10**9), "config.json: num_labels: got 1000000000 with "),
        (dict(hidden_size=1 << 20), "has shape"),
        (dict(image_size=1 << 40), "backbone_config: not a vit that can be built"),
    ],
)
def test_an_encoder_that_does_not_fit(checkpoints, tmp_path, nothing_runs, change, message):
    make_model("image", checkpoint=checkpoints["image"]).save_pretrained(tmp_path / "model")
    changed(tmp_path / "model", lambda values: values["image"]["backbone_config"].update(change))
    with pytest.raises(ValueError) as caught:
        QGFDModel.from_pretrained(tmp_path / "model")
    assert (
        message in str(caught.value)
        and "\n" not in str(caught.value)
        and "config.json" in str(caught.value)
        or (message == "has shape" and message in str(caught.value))
    )


def test_an_encoder_that_would_be_downloaded(checkpoints, tmp_path, nothing_runs):
    make_model("image", checkpoint=checkpoints["image"]).save_pretrained(tmp_path)
    changed(tmp_path, lambda values: values["image"].update(backbone_name="stranger/evil", backbone_config=None))
    with pytest.raises(ValueError, match="image.backbone_config: got null with a backbone_name; expected"):
        QGFDModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["backbone"].update(num_layers=10**7), "num_layers: got 10000000 with "),
        (lambda v: v["tabular"].update(decoder_layers=10**7), "decoder_layers: got 10000000 with "),
        (lambda v: v["backbone"].update(hidden_size=1 << 20), "has shape"),
        (lambda v: v["backbone"].update(intermediate_size=1 << 62), "not the configuration of a QGFD model"),
        (lambda v: v["tabular"].update(category_sizes=[1 << 40]), "has shape"),
        (lambda v: v.update(tabular=[3]), "not the configuration of a QGFD model"),
        (lambda v: v.update(backbone="x"), "not the configuration of a QGFD model"),
    ],
    ids=range(7),
)
def test_sizes_are_compared_before_anything_is_built(tmp_path, change, message):
    make_model("tabular").save_pretrained(tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError) as caught:
        QGFDModel.from_pretrained(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [QGFDModel, QGFDBackbone])
def test_unknown_missing_and_numbers_that_are_no_weights(tmp_path, kind):
    model = make_model("tabular")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "backbone.blocks.1.mlp.fc1.weight"
    own = name if kind is QGFDModel else name.removeprefix("backbone.")
    for change, message in (
        ({"backbone.extra.lora_A": torch.ones(2)}, "extra.lora_A is unknown"),
        ({name: None}, f"{own} is missing"),
        ({name: state[name].to(torch.int8)}, f"{own} has dtype torch.int8, expected float32, bfloat16 or float16"),
    ):
        save_file({n: t for n, t in {**state, **change}.items() if t is not None}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError) as caught:
            kind.from_pretrained(tmp_path)
        assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    save_file(state, tmp_path / "model.safetensors")
    assert {p.dtype for p in kind.from_pretrained(tmp_path, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_a_length_head_of_a_size_that_its_file_has_not(tmp_path):
    EndClassifier(8).save_pretrained(tmp_path)
    changed(tmp_path, lambda values: values.update(hidden_size=1 << 40))
    with pytest.raises(ValueError, match=r"norm.weight has shape \[8\], expected \[1099511627776\]"):
        LengthHead.from_pretrained(tmp_path)
    assert dataclasses.asdict(EndClassifier(8).config)["hidden_size"] == 8
