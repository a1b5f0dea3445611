"""What QGFDRun.sample gives of each modality, before and after save_pretrained, and what it refuses."""

import numpy as np
import pytest
import torch
from language_runs import byte_tokenizer
from models.qgfd_models import MODALITIES, make_model
from PIL import Image
from tasks.test_load import fails

import fastdiff
from fastdiff.data.table_schema import CategoryColumn, NumberColumn, TableSchema
from fastdiff.tasks.qgfd.recipe import QGFDSamplingConfig
from fastdiff.tasks.qgfd.run import QGFDRun

SCHEMA = TableSchema(
    (NumberColumn("age", 40.0, 10.0, 0), NumberColumn("weight", 70.0, 8.0, 1)),
    (CategoryColumn("colour", ("blue", "green", "red")), CategoryColumn("kind", ("a", "b", "c", "d"))),
    ("age", "colour", "weight", "kind"),
)
FACTS = {"image": {"class_names": ["cat", "dog", "bird", "fish"]}, "audio": {"class_names": ["low", "high"]}}


def run_of(*modalities: str, **options) -> QGFDRun:
    if "text" in modalities:
        options = {"vocab_size": 280, **options}
    return QGFDRun(
        model=make_model(*modalities, **options).eval(),
        source=None,
        facts={name: FACTS.get(name, {"class_names": []}) for name in modalities},
        tokenizer=byte_tokenizer() if "text" in modalities else None,
        schema=SCHEMA if "tabular" in modalities else None,
        sampling=QGFDSamplingConfig(num_inference_steps=2, num_samples=2, seed=5),
        mixed_precision="no",
    )


@pytest.fixture
def saved(tmp_path):
    """A run as it is after save_pretrained and fastdiff.load."""

    def save(run: QGFDRun) -> QGFDRun:
        run = QGFDRun(**{**vars(run), "source": tmp_path / "nowhere"})
        run.save_pretrained(tmp_path / "saved")
        again = fastdiff.load(tmp_path / "saved", device="cpu")
        assert again.sampling == run.sampling and again.mixed_precision == "no"
        return again

    return save


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_saved_model_draws_the_same(saved, modality):
    run = run_of(modality)
    options = {"prompts": ["To be", "or not to be, that"]} if modality == "text" else {}
    first, again = run.sample(**options), saved(run).sample(**options)
    assert first.batch.keys() == again.batch.keys() and first.labels == again.labels
    assert all(torch.equal(first.batch[name], again.batch[name]) for name in first.batch)
    assert len(first) == len(again) == {"image": 8, "audio": 4}.get(modality, 2)


def test_images():
    drawn = run_of("image").sample(num_samples=1, labels=["fish", 0])
    assert drawn.labels == [3, 0] and drawn.modality == "image" and drawn.sampling_rate is None
    assert [image.size for image in drawn.samples] == [(9, 7)] * 2
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in drawn.samples]))
    assert torch.equal(pixels, ((drawn.batch["pixel_values"][:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    assert run_of("image", channels=2).sample(labels="cat").samples.shape == (2, 2, 7, 9)  # no picture: an array


def test_sound():
    drawn = run_of("audio").sample("audio", 1, labels="high", length=60)
    assert drawn.samples.dtype == np.float32 and drawn.samples.shape == (1, 60) and drawn.sampling_rate == 16000
    assert drawn.labels == [1]


def test_videos():
    drawn = run_of("video").sample(num_samples=2, length=4)
    assert len(drawn.samples) == 2 and all(len(frames) == 4 for frames in drawn.samples)
    assert isinstance(drawn.samples[0][0], Image.Image) and drawn.samples[0][0].mode == "RGB" and drawn.labels is None


def test_tables():
    drawn = run_of("tabular").sample(num_samples=5)
    assert list(drawn.samples) == ["age", "colour", "weight", "kind"] and len(drawn) == 5
    assert all(len(column) == 5 for column in drawn.samples.values())
    assert set(drawn.samples["colour"]) <= {"blue", "green", "red"}
    assert np.array_equal(drawn.samples["age"], np.round(drawn.samples["age"]))


def test_text_answers_its_prompts():
    run, prompts = run_of("text"), ["To be", "or not to be, that"]
    drawn = run.sample(prompts=prompts, num_samples=2, length=7)
    assert len(drawn.samples) == 4 and all(isinstance(text, str) for text in drawn.samples)
    assert drawn.batch["input_ids"].shape == (4, 7)
    # a prompt's answer does not depend on the longer one beside it
    alone = run.sample(prompts=prompts[0], length=7)
    assert torch.equal(alone.batch["input_ids"][0], drawn.batch["input_ids"][0])
    texts = run_of("text", conditional=False).sample(num_samples=3)
    assert len(texts.samples) == 3
    other = run.sample(prompts="be", guidance_scale=2.0, seed=9, num_inference_steps=1)
    assert len(other) == 1


def test_what_does_not_fit():
    image, table, text = run_of("image"), run_of("tabular"), run_of("text")
    fails("modality: got 'audio'; this model has image", image.sample, "audio")
    fails("labels: got 'cow'; expected 0 to 3 or one of cat, dog", image.sample, labels=["cow"])
    fails("labels: got 4; expected 0 to 3", image.sample, labels=4)
    fails("labels: got none", image.sample, labels=[])
    fails("labels: got 'x'; expected None", table.sample, labels="x")
    fails("prompts: got 'x'; expected None", table.sample, prompts="x")
    fails("prompts: got None; expected one or more texts", text.sample)
    fails("prompts: got ''; expected one or more texts", text.sample, prompts="")
    fails("prompt: got '', which has no tokens", text.sample, prompts=["a", ""])
    fails("num_samples: got 0; expected at least 1", table.sample, num_samples=0)
    fails("length: got -3; expected at least 1", text.sample, prompts="a", length=-3)
    fails("length: got 3; samples of modality 'image'", image.sample, length=3)
    expected = "guidance: got an option that there is not; expected num_inference_steps"
    fails(expected, image.sample, guidance=2, kind=TypeError)
    fails("num_inference_steps: got 0", image.sample, num_inference_steps=0)
    fails("sampler: got 'euler'", image.sample, sampler="euler")
    several = run_of("video", "tabular")
    fails("modality: got None; this model has video, tabular", several.sample)


def test_what_is_finished_is_handed_over_batch_by_batch():
    from fastdiff.tasks.qgfd.samples import draw_samples

    run, kept = run_of("audio"), []
    labels = torch.arange(230) % 2
    options = QGFDSamplingConfig(num_inference_steps=1)
    drawn = draw_samples(run.model, "audio", 230, options, labels=labels, keep=kept.append)
    assert [len(samples) for samples in kept] == [100, 200] and len(drawn) == 230
    assert torch.equal(kept[1].labels, labels[:200])
    assert torch.equal(kept[0].batch["input_values"], drawn.batch["input_values"][:100])
