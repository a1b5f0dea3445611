"""A kind is a folder and one line; everything that a user does with a run goes through its kind."""

import json

import pytest
import yaml

import fastdiff
from fastdiff import evaluate, generate, sample, train

TOY = {
    "task": "toy",
    "training": {"max_steps": 60, "batch_size": 64, "learning_rate": 0.3, "ema_decay": 0.5, "warmup_steps": 0,
                 "device": "cpu", "mixed_precision": "no"},
}  # fmt: skip


@pytest.fixture
def run(toy, tmp_path):
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(yaml.safe_dump(TOY))
    train.main(["--training.output_dir", str(tmp_path / "run"), f"--recipe={recipe}", "--data.mean", "5"])
    return tmp_path / "run"


def fails(main, arguments, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(each) for each in arguments])
    text = capsys.readouterr().err
    assert error.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_a_kind_of_ones_own_is_trained_sampled_evaluated_and_loaded(run, capsys):
    capsys.readouterr()
    sample.main([str(run), "--count", "4"])
    assert len(json.loads(capsys.readouterr().out)) == 4
    evaluate.main([str(run)])
    assert json.loads((run / "evaluation.json").read_text())["error"] < 1  # of a mean of 5, from a start at 0
    loaded = fastdiff.load(run)
    assert loaded.kind == "toy" and loaded.step == 60 and loaded.recipe.data.mean == 5
    assert loaded.sample(2).shape == (2,)
    loaded.save_pretrained(run.parent / "saved")
    again = fastdiff.load(run.parent / "saved")
    assert again.kind == "toy" and again.model.mean.item() == loaded.model.mean.item()
    assert "a bell curve over numbers" in (run.parent / "saved" / "README.md").read_text()
    assert fastdiff.load(run / "checkpoints" / "step_60", weights="model").model.mean.item() != loaded.model.mean.item()


def test_help_lists_what_fits_the_run_and_nothing_else(run, capsys):
    for main, own, other in ((sample, "--count", "--labels"), (evaluate, "--output", "--num-pairs")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main.main([str(run), "--help"])
        text = capsys.readouterr().out
        assert own in text and other not in text and "--weights" in text
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    assert "a bell curve over numbers" in " ".join(
        capsys.readouterr().out.split()
    )  # which kinds there are, where no run is named


def test_what_a_kind_cannot_do_is_one_line(run, capsys):
    assert "bell curve" in (text := fails(generate.main, [run], capsys)) and "use fastdiff.sample" in text
    assert "--counts" in fails(sample.main, [run, "--counts", 3], capsys)
    with pytest.raises(TypeError, match=r"generate: got a run of toy.*use \.sample"):
        fastdiff.load(run).generate("x")


def test_bad_names_are_one_line(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "did you mean dit_mnist" in fails(train.main, ["dit_mnst"], capsys)
    assert "got a.yaml and b.yaml" in fails(train.main, ["a.yaml", "--recipe", "b.yaml"], capsys)
    assert "no recipe given" in fails(train.main, ["--training.max_steps", "3"], capsys)
    assert "no run given" in fails(sample.main, [], capsys)
    (tmp_path / "empty").mkdir()
    assert "no config.yaml and no config.json" in fails(sample.main, [tmp_path / "empty"], capsys)
    assert "no such folder" in fails(evaluate.main, [tmp_path / "gone" / "x" / "y"], capsys)
    assert "could not be downloaded from the Hugging Face Hub" in fails(sample.main, ["nobody/nothing"], capsys)
    (tmp_path / "empty" / "config.json").write_text('{"_class_name": "UNet"}')
    assert "_class_name: got 'UNet'; expected one of DiT" in fails(sample.main, [tmp_path / "empty"], capsys)
    other = tmp_path / "other.yaml"
    other.write_text("task: cooking")
    assert "task: got 'cooking'; expected one of dit" in fails(train.main, [other], capsys)
    for path in ("", None, 3):
        with pytest.raises(ValueError, match="path: got"):
            fastdiff.load(path)
    with pytest.raises(ValueError, match="weights: got 'best'"):
        fastdiff.load(tmp_path, weights="best")


def test_a_kind_of_ones_own_gets_the_checks_of_data_and_files(run, toy, tmp_path, monkeypatch, capsys):
    from toy_kind.task import ToyTask

    class Numbers:
        def __init__(self, name):
            self.name = name

        def record(self):
            return {"fingerprint": self.name, "class_names": [self.name]}

    arguments = ["--training.output_dir", str(run), str(tmp_path / "toy.yaml"), "--data.mean", "5"]
    arguments += ["--training.resume", "true", "--training.schedule", "cosine", "--training.max_steps"]
    monkeypatch.setattr(ToyTask, "data_sets", lambda self: {"data": Numbers("a")})
    train.main([*arguments, "61"])
    monkeypatch.setattr(ToyTask, "data_sets", lambda self: {"data": Numbers("b")})
    assert "data: got other data" in (text := last_line(train.main, [*arguments, "62"], capsys))
    assert "class 'a' gone, class 'b' new" in text
    with pytest.raises(ValueError, match="pass --accept-changed-data"):
        fastdiff.load(run).check_data({"data": Numbers("b")})
    weights = run / "checkpoints" / "step_61" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert "ema.safetensors was changed after it was written" in fails(sample.main, [run], capsys)


def last_line(main, arguments, capsys) -> str:
    with pytest.raises(SystemExit):
        main(arguments)
    return capsys.readouterr().err.strip().splitlines()[-1]
