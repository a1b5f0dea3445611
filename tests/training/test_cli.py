"""The commands: recipes with overrides, samples, scores; errors are one line and exit code 2."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from fastdiff import evaluate, generate, sample, train
from fastdiff.recipes import load_recipe, parse_recipe
from fastdiff.tasks.dit.recipe import DiTRecipe
from fastdiff.tasks.dit.task import DiTTask
from fastdiff.tasks.kinds import recipe_kind
from fastdiff.tasks.masked_lm.recipe import MaskedLMRecipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("dit_*.yaml"))


def failure(command, arguments, capsys) -> str:
    """Runs a command that must fail for a reason of the user's: its one line."""
    with pytest.raises(SystemExit) as exit_:
        command.main([str(a) for a in arguments])
    text = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and text.startswith("error: ") and "\n" not in text
    return text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(path):
    recipe = parse_recipe(DiTRecipe, [str(path)])
    assert recipe.training.output_dir == f"runs/{path.stem}"
    assert recipe.model.num_classes == 10


def test_overrides_and_round_trip(tiny_yaml, tmp_path, digits):
    recipe = parse_recipe(
        DiTRecipe,
        [
            str(tiny_yaml),
            "--training.learning_rate",
            "1e-4",
            "--model.input_size",
            "[8, 8]",
            "--training.betas",
            "[0.8, 0.9]",
        ],
    )
    assert recipe.training.learning_rate == 1e-4 and recipe.training.betas == (0.8, 0.9)
    assert recipe.training.batch_size == 8  # from the file
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(DiTTask(recipe, digits).recipe()))
    assert parse_recipe(DiTRecipe, [str(path)]) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.max_stepz", "3"], r"max_stepz"),
        (["--training.max_step", "3"], r"[Uu]nrecognized arguments.*; did you mean --training.max_steps\?; --help"),
        (["--training.betas", "[1.5, 0.9]"], r"training.betas: got \[1.5, 0.9\]; expected two numbers"),
        (["--training.learning_rate", ".inf"], r"training.learning_rate: got inf; expected 0 or more"),
        (["--training.weight_decay", "-1"], r"training.weight_decay: got -1.0; expected 0 or more"),
        (
            ["--sampling.guidance_interval", "[2, 3]"],
            r"sampling.guidance_interval: got \(2.0, 3.0\); expected 0 <= low",
        ),
        (["--sampling.guidance_scale", ".nan"], r"sampling.guidance_scale: got nan; expected a finite"),
        (["--sampling.seed", str(2**64)], r"sampling.seed: got 18446744073709551616; expected at most 184"),
        (["--sampling.timesteps", "[3, 5]"], r"sampling.timesteps: got \[3, 5\]; expected at least one, in falling"),
        (["--sampling.timestep_spacing", "leading"], r"sampling.timestep_spacing: got 'leading' with sampler 'euler'"),
        (["--training.seed", str(2**64)], r"training.seed: got 18446744073709551616; expected at most 184"),
        (["--sampling.num_inference_steps", "0"], r"sampling.num_inference_steps: got 0; expected at least 1"),
        (["--model.norm_eps", "-1"], r"DiTConfig.norm_eps: got -1.0; expected a finite number"),
        (["--training.max_steps", "many"], r"training.max_steps: got many; expected a whole number;"),
        (["--training.max_steps", "1.5"], r"training.max_steps: got 1.5; expected a whole number;"),
        (["--training.max_steps"], r"--training.max_steps: got no value; expected one;"),
        (["--training.resume", "maybe"], r"training.resume: got maybe; expected true or false;"),
        (["--training.trackers", "5"], r"training.trackers: got 5; expected a list, as in \[a, b\];"),
        (["--sampling.sampler", "[1]"], r"sampling.sampler: got \[1\]; expected one of 'euler'.* or null;"),
        (["--model.input_size", "[a]"], r"model.input_size: got \['a'\]; expected a whole number or a tuple with 2"),
        (["--training.max_steps", "0"], r"training.max_steps: got 0; expected at least 1"),
        (
            ["--training.schedule", "sudden"],
            r"training.schedule: got sudden; expected one of 'cosine', 'constant', 'constant_then_linear';",
        ),
        (
            ["--model.num_classes", "3"],
            r"model.num_classes: got 3; the data set digits has 10; set --model.num_classes",
        ),
        (["--model.input_size", "16"], r"model.input_size: got 16; the data set digits has \(8, 8\)"),
        (["--sampling.sampler", "ddim"], r"sampling.sampler: got 'ddim' for .*expected one of euler"),
        (["--training.trackers", "[abacus]"], r"training.trackers: got 'abacus'; expected one of tensorboard"),
        (
            ["--training.resume", "true", "--training.overwrite", "true"],
            r"resume: got true, and training.overwrite too",
        ),
        (["--data.name", "image_folder"], r"data.folder: got none; image_folder needs"),
        (
            ["--data.name", "fashion_mnist", "--data.folder", "/nowhere"],
            r"not in /nowhere; run `apt install dataset-fash",
        ),
    ],
)
def test_bad_options(tiny_yaml, tmp_path, capsys, arguments, message):
    text = failure(train, [tiny_yaml, "--training.output_dir", tmp_path / "run", *arguments], capsys)
    assert re.search(message, text), text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {widht: 5}", r"bad.yaml: there is no field model.widht; --help lists the fields"),
        ("model: {hiden_size: 5}", r"no field model.hiden_size; did you mean model.hidden_size\?"),
        ("model.widht: 5", r"bad.yaml: there is no field model.widht"),
        ("training: 5", r"bad.yaml: training: got 5; expected fields below it"),
        ("training:", r"bad.yaml: training: got None; expected fields below it"),
        ("- 5", r"bad.yaml: got \[5\]; expected the sections task, model, diffusion"),
        ("training: {learning_rate: fast}", r"training.learning_rate: got fast; expected a number"),
        ("data: {name: digits}\ntraining: [5", r"bad.yaml, line [23], column \d+: not valid YAML"),
        ("modle: {depth: 2}", r"bad.yaml: there is no section 'modle'; expected task, model, diffusion"),
    ],
)
def test_bad_recipes(tmp_path, capsys, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert re.search(message, failure(train, [path], capsys))
    assert "recipe: got 'none.yaml'" in failure(train, ["none.yaml"], capsys)


LANGUAGE_MODEL = """
task: masked_lm
model: {size: tiny, hidden_size: 64}
data: {name: numbers, sample: pairs}
sampling: {prompts: ["12"], generation: {max_new_tokens: 8, temperature: 0.5}}
"""


def test_a_recipe_with_a_task(tmp_path, tiny_yaml):
    path = tmp_path / "words.yaml"
    path.write_text(LANGUAGE_MODEL)
    assert recipe_kind(path) == "masked_lm" and recipe_kind(tiny_yaml) == "dit"
    recipe = parse_recipe(MaskedLMRecipe, [str(path), "--sampling.generation.seed", "5"])
    assert recipe.task == "masked_lm" and recipe.model.hidden_size == 64
    assert recipe.sampling.generation == {"max_new_tokens": 8, "temperature": 0.5, "seed": 5}
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    assert load_recipe(MaskedLMRecipe, path) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: masked_ml", r"words.yaml: task: got 'masked_ml'; expected one of dit, masked_lm, length_head"),
        ("task: {masked_lm: 1}", r"words.yaml: task: got .*; expected one of dit, masked_lm, length_head"),
        ("task: [1", r"words.yaml, line \d, column \d+: not valid YAML"),
    ],
)
def test_unknown_tasks(tmp_path, content, message):
    path = tmp_path / "words.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        recipe_kind(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: {name: 1}", r"words.yaml: task has fields below it; expected one value, as in task: VALUE"),
        ("sampling: {generaton: {}}", r"no field sampling.generaton; did you mean sampling.generation\?"),
        ("sampling: {generation: {temprature: 1}}", r"temprature: masked diffusion decoding has no such option"),
        ("task: dit", r"words.yaml is not a recipe of this version: task: got dit; expected 'masked_lm'"),
    ],
)
def test_bad_recipes_of_language_models(tmp_path, content, message):
    path = tmp_path / "words.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(MaskedLMRecipe, path)


def help_of(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_has_a_line_for_every_field_of_the_recipe(capsys):
    text = help_of(["qgfd_image", "--help"], capsys)
    for line in (
        "--training.max_steps 3000 .* optimizer steps",
        "--image.condition_dropout 0.1 ",
        "--image_data.name mnist5k ",
        "--sampling.guidance_scale 1.5 ",
    ):
        assert re.search(line, text), line
    assert "--audio" not in text and "--text_data" not in text  # what the recipe has not
    fields = re.findall(r"^  --([\w.]+) ", text, re.MULTILINE)
    assert len(fields) == len(set(fields)) and len(text.splitlines()) < len(fields) + 30
    assert max(map(len, text.splitlines()[6:])) <= 120
    for name in fields:  # each is an option
        assert name.partition(".")[0] in {
            "backbone",
            "diffusion",
            "objective",
            "image",
            "image_data",
            "training",
            "sampling",
        }
    every = help_of(["dit_mnist", "--help-all"], capsys)
    assert "--training.max_steps MAX_STEPS" in every and "the run's folder" in every and "--data.folder" in every


@pytest.fixture
def run(make_trainer, tmp_path):
    make_trainer(tmp_path / "run", "--training.max_steps", 3, "--training.trackers", "[tensorboard]").train()
    return tmp_path / "run"


def test_a_run_leaves_its_files(run):
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "checkpoints",
        "metrics.jsonl",
        "loss.png",
        "samples.png",
    }
    assert {path.name for path in (run / "checkpoints" / "step_3").iterdir()} >= {
        "model.safetensors",
        "ema.safetensors",
        "config.json",
        "trainer_state.json",
    }


def test_progress_shows_the_moving_average_of_the_picture(make_trainer, tmp_path, capsys):
    from fastdiff.visualization.curves import moving_average

    make_trainer(tmp_path / "run", "--training.max_steps", 40, "--training.learning_rate", 0.01).train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = re.findall(r"loss (\d+\.\d+)", capsys.readouterr().err)
    assert float(shown[-1]) == pytest.approx(moving_average(losses, 0.98)[-1], abs=1e-4)


def test_tensorboard_has_the_losses(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in run.rglob("events.*") if path.parent.name == "fastdiff"}
    events = EventAccumulator(str(folder)).Reload()
    logged = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(logged)


def test_the_checkpoint_is_a_pretrained_model(run):
    import torch
    from safetensors.torch import load_file

    from fastdiff.models.dit import DiT

    folder = run / "checkpoints" / "step_3"
    model, stored = DiT.from_pretrained(folder), load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert model.config.class_dropout_prob == 0.2


def test_sample_command(run, capsys):
    sample.main([str(run), "--labels", "0,3,7", "--guidance-scale", "2", "--images-per-label", "2", "--seed", "5"])
    path = Path(capsys.readouterr().out.strip())
    assert path == run / "samples-seed-5.png" and path.read_bytes().startswith(b"\x89PNG")
    first = path.read_bytes()
    sample.main([str(run), "--labels", "0,3,7", "--guidance-scale", "2", "--images-per-label", "2", "--seed", "5"])
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    "bad", [["--training.betas", "[1.5, 0.9]"], ["--training.max_stepz", "3"], ["--training.batch_size", "0"]]
)
def test_overwrite_keeps_the_run_when_an_argument_is_bad(run, tiny_yaml, capsys, bad):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    failure(train, [tiny_yaml, "--training.output_dir", run, "--training.overwrite", "true", *bad], capsys)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_overwrite_keeps_the_run_when_the_optimizer_cannot_be_built(run, make_trainer, monkeypatch):
    import torch

    def refuse(*_, **__):
        raise ValueError("no such optimizer")

    monkeypatch.setattr(torch.optim, "AdamW", refuse)
    with pytest.raises(ValueError, match="no such optimizer"):
        make_trainer(run, "--training.overwrite", "true")
    assert (run / "checkpoints" / "step_3" / "model.safetensors").is_file() and (run / "metrics.jsonl").is_file()


def test_sample_command_refuses(run, tmp_path, capsys):
    assert "labels: got '10'; expected 0 to 9" in failure(sample, [run, "--labels", "0,10"], capsys)
    assert "no such folder" in failure(sample, [tmp_path / "nothing"], capsys)
    (tmp_path / "empty").mkdir()
    assert "no config.yaml and no config.json" in failure(sample, [tmp_path / "empty"], capsys)
    assert "expected one of euler" in failure(sample, [run, "--sampler", "ddim"], capsys)
    assert "guidance_scale: got nan" in failure(sample, [run, "--guidance-scale", ".nan"], capsys)
    assert "nrecognized" in failure(sample, [run, "--guidance-scal", "2"], capsys)
    assert "--guidance-scale: got much; expected a number;" in failure(
        sample, [run, "--guidance-scale", "much"], capsys
    )
    assert "--weights: got 'best'; expected one of 'ema', 'model'" in failure(
        sample, [run, "--weights", "best"], capsys
    )
    for arguments in ([run, "--labels", "1", "2"], ["--labels", "1", "2", run]):
        assert "arguments: 2; expected one value for an option, several with commas" in failure(
            sample, arguments, capsys
        )
    nope = failure(generate, ["--watch", tmp_path / "nope" / "x", "--prompt", "a"], capsys)
    assert f"error: {tmp_path / 'nope' / 'x'}: no such folder" in nope
    assert "nrecognized arguments: --num-pairs" in failure(evaluate, [run, "--num-pairs", "3"], capsys)
    assert "--num-samples: got 1; expected at least 2" in failure(evaluate, [run, "--num-samples", "1"], capsys)
    for device in ("foo", "cuda:99", "meta"):
        assert f"device: got '{device}'; expected cpu" in failure(sample, [run, "--device", device], capsys)


@pytest.mark.parametrize("command", [sample, evaluate])
def test_output_is_checked_before_work(run, tmp_path, capsys, monkeypatch, command):
    from fastdiff.tasks.dit.run import DiTRun

    monkeypatch.setattr(DiTRun, "draw", lambda *_, **__: pytest.fail("sampled before --output was checked"))
    assert "is a folder; expected the name of a file" in failure(command, [run, "--output", tmp_path], capsys)
    other = failure(command, [run, "--output", tmp_path / "x.txt"], capsys)
    assert f"is of another format; expected a name that ends in .{'png' if command is sample else 'json'}" in other
    missing = tmp_path / "no" / "x.png"
    assert "lies in a folder that does not exist" in failure(command, [run, "--output", missing], capsys)
    assert "cannot be written" in failure(command, [run, "--output", tmp_path / ("x" * 300)], capsys)


def test_errors_of_the_file_system_are_one_line(capsys):
    from fastdiff.commands import command

    @command
    def loop(argv=None):
        raise OSError(40, "Too many levels of symbolic links", "a/b")

    with pytest.raises(SystemExit) as exit_:
        loop([])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: a/b: Too many levels of symbolic links\n"


@pytest.mark.parametrize("max_steps", [3, 2])
def test_resume_of_a_finished_run_does_nothing(run, tiny_yaml, capsys, max_steps):
    def contents():
        names = ("config.yaml", "metrics.jsonl", "loss.png", "samples.png", "checkpoints/step_3/model.safetensors")
        return {name: (run / name).read_bytes() for name in names} | {
            name: (run / name).stat().st_mtime_ns for name in ("loss.png", "samples.png")
        }

    options = [tiny_yaml, "--training.output_dir", run, "--training.resume", "true", "--training.max_steps", max_steps]
    before = contents()
    capsys.readouterr()
    train.main([str(option) for option in options])
    assert f"already at step 3 (training.max_steps is {max_steps}), nothing to do" in capsys.readouterr().out
    assert {**contents(), "config.yaml": before["config.yaml"]} == before
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["max_steps"] == 3


def test_samples_are_drawn_in_the_precision_of_training(run, monkeypatch):
    import dataclasses

    import torch

    from fastdiff import device
    from fastdiff.tasks.dit.run import load_run

    loaded = load_run(run, device="cpu")
    images = {}
    for precision in ("no", "bf16", "auto"):
        with monkeypatch.context() as patch:
            patch.setattr(device, "computes_bf16", lambda device_type: True)
            images[precision] = dataclasses.replace(loaded, mixed_precision=precision).draw([0, 1], loaded.sampling)
    assert images["no"].dtype == images["bf16"].dtype == torch.float32
    assert torch.equal(images["bf16"], images["auto"]) and not torch.equal(images["bf16"], images["no"])
    torch.testing.assert_close(images["bf16"], images["no"], atol=0.1, rtol=0.1)


def test_evaluate_command(run, capsys):
    evaluate.main([str(run), "--num-samples", "30"])
    output = capsys.readouterr().out
    assert "Fréchet distance (classifier features)" in output and "FID" not in output
    report = json.loads((run / "evaluation.json").read_text())
    assert report["samples"]["images"] == 30 and report["held_out"]["images"] == 30
    assert set(report["samples"]["accuracy_by_class"]) == set("0123456789")
    assert report["held_out"]["frechet_distance"] < report["samples"]["frechet_distance"]  # 3 steps draw noise
    assert report["samples"]["nearest_neighbour_median"] > report["held_out"]["nearest_neighbour_median"]


def test_the_folder_of_a_run_may_begin_with_a_dash(tiny_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-run").mkdir()
    (tmp_path / "-run" / "config.yaml").write_text(tiny_yaml.read_text())
    assert load_recipe(DiTRecipe, Path("-run") / "config.yaml").model.depth == 2


def test_finished_samples_are_kept_when_drawing_is_stopped(run, monkeypatch, capsys):
    from fastdiff.tasks.dit import run as module
    from fastdiff.visualization import grids

    calls, titles, draw = [], [], module.sample_classes

    def stopped(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return draw(*arguments, **options)

    monkeypatch.setattr(module, "sample_classes", stopped)
    monkeypatch.setattr(grids, "_draw", lambda sheet, rows, size, path, title: titles.append((title, path)))
    with pytest.raises(SystemExit) as exit_:
        sample.main([str(run), "--images-per-label", "25"])  # 250: three batches
    assert exit_.value.code == 130 and len(calls) == 2
    assert titles[0][0].endswith(", 100 of 250 samples") and titles[0][1] == run / "samples-seed-0.png"


def test_writing_what_is_finished_takes_a_tenth_of_the_time_at_most(monkeypatch):
    from fastdiff.tasks import results

    clock, written = [0.0], []
    monkeypatch.setattr(results.time, "monotonic", lambda: clock[0])

    def write(drawn):
        written.append(drawn)
        clock[0] += 1  # as long as a batch

    keep = results.AsTheyCome(write)
    for drawn in range(30):
        clock[0] += 1
        keep(drawn)
    assert written == [0, 9, 18, 27]


def test_help_of_a_run_has_its_values_and_samplers(run, capsys):
    with pytest.raises(SystemExit):
        sample.main([str(run), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "1 means none (default: 1.5)" in text and "denoising steps (default: 2)" in text
    assert "(of this run euler, dpm-solver++, renoise; default: euler)" in text and "ddpm, ddim" not in text
