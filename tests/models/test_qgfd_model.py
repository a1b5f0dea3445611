"""QGFDModel on every modality, with its own small encoders and with Hugging Face's: losses, samples, checkpoints."""

import json

import pytest
import torch
import torch.nn.functional as F
from qgfd_models import MODALITIES, PRETRAINED, make_batch, make_model, model_config, qgfd_config, write_checkpoints

from fastdiff.diffusion import Diffusion, DiffusionConfig
from fastdiff.models import QGFDModel, QGFDModelConfig

KINDS = [*((modality, False) for modality in MODALITIES), *((modality, True) for modality in PRETRAINED)]
every_kind = pytest.mark.parametrize("modality, pretrained", KINDS)
CONDITIONS = {
    "text": dict(
        condition_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), condition_mask=torch.tensor([[1, 1, 1], [1, 0, 0]])
    ),
    "image": dict(labels=torch.tensor([0, 3])),
    "audio": dict(labels=torch.tensor([0, 1])),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def make(checkpoints):
    def build(modality, pretrained, **options):
        return make_model(modality, checkpoint=checkpoints[modality] if pretrained else None, **options)

    return build


def fixed(model, batch, modality=None):
    """Times and noise of a batch, the same at each call."""
    shape = model.latent_shape(batch, modality)
    generator = torch.Generator().manual_seed(3)
    return dict(t=model.diffusion.sample_times(shape[0], generator), noise=torch.randn(shape, generator=generator))


@every_kind
def test_the_loss_is_one_number_a_sample_and_reaches_every_parameter(make, modality, pretrained):
    model, batch = make(modality, pretrained), make_batch(modality)
    latents = model.adapter().encode(batch)
    assert latents.tokens.shape == model.latent_shape(batch) and len(latents.position_ids) == latents.tokens.shape[1]
    torch.testing.assert_close(
        latents.tokens.var(-1, correction=0), torch.ones(latents.tokens.shape[:2]), rtol=0, atol=1e-3
    )
    loss = model(batch)
    assert loss.shape == (3,) and loss.dtype == torch.float32 and torch.isfinite(loss).all()
    loss.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    silent = [name for name, p in trained.items() if p.grad is None or p.grad.abs().max() == 0]
    # Attention to a single token does not depend on the scores, and the zero token has no value.
    tokens, _ = model.adapter().condition(batch)
    expected = () if modality == "text" else ("cross_attn",) if tokens is not None else ("cross_attn", "cond_proj")
    assert not [name for name in silent if not any(part in name for part in expected)], silent
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert bool(frozen) == pretrained and all(".backbone." in name for name in frozen)


@pytest.mark.parametrize("modality", PRETRAINED)
def test_a_backbone_may_be_trained_too(make, modality):
    model = make(modality, True, freeze_backbone=False)
    model(make_batch(modality)).sum().backward()
    encoder = dict(model.adapter().backbone.named_parameters())
    assert sum(p.requires_grad for p in encoder.values()) > 10
    assert not [name for name, p in encoder.items() if p.requires_grad and p.grad is None]


def test_a_frozen_backbone_has_no_dropout_in_training(make):
    model, batch = make("text", True), make_batch("text")
    model.train()
    assert torch.equal(model.adapter().encode(batch).tokens, model.adapter().encode(batch).tokens)
    tuned = make("text", True, freeze_backbone=False).train()
    assert not torch.equal(tuned.adapter().encode(batch).tokens, tuned.adapter().encode(batch).tokens)


@every_kind
def test_a_few_steps_lower_the_loss(make, modality, pretrained):
    model, batch = make(modality, pretrained, condition_dropout=0.0, reconstruction_noise=1.0), make_batch(modality)
    given = fixed(model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, parts = torch.optim.Adam(parameters, lr=1e-2), []
    for _ in range(25):
        error, reconstruction = model.losses(batch, **given)
        parts.append((error.mean().item(), reconstruction.mean().item()))
        optimizer.zero_grad()
        (error + reconstruction).mean().backward()
        optimizer.step()
    (error, reconstruction), (last_error, last_reconstruction) = parts[0], parts[-1]
    assert last_error < 0.8 * error, parts
    assert last_reconstruction < 0.8 * reconstruction, parts


def padded(modality, sample, extra):
    """A sample with `extra` places of anything behind its end."""
    name, mask = {"text": ("input_ids", "attention_mask"), "audio": ("input_values", "attention_mask")}[modality]
    length = sample[name].shape[1]
    filled = F.pad(sample[name], (0, extra), value=7 if modality == "text" else 0.3)
    return {**sample, name: filled, mask: (torch.arange(length + extra) < length)[None].long()}


@pytest.mark.parametrize("modality, pretrained", [("text", False), ("text", True), ("audio", False), ("audio", True)])
def test_padding_changes_nothing(make, modality, pretrained):
    model = make(modality, pretrained).eval()
    sample = {name: value[:1] for name, value in make_batch(modality).items() if name != "attention_mask"}
    for extra in (1, 2, 25):
        longer = padded(modality, sample, extra)
        given, alone = fixed(model, longer), model.latent_shape(sample)[1]
        short = model.adapter().encode(sample).tokens
        found = model.adapter().encode(longer)
        torch.testing.assert_close(found.tokens[:, :alone], short, rtol=0, atol=2e-5)  # seen: 5e-7
        assert found.mask.sum() == alone
        expected = model.losses(sample, t=given["t"], noise=given["noise"][:, :alone])
        for long, ref in zip(model.losses(longer, **given), expected, strict=True):
            torch.testing.assert_close(long, ref, rtol=0, atol=2e-5)  # seen: 0


@every_kind
def test_samples_have_the_form_of_a_batch_and_depend_on_their_seed_alone(make, modality, pretrained):
    model, batch = make(modality, pretrained), make_batch(modality)
    options = dict(num_inference_steps=3, seed=5)
    samples = model.sample(count=3, **options)
    assert model.training
    for name, value in samples.items():
        assert torch.isfinite(value).all() and value.dtype == batch[name].dtype, name
    again = model.sample(count=3, **options)
    last = model.sample(count=1, num_inference_steps=3, seed=7)
    other = model.sample(count=3, num_inference_steps=3, seed=50)
    for name, value in samples.items():
        assert torch.equal(value, again[name])
        tolerance = dict(rtol=0, atol=1e-4)  # seen: 5e-7, products of other sizes round otherwise
        torch.testing.assert_close(value[2:], last[name], **(tolerance if value.is_floating_point() else {}))
    assert any(not torch.equal(value, other[name]) for name, value in samples.items())
    model.eval()(samples)  # and it can be read again


def test_samples_of_every_modality_have_the_asked_size(make):
    options = dict(num_inference_steps=2)
    text = make("text", False).sample(count=3, length=[4, 1, 2], **options)
    assert text["input_ids"].shape == (3, 4) and text["attention_mask"].sum(1).tolist() == [4, 1, 2]
    assert text["input_ids"][1].tolist()[1:] == [1, 1, 1]  # pad_token_id
    assert make("text", False).sample(count=1, **options)["input_ids"].shape == (1, 6)
    audio = make("audio", False).sample(count=2, length=[13, 25], **options)  # frames of 12
    assert audio["input_values"].shape == (2, 36) and audio["attention_mask"].sum(1).tolist() == [24, 36]
    assert audio["input_values"].abs().max() <= 1 and audio["input_values"][0, 24:].abs().max() == 0
    assert make("video", False).sample(count=2, length=5, **options)["pixel_values"].shape == (2, 5, 3, 8, 8)
    assert make("image", False).sample(count=0, **options)["pixel_values"].shape == (0, 1, 7, 9)
    table = make("tabular", False).sample(count=40, **options)
    assert table["numbers"].shape == (40, 2) and table["categories"].shape == (40, 2)
    assert table["categories"][:, 0].max() < 3 and table["categories"].max() < 4


@pytest.mark.parametrize("prediction, levels", [("epsilon", "linear"), ("v_prediction", "cosine"), ("flow", "uniform")])
def test_every_diffusion_trains_and_samples(prediction, levels):
    config = model_config("tabular")
    config.diffusion = DiffusionConfig(prediction_type=prediction, noise_levels=levels)
    model = QGFDModel(config)
    assert torch.isfinite(model(make_batch("tabular"))).all()
    assert torch.isfinite(model.sample(count=2, num_inference_steps=3)["numbers"]).all()
    clipped = model.sample_latents(count=2, num_inference_steps=3, clip_sample=0.5).tokens
    assert clipped.abs().max() == 0.5  # the last step ends at the clipped prediction
    # another diffusion than the configuration's
    other = Diffusion(DiffusionConfig(prediction_type="sample", noise_levels="beta"))
    assert torch.isfinite(
        model.sample(count=2, num_inference_steps=3, sampler="renoise", diffusion=other)["numbers"]
    ).all()


@pytest.mark.parametrize("modality", CONDITIONS)
def test_guidance_moves_along_the_difference(make, modality):
    model = make(modality, False).eval()
    given = {name: value.clone() for name, value in CONDITIONS[modality].items()}
    options = dict(num_inference_steps=1, seed=2)

    def latents(**more):
        return model.sample_latents(modality, 2, **options, **more).tokens

    if modality == "text":
        free = latents()
    else:
        free = latents(conditions={"labels": torch.full((2,), model.adapter().config.num_classes)})
        assert torch.equal(free, latents())  # no condition is the null label
    bound = latents(conditions=given)
    assert (bound - free).abs().max() > 1e-3
    guided = latents(conditions=given, guidance_scale=2.5)
    scale = float((bound - free).abs().max())
    torch.testing.assert_close(guided, free + 2.5 * (bound - free), rtol=0, atol=1e-3 * scale)  # seen: 3e-6 * scale
    off = latents(conditions=given, guidance_scale=2.5, guidance_interval=(0.0, 0.5))
    assert torch.equal(off, bound)


def test_conditions_are_dropped_in_training():
    for modality in ("text", "image"):
        model, batch = make_model(modality, condition_dropout=1.0), make_batch(modality)
        free = {name: value for name, value in batch.items() if name not in ("labels", "condition_ids")}
        given = fixed(model, batch)
        dropped, bound = model.train()(batch, **given), model.eval()(batch, **given)
        torch.testing.assert_close(dropped, model(free, **given), rtol=0, atol=1e-5)  # seen: 0
        assert (bound - dropped).abs().max() > 1e-4


def test_the_diffusion_loss_leaves_the_encoder_alone():
    model, batch = make_model("image"), make_batch("image")
    error, _ = model.losses(batch)
    error.sum().backward()
    touched = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and "adapters" in name}
    assert touched == {"label_embedding"}
    model.config.reconstruction_weight = 0.0
    model.zero_grad()
    assert model.losses(batch)[1] is None
    model(batch).sum().backward()
    assert model.adapters["image"].encoder.in_proj.weight.grad is None


def test_a_shared_backbone_over_several_adapters(tmp_path):
    model = make_model("text", "image", num_classes=4)
    assert model.modality_tokens.keys() == {"text", "image"}
    for modality, other in (("text", "image"), ("image", "text")):
        model.zero_grad()
        model(make_batch(modality), modality).sum().backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert all(name in reached for name, _ in model.named_parameters() if name.startswith("backbone."))
        assert not [name for name in reached if f"adapters.{other}." in name or name == f"modality_tokens.{other}"]
        assert f"modality_tokens.{modality}" in reached
    # mixed: one step on the sum of both
    optimizer, sums = torch.optim.Adam(model.parameters(), lr=5e-3), []
    batches = {modality: make_batch(modality) for modality in model.adapters}
    given = {modality: fixed(model, batch, modality) for modality, batch in batches.items()}
    for _ in range(20):
        loss = sum(model(batch, modality, **given[modality]).mean() for modality, batch in batches.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums.append(float(loss.detach()))
    assert sums[-1] < 0.8 * sums[0]
    samples = {modality: model.sample(modality, 2, num_inference_steps=2) for modality in model.adapters}
    assert samples["text"]["input_ids"].shape == (2, 6) and samples["image"]["pixel_values"].shape == (2, 1, 7, 9)
    guided = model.sample("image", conditions={"labels": torch.tensor([1])}, guidance_scale=2.0, num_inference_steps=2)
    assert guided["pixel_values"].shape == (1, 1, 7, 9)
    model.save_pretrained(tmp_path)
    again = QGFDModel.from_pretrained(tmp_path).sample("text", 2, num_inference_steps=2)
    assert torch.equal(again["input_ids"], samples["text"]["input_ids"])


@every_kind
def test_checkpoints_need_nothing_else(make, checkpoints, tmp_path, modality, pretrained):
    backbone = qgfd_config(cond_dim=5, time_conditioning="adaln")
    model = make(modality, pretrained, backbone=backbone).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if pretrained:  # where the encoder came from may be gone
        config[modality]["backbone_name"] = "/nowhere/at/all"
        (tmp_path / "config.json").write_text(json.dumps(config))
    again = QGFDModel.from_pretrained(tmp_path)
    assert not again.training and again.config.backbone == model.config.backbone
    batch = make_batch(modality)
    given = fixed(model, batch)
    torch.testing.assert_close(again(batch, **given), model(batch, **given), rtol=0, atol=0)
    for name, value in model.sample(count=2, num_inference_steps=2).items():
        assert torch.equal(value, again.sample(count=2, num_inference_steps=2)[name])


def test_bad_arguments_are_one_line(tmp_path):
    image, text, batch = make_model("image"), make_model("text"), make_batch("image")
    shared = make_model("text", "tabular")
    cases = [
        (lambda: QGFDModel(QGFDModelConfig()), "got no adapter; expected one or more of text, image, audio, video"),
        (lambda: image(batch, "audio"), "modality: got 'audio'; this model has image"),
        (lambda: shared(make_batch("tabular")), "modality: got None; this model has text, tabular"),
        (lambda: image({"pixel_values": torch.zeros(2, 3, 7, 9)}), r"expected \[B, 1, 7, 9\]"),
        (
            lambda: image(batch, noise=torch.zeros(3, 2, 12)),
            r"noise: got shape .*; expected the latents', \[3, 6, 12\]",
        ),
        (lambda: image.sample(), "count: got None with conditions of"),
        (lambda: image.sample(count=2, conditions={"labels": torch.tensor([1])}), "count: got 2 with conditions"),
        (lambda: image.sample(count=2, length=3), "length: got 3; samples of modality 'image' have one size"),
        (lambda: image.sample(count=2, guidance_scale=2), "guidance_scale: got 2 without conditions"),
        (lambda: image.sample(conditions={"text": torch.zeros(1)}), "conditions: got 'text'; this model takes labels"),
        (
            lambda: image.sample(conditions={"labels": torch.tensor([5])}),
            r"labels: got 5..5; expected 0..3 \(4: none\)",
        ),
        (lambda: image.sample(conditions={"labels": [1]}), r"conditions: got labels = \[1\]; expected a tensor"),
        (lambda: image.sample(count=-1), "count: got -1; expected 0 or more"),
        (lambda: image({**batch, "labels": [0, 1, 2]}), r"labels: got \[0, 1, 2\]; expected an int64 tensor \[3\]"),
        (lambda: image({**batch, "labels": torch.tensor([0])}), r"labels: got torch.int64 of shape \[1\]; expected"),
        (
            lambda: text({**make_batch("text"), "labels": torch.tensor([0])}),
            "labels: got some, but .*; set num_classes",
        ),
        (lambda: image({"pixels": torch.zeros(1)}), "batch: got pixels; expected pixel_values, of modality 'image'"),
        (lambda: image.sample(count=1, sampler="euler"), "sampler: got 'euler'"),
        (lambda: image.sample(count=2, seed=[1]), "seed: got 1 seeds"),
        (lambda: text.sample(count=2, length=[3]), r"length: got \[3\]; expected"),
        (lambda: text({"input_ids": torch.tensor([[3, 20]])}), r"input_ids: got ids 3..20; expected 0..19"),
        (lambda: text({"input_ids": torch.zeros(2, 3)}), "input_ids: got torch.float32"),
        (
            lambda: text({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 4)}),
            r"attention_mask: got shape \[2, 4\]; expected \[2, 3\]",
        ),
        (lambda: make_model("video")(make_batch("image")), r"expected \[B, F, 3, 8, 8\]"),
        (lambda: make_model("audio")({"input_values": torch.zeros(2, 0)}), r"input_values: got shape \[2, 0\]"),
        (
            lambda: make_model("tabular")({"numbers": torch.zeros(2, 2)}),
            r"categories: got shape None; expected \[B, 2\]",
        ),
        (
            lambda: make_model("tabular")(
                {"numbers": torch.full((2, 2), torch.nan), "categories": torch.zeros(2, 2, dtype=torch.int64)}
            ),
            "numbers: got values that are missing",
        ),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="config.json"):
        QGFDModel.from_pretrained(tmp_path)
