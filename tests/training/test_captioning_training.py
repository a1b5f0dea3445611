"""Runs of task captioning: trained, resumed, asked for captions, evaluated; and what is refused before work begins."""

import json

import pytest
import torch
from captioning_runs import write_pictures, write_recipe, write_vit
from PIL import Image
from plain_captioning import generate as published_generate
from plain_captioning import loss as published_loss
from safetensors.torch import load_file

import fastdiff
from fastdiff import evaluate, generate, train
from fastdiff.generation import MaskedDiffusionGenerationConfig
from fastdiff.generation import generate as decode
from fastdiff.generation.canvas import Canvas
from fastdiff.generation.checks import condition_names
from fastdiff.kernels.common.philox import DRAW_ANCESTRAL, philox, uniform53
from fastdiff.models import MaskedDiffusionLM
from fastdiff.recipes import parse_recipe
from fastdiff.tasks.captioning import CaptioningRecipe, CaptioningTask
from fastdiff.tasks.captioning.decoding import Captioner
from fastdiff.training.randomness import generator

_TIMES, _MASKS = 3, 5  # what the task draws them from


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioning")
    write_vit(folder / "vit")
    write_pictures(folder / "pictures")
    return folder


@pytest.fixture(scope="module")
def run(root):
    train.main([str(write_recipe(root)), "--training.output_dir", str(root / "run")])
    return root / "run"


@pytest.fixture
def make_task(root):
    def make(**changes):
        return CaptioningTask(parse_recipe(CaptioningRecipe, [str(write_recipe(root, "other.yaml", **changes))]))

    return make


@pytest.fixture
def captions(run):
    """A loaded run whose answers depend on the image, and whose tokens differ from place to place."""
    loaded = fastdiff.load(run, device="cpu")
    return peaked(loaded)


def peaked(loaded):
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.normal_(std=0.4, generator=source)
    return loaded


@pytest.fixture(scope="module")
def pictures(root):
    return sorted((root / "pictures").glob("*.png"))


# ------------------------------------------------------------------------------------------------ training


def test_a_run_has_all_that_captions_need(run):
    checkpoint = run / "checkpoints" / "step_4"
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["_class_name"] == "ImageCaptioner" and config["cross_attention_dim"] == 16
    assert config["image_shape"] == [3, 24, 24] and config["length_format"] == "eos_fill"
    assert config["mask_schedule"] == "cosine" and config["vision"]["feature_dtype"] == "float16"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["data"]["data"]["examples"] == {"train": 8, "held_out": 4} and "vision" in state["data"]
    assert Image.open(run / "samples.png").size[0] > 100
    (line,) = (run / "validation.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["nats_per_token"] < 20
    assert fastdiff.load(run).decoding == {"max_new_tokens": 20, "num_inference_steps": 3}


def test_a_resumed_run_is_as_one_that_never_stopped(run, root):
    for steps, resume in ((2, "false"), (4, "true")):
        options = ["--training.max_steps", str(steps), "--training.resume", resume, "--training.schedule", "constant"]
        train.main([str(write_recipe(root)), "--training.output_dir", str(root / "resumed"), *options])
    options = ["--training.schedule", "constant"]
    train.main([str(write_recipe(root)), "--training.output_dir", str(root / "whole"), *options])
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        files = [load_file(root / folder / "checkpoints" / "step_4" / name) for folder in ("resumed", "whole")]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[1]), name


def test_batches_are_pure_and_of_parts(make_task):
    task = make_task()
    whole, again = task.batch(3, range(8)), make_task().batch(3, range(8))
    parts = [task.batch(3, range(3)), task.batch(3, range(3, 8))]
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name
    assert whole["encoder_hidden_states"].shape == (8, 17, 16)
    hidden = [
        not task.batch(step, range(8))["encoder_attention_mask"].any(1)[row] for step in range(20) for row in (0, 5)
    ]
    assert 2 <= sum(hidden) <= 20  # of 40, with probability 1/4
    assert len({tuple(task.sample_ids(step)) for step in range(5)}) == 5


def test_the_loss_is_the_published_one(make_task):
    task = make_task(objective={"condition_dropout_prob": 0.0}, captions={"length_format": "eos_only"})
    peaked_model = task.model.eval()
    torch.nn.init.normal_(peaked_model.model.layers[0].cross_attn.o_proj.weight, std=0.5)
    for step in range(4):
        batch = task.batch(step, range(8))
        clean = torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])
        t = task.process.sample_times(8, generator(0, step, _TIMES))
        uniform = torch.rand(clean.shape, dtype=torch.float64, generator=generator(0, step, _MASKS))
        real = (clean != task.model.config.mask_token_id) & (torch.arange(clean.shape[1]) > 0)
        expected, masked = published_loss(peaked_model, clean, real, t, uniform, batch["encoder_hidden_states"])
        assert torch.equal(masked, batch["labels"] >= 0)
        found = task.loss(peaked_model, batch) / task.weight(batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_hidden_image_is_no_image(make_task):
    task = make_task(objective={"condition_dropout_prob": 1.0})
    torch.nn.init.normal_(task.model.model.layers[0].cross_attn.o_proj.weight, std=0.5)
    batch = task.batch(0, range(8))
    assert not batch["encoder_attention_mask"].any()
    loss = task.loss(task.model, batch)
    loss.backward()
    gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    bare = {name: t for name, t in batch.items() if not name.startswith("encoder")}
    torch.testing.assert_close(loss, task.loss(task.model, bare))


@pytest.mark.parametrize("normalizer", ["all_tokens", "answer"])
def test_other_normalisers(make_task, normalizer):
    task = make_task(objective={"normalizer": normalizer, "fully_masked_fraction": 1.0, "condition_dropout_prob": 0.0})
    batch = task.batch(0, range(8))
    assert (batch["labels"] >= 0).sum() == 8 * 20  # all of each window, fill included
    assert task.weight(batch) == {"all_tokens": 160, "answer": 8}[normalizer]
    logits = task.model(batch["input_ids"], encoder_hidden_states=batch["encoder_hidden_states"]).logits
    logits[..., task.model.config.mask_token_id] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(task.loss(task.model, batch) / task.weight(batch), expected, rtol=1e-5, atol=1e-6)


def test_a_language_model_learns_to_look(make_task, language_run):
    task = make_task(model={"init_from": str(language_run)})
    before = fastdiff.load(language_run, device="cpu").model
    batch = task.batch(0, range(8))
    ids, states = batch["input_ids"], batch["encoder_hidden_states"]
    with torch.no_grad():
        found = task.model.eval()(ids, encoder_hidden_states=states).logits
        assert torch.equal(found, before(ids).logits)  # what attends to the image begins at zero
    task.loss(task.model, batch).backward()
    assert task.model.model.layers[0].cross_attn.o_proj.weight.grad.abs().max() > 0


def test_a_captioning_run_goes_on_as_another(make_task, run):
    task = make_task(model={"init_from": str(run)})
    weights = load_file(run / "checkpoints" / "step_4" / "ema.safetensors")
    state = task.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


# ------------------------------------------------------------------------------------------------ captions


def written(run, pictures, **options):
    options = {"temperature": 1.0, "seed": 3} | options
    return [[sample.tokens for sample in samples] for samples in run.generate(pictures, **options)]


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 5},
        {"guidance_scale": 2.0},
        {"num_inference_steps": None, "unmasking_rule": "threshold", "threshold": 0.3},
        {"length": "auto", "block_length": 4},
        {"block_length": 5, "dual_cache": True},
    ],
)
def test_a_caption_in_a_batch_is_what_it_is_alone(captions, pictures, options):
    chosen = pictures[:3]
    together = written(captions, chosen, num_samples=2, **options)
    assert len({tuple(tokens) for samples in together for tokens in samples}) == 6
    alone = [written(captions, [picture], num_samples=2, batch_size=1, **options)[0] for picture in chosen]
    assert together == alone
    assert written(captions, chosen[::-1], num_samples=2, batch_size=4, **options) == together[::-1]


def test_guidance_hides_the_image_and_keeps_the_beginning(captions, pictures):
    (states,) = captions.states(pictures[:1])
    start = torch.tensor([[captions.tokenizer.bos_token_id]])
    (found,) = written(captions, pictures[:1], temperature=0.0, guidance_scale=3.0, num_inference_steps=1)
    ids = torch.cat([start, torch.full((1, 20), captions.tokenizer.mask_token_id)], 1)
    with torch.no_grad():
        seen, hidden = captions.model(ids, encoder_hidden_states=states[None]).logits, captions.model(ids).logits
    logits = hidden + 3 * (seen - hidden)
    logits[..., captions.tokenizer.mask_token_id] = -torch.inf
    expected = logits[0, 1:].argmax(-1).tolist()
    ends = [i for i, token in enumerate(expected) if token == captions.tokenizer.eos_token_id]
    assert found[0] == expected[: ends[0] if ends else None]


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_captions_are_those_of_the_published_loop(captions, pictures, order):
    model, start = captions.model, captions.tokenizer.bos_token_id
    for states in captions.states(pictures[:4]):
        fields = dict(max_new_tokens=12, num_inference_steps=7, unmasking_schedule="cosine", seed=5)
        if order == "random":
            fields["unmasking_rule"] = "ancestral"
        config, ids = MaskedDiffusionGenerationConfig(**fields), torch.tensor([[start]])
        found = decode(model, ids, None, config, encoder_hidden_states=states[None]).sequences[0, 1:]
        uniform = None
        if order == "random":  # the numbers that our rule draws, one a position
            mask_id = model.config.mask_token_id
            names = Canvas(ids, None, 12, mask_id, 0, condition_names(None, None, states[None])).sequence_ids
            columns = torch.arange(13)
            words = philox(torch.tensor(5), names[:, None], columns, torch.zeros_like(columns), DRAW_ANCESTRAL)
            uniform = uniform53(words)[0]
        assert found.tolist() == published_generate(model, start, 12, 7, states[None], uniform=uniform).tolist()


def test_pictures_of_every_mode_and_size(captions, pictures, tmp_path):
    picture = Image.open(pictures[0]).convert("RGB")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    grey = picture.convert("L").resize((240, 200))
    given = [picture, tmp_path / "alpha.png", str(pictures[0]), palette, grey, grey.convert("RGB")]
    found = captions.generate(given, temperature=0.0)
    texts = [samples[0].text for samples in found]
    assert texts[0] == texts[1] == texts[2] == texts[3] and texts[4] == texts[5]
    assert [samples[0].prompt for samples in found][:3] == ["image 1", str(tmp_path / "alpha.png"), str(pictures[0])]
    assert captions.generate(picture, temperature=0.0)[0][0].text == texts[0]


def test_a_saved_folder_captions_as_the_run_does(run, pictures, tmp_path):
    loaded = fastdiff.load(run, device="cpu")
    peaked(loaded).save_pretrained(tmp_path / "saved")
    saved = fastdiff.load(tmp_path / "saved", device="cpu")
    assert saved.kind == "captioning" and saved.recipe is None
    assert written(saved, pictures[:2]) == written(loaded, pictures[:2])
    assert "run.generate" in (tmp_path / "saved" / "README.md").read_text()
    assert MaskedDiffusionLM.from_pretrained(tmp_path / "saved").config.cross_attention_dim == 16


def test_the_picture_of_samples(captions, make_task, tmp_path):
    task = make_task(sampling={"num_images": 3, "samples_per_image": 2})
    images, known, samples = task.samples(captions.model)
    assert images.shape == (3, 3, 24, 24) and images.dtype == torch.uint8 and len(samples) == 6
    assert all("square" in texts[0] for texts in known)
    assert all(len(sample.steps) == len(sample.pieces) for sample in samples)
    task.preview(captions.model, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").size[0] > 100


# ------------------------------------------------------------------------------------------------ commands


def test_the_command_captions_pictures(run, pictures, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    options = ["--num-samples", "2", "--temperature", "1", "--seed", "1", "--watch", "--output", str(output)]
    generate.main([str(run), "--image", str(pictures[0]), "--image", str(pictures[1]), *options])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["image"], line["sample"]) for line in lines] == [(str(p), n) for p in pictures[:2] for n in (0, 1)]
    expected = fastdiff.load(run, device="cpu").generate(pictures[:2], num_samples=2, temperature=1.0, seed=1)
    assert [line["text"] for line in lines] == [sample.text for samples in expected for sample in samples]
    printed = capsys.readouterr().out
    assert f"{pictures[0]}: " in printed and "forward passes; written to" in printed


def test_the_command_scores_held_out_pictures(run, capsys):
    evaluate.main([str(run), "--num-samples", "2", "--device", "cpu"])
    report = json.loads((run / "evaluation.json").read_text())
    assert report["captions"]["pictures"] == 4 and report["step"] == 4
    assert 0 <= report["captions"]["word_f1"] <= 1 and 0.2 < report["nearest image"]["word_f1"] <= 1
    assert 0 < report["diversity"]["distinct_captions"] <= 1
    assert "| commonest words |" in capsys.readouterr().out


WRONG_PICTURES = {
    "no file": (lambda tmp: str(tmp / "none.png"), "is not a file; expected a picture"),
    "no picture": (lambda tmp: str(write_text(tmp / "a.png")), "cannot be decoded as an image"),
    "an array": (lambda tmp: torch.zeros(3, 8, 8), "got a Tensor; expected paths or PIL images"),
}


def write_text(path):
    path.write_text("no picture")
    return path


@pytest.mark.parametrize("case", WRONG_PICTURES)
def test_what_is_no_picture_is_refused(captions, case, tmp_path):
    make, message = WRONG_PICTURES[case]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as caught:
        captions.generate([make(tmp_path)])
    assert "\n" not in str(caught.value)


def test_other_wrong_calls(captions, run, capsys):
    with pytest.raises(ValueError, match="images: got none"):
        captions.generate([])
    with pytest.raises(ValueError, match="temperature: got -1"):
        captions.generate(["x.png"], temperature=-1.0)
    with pytest.raises(ValueError, match="max_new_tokens is 40; expected at most 32"):
        captions.generate(["x.png"], max_new_tokens=40)
    with pytest.raises(SystemExit):
        generate.main([str(run)])
    assert "--image: got none; expected a picture" in capsys.readouterr().err


def test_another_encoder_is_noticed(run, root, pictures, tmp_path):
    loaded = fastdiff.load(run, device="cpu")
    changed = root / "vit" / "preprocessor_config.json"
    before = changed.read_text()
    changed.write_text(json.dumps(json.loads(before) | {"image_mean": [0.1, 0.5, 0.5]}))
    try:
        with pytest.raises(ValueError, match="it would see something else; bring the same weights"):
            loaded.generate([pictures[0]])
    finally:
        changed.write_text(before)


WRONG_RECIPES = {
    "num_encoder_layers": ({"model": {"num_encoder_layers": 1}}, "model.num_encoder_layers: got 1; expected 0"),
    "guidance": ({"objective": {"condition_dropout_prob": 0.0}, "sampling": {"generation": {"guidance_scale": 2.0}}},
                 "never learns to write without an image"),
    "flips": ({"data": {"horizontal_flip": True}}, "data.horizontal_flip: got True; the states of images are made"),
    "positions": ({"captions": {"max_length": 40}}, "model.max_position_embeddings: got 32; captions have up to 41"),
    "entries": ({"captions": {"entries": ["title"]}}, "entries: got title; expected of caption"),
    "weights": ({"captions": {"entry_weights": {"caption": 0.0}}}, "captions.entry_weights: got .* without a text"),
    "lengths": ({"captions": {"min_length": 30}}, "expected 1 <= min_length <= max_length"),
    "vision": ({"vision": {"name": "./nowhere"}}, "vision.name: got './nowhere', which is not a folder"),
    "probability": ({"objective": {"condition_dropout_prob": 2}}, "condition_dropout_prob: got 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_recipes_that_do_not_fit(make_task, case):
    changes, message = WRONG_RECIPES[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_task(**changes)


def test_a_captioner_needs_one_state_a_row(captions, pictures):
    captioner = Captioner(captions.model, captions.tokenizer, {"max_new_tokens": 4})
    with pytest.raises(ValueError, match="encoder_states: got 1; expected 2, one per prompt"):
        list(captioner.generator.generate(["", ""], [[1], [1]], encoder_states=captions.states(pictures[:1])))
