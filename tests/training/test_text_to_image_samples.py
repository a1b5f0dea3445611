"""Images of text_to_image runs: of prompts and classes, in grids and in the pictures of a file's entries."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from text_to_image_runs import refused

import fastdiff
from fastdiff import sample, visualization


def test_no_text_is_the_null_label(q_former_run):
    """Guidance of a frozen DiT by a text that says nothing is guidance from its own null label."""
    run = fastdiff.load(q_former_run)
    labels, time, x = torch.full((2,), 10), torch.tensor([300.0, 700.0]), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        null = run.model(x, time, condition=run.model.null_condition(2))
        torch.testing.assert_close(null, run.model.dit(x, time, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["q_former_run", "cross_run"])
def test_images_of_prompts(name, request, tmp_path):
    path = request.getfixturevalue(name)
    run = fastdiff.load(path)
    three, again = run.sample("3", seed=5), run.sample(["3", "7"], seed=5)
    assert three[0].size == (8, 8) and three[0].mode == "L" and len(again) == 2
    assert np.abs(np.asarray(three[0], int) - np.asarray(again[0], int)).max() <= 1
    tensors = run.sample(["3", "7"], num_images_per_prompt=2, seed=5, output_type="pt")
    assert tensors.shape == (4, 1, 8, 8)
    # image i has the seed of the call plus i: the second prompt begins with the third
    later = run.sample(["7", "7"], seed=7, output_type="pt")
    torch.testing.assert_close(tensors[2:], later, rtol=1e-4, atol=1e-4)
    run.save_pretrained(tmp_path / "saved")
    saved = fastdiff.load(tmp_path / "saved")
    assert saved.kind == "text_to_image" and saved.recipe is None and saved.class_names == run.class_names
    assert torch.equal(saved.sample(["3", "7"], num_images_per_prompt=2, seed=5, output_type="pt"), tensors)
    assert "run.sample([" in (tmp_path / "saved" / "README.md").read_text()


def test_classes_are_drawn_by_label_where_the_dit_was_frozen(q_former_run, cross_run, dit_run):
    run, dit = fastdiff.load(q_former_run), fastdiff.load(dit_run)
    drawn = run.sample(classes=[3, "7"], seed=2, output_type="pt")
    theirs = dit.sample([3, 7], seed=2, guidance_scale=2.0, output_type="pt")
    torch.testing.assert_close(drawn, theirs, rtol=1e-5, atol=1e-5)
    cross = fastdiff.load(cross_run)
    assert torch.equal(
        cross.sample(classes=[3], seed=2, output_type="pt"), cross.sample(["3"], seed=2, output_type="pt")
    )


def test_another_text_encoder_of_that_name_is_refused(cross_run, tmp_path):
    run = tmp_path / "saved"
    fastdiff.load(cross_run).save_pretrained(run)
    config = json.loads((run / "config.json").read_text())
    config["text_encoder"]["fingerprint"] = "0" * 64
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="text_encoder: got 'one_hot' with the fingerprint .* was trained with 00000"):
        fastdiff.load(run).sample("3")


# ------------------------------------------------------------------------------------------------ commands


def paths(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_a_grid_of_prompts(q_former_run, tmp_path, capsys):
    capsys.readouterr()
    sample.main([str(q_former_run)])  # the run's own prompts
    (grid,) = paths(capsys)
    assert grid == str(q_former_run / "samples-seed-0.png") and Image.open(grid).format == "PNG"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("3\n\n7\n")
    output = tmp_path / "grid.png"
    given = ["--prompt", "1", "--prompt-file", str(prompts), "--images-per-prompt", "2", "--animate"]
    given += ["--guidance-scale", "1", "--num-inference-steps", "3", "--output", str(output)]
    sample.main([str(q_former_run), *given])
    assert paths(capsys) == [str(output), str(output.with_suffix(".gif"))]
    assert Image.open(output.with_suffix(".gif")).n_frames == 3
    sample.main([str(q_former_run), "--classes", "3,7", "--output", str(output)])
    assert paths(capsys) == [str(output)]


ENTRIES = """
entries:
  - {name: grid, prompts: ["3"], images_per_prompt: 2, animate: true}
  - {name: classes, classes: [3], guidance_scale: 1}
  - {name: sides, classes: [3], prompts: ["7"]}
  - {name: guidance, prompts: ["3"], guidance_scale: [1, 2]}
  - {name: steps, prompts: ["3"], denoising_steps: 2, num_inference_steps: 4}
  - {name: levels, prompts: ["3"], noise_levels: [0, 0.5, 1]}
  - {name: checkpoints, prompts: ["3"], progression: true}
  - {name: read, prompts: ["3", "7"], attention_timesteps: [0.9, 0.5], attention_average: heads}
"""


@pytest.mark.parametrize("name", ["q_former_run", "cross_run"])
def test_a_picture_for_each_entry(name, request, tmp_path, capsys):
    run, file = request.getfixturevalue(name), tmp_path / "study.yaml"
    file.write_text(ENTRIES)
    capsys.readouterr()
    sample.main([str(run), "--config", str(file)])
    folder = run / "study"
    names = ["grid.png", "grid.gif", "classes.png", "sides.png", "guidance.png", "steps.png", "levels.png"]
    names += ["checkpoints.png", "read.png"]
    of_maps = ["attention.png", "attention.npz"]  # a Q-Former reads a prompt once
    if name == "cross_run":
        of_maps = ["attention_t0.9.png", "attention_t0.5.png", "attention.npz", "tokens_t0.9.png", "tokens_t0.5.png"]
    names += [f"read_maps/{each}" for each in of_maps]
    lines = paths(capsys)
    assert [line for line in lines if " " not in line] == [str(folder / each) for each in names]
    assert any("the first token has" in line for line in lines)
    assert all(Image.open(folder / each).width > 100 for each in names if not each.endswith("npz"))
    arrays = np.load(folder / "read_maps" / "attention.npz")
    assert arrays["prompts"].tolist() == ["3", "7"] and arrays["prompt1_t0.5"].shape[-1] == len(arrays["prompt1_keys"])


@pytest.fixture
def grids(monkeypatch):
    """What is handed to captioned grids, in place of drawing them."""
    seen = []
    monkeypatch.setattr(
        visualization, "save_captioned_grid", lambda *given, **options: seen.append((given, options)) or given[2]
    )
    return seen


@pytest.mark.parametrize("name", ["q_former_run", "cross_run"])
def test_classes_beside_their_prompts(name, request, grids, tmp_path, capsys):
    """A row for each class: at the left by label, at the right by prompt, from the same seeds."""
    path, file = request.getfixturevalue(name), tmp_path / "study.yaml"
    file.write_text("entries: [{name: a, classes: [3, '7'], prompts: ['7', '0'], images_per_prompt: 2, seed: 4}]")
    capsys.readouterr()
    sample.main([str(path), "--config", str(file), "--output", str(tmp_path / "elsewhere")])
    assert paths(capsys) == [str(tmp_path / "elsewhere" / "a.png")]
    ((images, captions, _), options) = grids[0]
    assert captions == ["3", "7", "7", "0"]
    assert options["headings"] == ("by label" if name == "q_former_run" else "by class name", "by prompt")
    cells = images.view(2, 2, 2, 1, 8, 8)  # row, side, image
    drawn = {"num_images_per_prompt": 2, "seed": 4, "output_type": "pt"}
    run = fastdiff.load(path)
    for side, given in enumerate(({"classes": [3, 7]}, {"prompts": ["7", "0"]})):
        assert torch.equal(cells[:, side].flatten(0, 1), run.sample(**given, **drawn))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{name: a, prompts: ['3'], combinations: seen}",
            "got prompts and combinations; expected prompts, classes, both",
        ),
        ("{name: a}", "got none of them; expected prompts, classes, both of these side by side, or combinations"),
        ("{name: a, prompts: ['3', '7'], classes: [3]}", "prompts: got 2 beside 1 classes; expected one a class"),
        ("{name: a, prompts: ['3'], classes: [3], animate: true}", "animate: got it with prompts beside classes"),
        (
            "{name: a, combinations: both, guidance_scale: [1, 2]}",
            "got combinations: both and guidance_scale (several)",
        ),
        ("{name: a, combinations: both}", "combinations: got 'both'; the run's data digits has none"),
        ("{prompts: ['3']}", "name: got none"),
        ("{name: a/b, prompts: ['3']}", "name: got 'a/b'; expected letters"),
        ("{name: a, prompts: []}", "prompts: got []; expected a list of texts"),
        ("{name: a, prompts: ['3'], guidance: 3}", "there is no field 'guidance'; did you mean guidance_scale?"),
        ("{name: a, prompts: ['x']}", "'x'"),
        ("{name: a, classes: [11]}", "labels: got 11"),
        ("{name: a, prompts: ['3'], noise_levels: [2]}", "noise_levels: got [2]; expected a list of numbers from 0"),
        ("{name: a, prompts: ['3'], progression: true, denoising_steps: 2}", "got denoising_steps and progression"),
        ("{name: a, prompts: ['3'], sampler: ddim}", "sampler: got 'ddim'"),
        ("{name: a, classes: [3], attention_timesteps: [0.5]}", "attention_timesteps: got it with classes"),
        (
            "{name: a, prompts: ['3'], attention_timesteps: [500]}",
            "attention_timesteps: got 500; expected a noise time",
        ),
        ("{name: a, combinations: unseen}", "combinations: got 'unseen'; the run's data digits has none"),
        ("[]", "expected fields"),
    ],
)
def test_entries_that_cannot_be_drawn(q_former_run, tmp_path, capsys, entry, message):
    file = tmp_path / "study.yaml"
    file.write_text(f"entries:\n  - {{name: fine, prompts: ['3']}}\n  - {entry}\n")
    text = refused(sample, [q_former_run, "--config", file], capsys)
    assert f"{file}: entry 2" in text and message in text
    assert not (q_former_run / "study" / "fine.png").exists()  # nothing is drawn before all is known to fit


def test_commands_that_cannot_be_run(q_former_run, cross_run, tmp_path, capsys):
    assert "--classes: got it beside --prompt" in refused(
        sample, [q_former_run, "--prompt", "3", "--classes", "3"], capsys
    )
    assert "--config: got it beside --prompt" in refused(
        sample, [q_former_run, "--prompt", "3", "--config", "llm2dit"], capsys
    )
    assert "with fastdiff: llm2dit" in refused(sample, [q_former_run, "--config", "llm2dti"], capsys)
    (tmp_path / "none.yaml").write_text("pictures: []")
    assert "expected the one key entries" in refused(sample, [q_former_run, "--config", tmp_path / "none.yaml"], capsys)
    run = fastdiff.load(cross_run)
    for prompts, classes, got in ((None, None, "neither"), (["3"], ["3"], "both")):
        with pytest.raises(ValueError, match=f"prompts, classes: got {got}; expected one of them"):
            run.sample(prompts, classes=classes)
    with pytest.raises(ValueError, match="prompts: got none"):
        run.sample([])
    with pytest.raises(TypeError, match="prompts: got"):
        run.sample([3])
