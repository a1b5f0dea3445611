"""create_qgfd_model and the processors: Hugging Face folders, small encoders, bad names, tables, sound, videos."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from qgfd_models import ADAPTERS, MODALITIES, adapter_config, qgfd_config, tokenizer, write_checkpoints
from tokenizers_of_kinds import with_holes
from transformers import AutoFeatureExtractor, AutoImageProcessor, T5EncoderModel, ViTModel, Wav2Vec2Model

from fastdiff.data import TableSchema
from fastdiff.diffusion import Diffusion
from fastdiff.models import QGFDConfig, QGFDModel, QGFDModelConfig, create_qgfd_model
from fastdiff.models.qgfd.adapters import (
    AudioProcessor,
    ImageAdapterConfig,
    ImageProcessor,
    TextAdapterConfig,
    VideoProcessor,
)

TABLE = {"age": [30, 41, 25, 60], "height": [1.7, 1.6, 1.85, 1.75], "city": ["Rome", "Oslo", "Rome", "Bonn"]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("hub"))


def small(**adapters) -> QGFDModelConfig:
    return QGFDModelConfig(qgfd_config(), **adapters)


def config_for(modality, **options):
    return small(**{modality: adapter_config(modality, **options)})


def unit(x):
    return F.layer_norm(x, x.shape[-1:])


def pictures(*shapes):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def test_t5_latents_are_its_encoders_states(checkpoints):
    model, words, schedule = create_qgfd_model("text", str(checkpoints["text"]), config_for("text"))
    assert isinstance(schedule, Diffusion) and schedule.config.num_train_timesteps == 1000
    assert model.config.text.vocab_size == 20 and model.config.text.pad_token_id == words.pad_token_id == 1
    batch = dict(words(["a b c q", "d e"], padding=True, return_tensors="pt"))
    states = T5EncoderModel.from_pretrained(checkpoints["text"]).eval()(batch["input_ids"], batch["attention_mask"])
    adapter = model.adapter()
    found = adapter.encode(batch)
    expected = unit(adapter.latent_proj(states.last_hidden_state))
    torch.testing.assert_close(found.tokens[found.mask], expected[found.mask], rtol=0, atol=1e-5)  # seen: 5e-7
    conditioned = {**batch, "condition_ids": batch["input_ids"], "condition_mask": batch["attention_mask"]}
    tokens, mask = adapter.eval().condition(conditioned)
    assert tokens.shape == (2, 4, 16) and mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert len(words.batch_decode(model.sample(count=2, num_inference_steps=2)["input_ids"])) == 2


def test_vit_sees_what_its_own_processor_would_give_it(checkpoints):
    options = ImageAdapterConfig(image_size=8, hidden_size=16, num_heads=2)
    model, processor, _ = create_qgfd_model("image", checkpoints["image"].as_posix(), small(image=options))
    images = pictures((12, 10, 3), (8, 8, 3))
    batch = processor(images)
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and -1 <= batch["pixel_values"].min() < -0.7
    own = AutoImageProcessor.from_pretrained(checkpoints["image"])(images, return_tensors="pt")
    assert (own["pixel_values"] - batch["pixel_values"]).abs().max() > 0.5
    states = ViTModel.from_pretrained(checkpoints["image"]).eval()(**own).last_hidden_state[:, 1:]  # without CLS
    adapter = model.adapter()
    found, expected = adapter.encode(batch).tokens, unit(adapter.latent_proj(states))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # seen: 2e-7
    # the model keeps the normalisation that it was made with
    assert model.config.image.image_mean == (0.4, 0.5, 0.6) and model.config.image.backbone_config["hidden_size"] == 14


def test_grey_images_of_another_size_reach_a_vit(checkpoints):
    model, processor, _ = create_qgfd_model("image", str(checkpoints["image"]), config_for("image"))
    batch = processor(pictures((28, 28)))
    assert batch["pixel_values"].shape == (1, 1, 7, 9) and torch.isfinite(model(batch)).all()
    assert model.sample(count=1, num_inference_steps=2)["pixel_values"].shape == (1, 1, 7, 9)


def test_wav2vec2_gets_what_its_own_extractor_would_give_it(checkpoints):
    model, processor, _ = create_qgfd_model("audio", str(checkpoints["audio"]), config_for("audio"))
    assert model.config.audio.sampling_rate == 8000 and model.config.audio.normalise
    wave = np.random.default_rng(0).normal(0, 0.1, 36).astype(np.float32)
    batch = processor([wave], sampling_rate=8000)
    with pytest.warns(UserWarning, match="audio of 4000 Hz is resampled to the model's 8000 Hz"):
        assert processor([wave], sampling_rate=4000)["input_values"].shape == (1, 72)
    torch.testing.assert_close(batch["input_values"][0], torch.from_numpy(wave))  # waveforms stay as they are
    own = AutoFeatureExtractor.from_pretrained(checkpoints["audio"])(wave, sampling_rate=8000, return_tensors="pt")
    # 36 samples are five hops of 8; the last frame's field of 20 ends 16 samples later
    padded = F.pad(own["input_values"], (0, 16))
    states = Wav2Vec2Model.from_pretrained(checkpoints["audio"]).eval()(padded).last_hidden_state
    adapter = model.adapter()
    found = adapter.encode({"input_values": batch["input_values"]}).tokens
    torch.testing.assert_close(found, unit(adapter.latent_proj(states)), rtol=0, atol=1e-4)  # seen: 6e-7


def test_videos_go_through_a_vit_frame_by_frame(checkpoints):
    model, processor, _ = create_qgfd_model("video", str(checkpoints["video"]), config_for("video"))
    batch = processor([pictures((16, 16, 3), (16, 16, 3)), pictures((9, 9, 3), (9, 9, 3))])
    assert batch["pixel_values"].shape == (2, 2, 3, 8, 8)
    whole = model.adapter().encode(batch)
    frame = model.adapter().encode({"pixel_values": batch["pixel_values"][:, 1:]})
    torch.testing.assert_close(whole.tokens[:, 4:], frame.tokens, rtol=0, atol=1e-5)  # seen: 0
    assert whole.position_ids[4].tolist() == [1, 0, 0] and whole.position_ids[-1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("modality", MODALITIES)
def test_without_a_backbone_our_own_processors_serve(modality):
    given = {"text": tokenizer(), "tabular": TableSchema.fit(TABLE)}.get(modality)
    model, processor, schedule = create_qgfd_model(modality, None, config_for(modality), processor=given)
    assert isinstance(model, QGFDModel) and schedule is model.diffusion and list(model.adapters) == [modality]
    batch = {
        "text": lambda: dict(processor(["a b", "c d"], return_tensors="pt", return_token_type_ids=False)),
        "image": lambda: processor(pictures((28, 28), (9, 7, 3))),
        "audio": lambda: processor([np.zeros(30), np.zeros((22, 2), dtype=np.int16)]),
        "video": lambda: processor([pictures((9, 9), (9, 9))] * 2),
        "tabular": lambda: processor({name: values[:2] for name, values in TABLE.items()}),
    }[modality]()
    assert model(batch).shape == (2,) and torch.isfinite(model(batch)).all()


def test_several_modalities_share_one_backbone(checkpoints):
    config = small(image=adapter_config("image"), audio=adapter_config("audio"))
    before = copy.deepcopy(config)
    model, processors, _ = create_qgfd_model(
        ["text", "image"], {"image": str(checkpoints["image"])}, config, processor={"text": tokenizer()}
    )
    assert config == before  # it is not changed
    assert set(model.adapters) == set(processors) == {"text", "image"}
    assert model.adapters["image"].backbone is not None and model.adapters["text"].backbone is None
    with pytest.raises(ValueError, match="backbone_name: got 'x'; with several modalities a dict by name"):
        create_qgfd_model(["text", "image"], "x")


def test_a_tokenizer_may_be_named(checkpoints):
    config = small(text=TextAdapterConfig(tokenizer=str(checkpoints["text"]), hidden_size=16, num_heads=2))
    model, words, _ = create_qgfd_model("text", None, config)
    assert model.config.text.vocab_size == len(words) == 20 and model.adapter().backbone is None


def one_line(error, match, call):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_names_are_one_line(checkpoints, tmp_path):
    five = "text, image, audio, video, tabular"
    one_line(ValueError, f"modality: got 'smell'; expected one of {five}", lambda: create_qgfd_model("smell"))
    one_line(ValueError, f"modality: got none; expected one or more of {five}", lambda: create_qgfd_model([]))
    for modality, other, kind, known in (
        ("image", "text", "t5", "vit, deit"),
        ("text", "image", "vit", "t5"),
        ("audio", "image", "vit", "wav2vec2, hubert"),
        ("video", "audio", "wav2vec2", "vit, deit"),
    ):
        match = f"got .*, a model of type '{kind}'; modality '{modality}' takes one of .*{known}"
        one_line(ValueError, match, lambda m=modality, o=other: create_qgfd_model(m, str(checkpoints[o])))
    one_line(ValueError, "'tabular' has no Hugging Face encoder", lambda: create_qgfd_model("tabular", "t5-small"))
    one_line(
        ValueError,
        "processor: got None for text without a backbone; pass a tokenizer",
        lambda: create_qgfd_model("text"),
    )
    one_line(ValueError, r"processor: got None for a table .*TableSchema.fit", lambda: create_qgfd_model("tabular"))
    one_line(FileNotFoundError, "got '/no/such', which is not a folder", lambda: create_qgfd_model("image", "/no/such"))
    one_line(
        TypeError,
        "got a QGFDConfig; expected a QGFDModelConfig",
        lambda: create_qgfd_model("image", None, QGFDConfig()),
    )
    other_rate = config_for("audio", sampling_rate=4000)
    one_line(
        ValueError,
        "got 4000; the encoder .* expects 8000 Hz audio",
        lambda: create_qgfd_model("audio", str(checkpoints["audio"]), other_rate),
    )
    words = tmp_path / "t5_without_words"
    T5EncoderModel.from_pretrained(checkpoints["text"]).save_pretrained(words)
    one_line(
        FileNotFoundError, "has no tokenizer; expected a folder with one", lambda: create_qgfd_model("text", str(words))
    )
    one_line(FileNotFoundError, "cannot be loaded", lambda: create_qgfd_model("image", str(tmp_path)))
    colours = small(image=ImageAdapterConfig(channels=2))
    one_line(ValueError, "channels: got 2; expected 1 .grey. or 3 .RGB.", lambda: create_qgfd_model(
        "image", str(checkpoints["image"]), colours))  # fmt: skip
    one_line(ValueError, "decoder: got 'nearest' with a Hugging Face encoder", lambda: create_qgfd_model(
        "text", str(checkpoints["text"]), small(text=TextAdapterConfig(decoder="nearest"))))  # fmt: skip


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    content = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    one_line(FileNotFoundError, "cannot be loaded", lambda: create_qgfd_model("image", str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "modality, options",
    [
        ("text", dict(vocab_size=0)), ("text", dict(decoder="beam")), ("text", dict(pad_token_id=-1)),
        ("image", dict(patch_size=0)), ("image", dict(image_size=(4, 0))), ("audio", dict(strides=())),
        ("audio", dict(sampling_rate=0)), ("video", dict(num_frames=0)), ("tabular", dict(category_sizes=(3, 0))),
        ("image", dict(condition_dropout=1.5)), ("image", dict(reconstruction_noise=-1.0)),
        ("image", dict(num_classes=0)),
    ],
)  # fmt: skip
def test_bad_configurations_are_one_line(modality, options):
    name = next(iter(options))
    one_line(ValueError, rf"AdapterConfig\.{name}: got .*; expected", lambda: ADAPTERS[modality][0](**options))


@pytest.mark.parametrize("names", [("age", "height"), ("city",), ("age", "height", "city")])
def test_samples_of_a_table_are_turned_back(names):
    """Tables of numbers alone, of categories alone, and of both: the schema gives batches and takes samples."""
    table = {name: TABLE[name] for name in names}
    config = config_for("tabular", num_numbers=9, category_sizes=(9,))  # replaced by the table's
    model, schema, _ = create_qgfd_model("tabular", None, config, processor=TableSchema.fit(table))
    assert model.config.tabular.num_numbers == len(set(names) - {"city"})
    assert model.config.tabular.category_sizes == ((3,) if "city" in names else ())
    batch = schema(table)
    assert batch["numbers"].shape[1] + batch["categories"].shape[1] == len(names)
    assert torch.isfinite(model(batch)).all()
    drawn = schema.decode(**model.eval().sample(count=3, num_inference_steps=2))
    assert list(drawn) == list(names) and all(len(values) == 3 for values in drawn.values())


def test_audio_of_another_rate_is_resampled_and_said_so():
    processor = AudioProcessor(8000)
    tone = np.sin(2 * np.pi * 500 * np.arange(4410) / 44100)
    with pytest.warns(UserWarning, match="audio of 44100 Hz is resampled to the model's 8000 Hz"):
        batch = processor([tone], sampling_rate=44100)
    wave = batch["input_values"][0]
    assert wave.shape == (800,)
    expected = torch.sin(2 * math.pi * 500 * torch.arange(800) / 8000)
    torch.testing.assert_close(wave[80:-80], expected[80:-80], rtol=0, atol=5e-3)  # seen: 1e-3, the filter's ripple
    mixed = processor([np.ones(4), np.full((2, 2), 16384, dtype=np.int16)])
    assert mixed["attention_mask"].tolist() == [[1] * 4, [1, 1, 0, 0]]
    assert mixed["input_values"][1].tolist() == [0.5, 0.5, 0, 0]
    batch = processor([np.zeros(0), tone], sampling_rate=44100)
    assert batch["input_values"].shape == (2, 800) and batch["attention_mask"].sum(1).tolist() == [0, 800]
    one_line(ValueError, "waves: got torch.int64", lambda: processor([np.arange(4)]))
    one_line(ValueError, "waves: got values that are not finite", lambda: processor([np.array([0.0, np.nan])]))
    one_line(ValueError, "sampling_rate: got 0", lambda: processor([np.zeros(3)], sampling_rate=0))


def test_without_scipy_audio_of_another_rate_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    processor = AudioProcessor(8000)
    assert processor([np.ones(4)])["input_values"].tolist() == [[1.0] * 4]
    with pytest.warns(UserWarning), pytest.raises(ModuleNotFoundError, match=r"scipy: pip install 'fastdiff-kernels"):
        processor([np.ones(4)], sampling_rate=16000)


def test_frames_of_different_sizes_are_refused():
    processor = VideoProcessor((8, 8), 1)
    one_line(ValueError, "videos: got frames of 9 x 7, 10 x 7 pixels in one video; expected one",
             lambda: processor([pictures((7, 9), (7, 10))]))  # fmt: skip
    one_line(ValueError, r"videos: got \[1, 2\] frames; expected one number in a batch",
             lambda: processor([pictures((7, 9), (7, 9)), pictures((7, 9))]))  # fmt: skip
    one_line(ValueError, "videos: got one without frames", lambda: processor([[]]))
    one_line(ValueError, r"images: got one ndarray of shape \[4, 4\]; expected a list of images",
             lambda: ImageProcessor((8, 8), 1)(np.zeros((4, 4), dtype=np.uint8)))  # fmt: skip
    one_line(ValueError, "images: got none; expected 1 or more", lambda: ImageProcessor((8, 8), 1)([]))
    one_line(ValueError, r"waves: got one Tensor of shape \[5\]", lambda: AudioProcessor(8)(torch.zeros(5)))
    one_line(ValueError, "images: got float64", lambda: ImageProcessor((8, 8), 1)([np.zeros((4, 4))]))
    one_line(ValueError, "channels: got 2; expected 1", lambda: ImageProcessor((8, 8), 2))
    white = ImageProcessor((2, 2), 3)([np.full((5, 5), 255, dtype=np.uint8)])["pixel_values"]
    assert torch.equal(white, torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("options", [{}, {"decoder": "head"}])
def test_ids_without_text_are_never_decoded_to(options):
    words = with_holes()  # 7 tokens in a vocabulary of 41
    model, _, _ = create_qgfd_model("text", None, small(text=TextAdapterConfig(**options)), processor=words)
    adapter = model.adapters["text"]
    assert adapter.config.vocab_size == 41 and len(adapter.config.silent_token_ids) == 41 - 7
    ids = adapter.decode(torch.randn(4, 50, adapter.latent_dim))["input_ids"]
    assert set(ids.flatten().tolist()) <= set(words.get_vocab().values())
