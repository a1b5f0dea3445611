"""What stops a run: each ends with one line, and the last whole checkpoint stays."""

import dataclasses
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from fastdiff.tasks.dit.run import load_run
from fastdiff.training import TrainingError, checkpoint
from fastdiff.training.schedule import learning_rate, rate_jump


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def steps_in(folder) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder / "checkpoints")]


def test_nan_loss_names_step_samples_and_checkpoint(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path / "run")
    batch = trainer.task.batch

    def poisoned(step, slots):
        inputs = batch(step, slots)
        if step == 7:
            inputs["x0"][2] = float("nan")
        return inputs

    trainer.task.batch = poisoned
    with pytest.raises(TrainingError) as error:
        trainer.train()
    text = one_line(error)
    assert "step 8: loss is nan" in text and str(trainer.task.sample_ids(7)) in text
    assert str(tmp_path / "run" / "checkpoints" / "step_5") in text
    assert steps_in(tmp_path / "run") == [5]
    assert torch.isfinite(next(load_run(tmp_path / "run").model.parameters())).all()


def test_infinite_gradient_stops_before_a_checkpoint(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path / "run", "--training.max_steps", 5)
    loss, bias = trainer.task.loss, trainer.task.model.final_layer.linear.bias
    trainer.task.loss = lambda model, batch: loss(model, batch) + bias.sqrt().sum()  # bias is 0
    with pytest.raises(TrainingError, match="step 1: gradient norm is (inf|nan).*no checkpoint yet"):
        trainer.train()


@pytest.mark.parametrize("where", ["fsync", "file size limit"])
def test_full_disk_leaves_the_last_checkpoint_whole(tmp_path, make_trainer, monkeypatch, where):
    make_trainer(tmp_path / "run", "--training.max_steps", 5).train()
    trainer = make_trainer(tmp_path / "run", "--training.resume", "true")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if where == "fsync":

            def full(descriptor):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "fsync", full)
        else:  # the weights no longer fit: what safetensors reports is an error of its own
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(TrainingError) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    text = one_line(error)
    assert "step 10 could not be written" in text and str(tmp_path / "run" / "checkpoints" / "step_5") in text
    assert ("No space left on device" if where == "fsync" else "File too large") in text
    assert steps_in(tmp_path / "run") == [5] and not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert make_trainer(tmp_path / "run", "--training.resume", "true").train().steps == 12


@pytest.mark.skipif(
    os.geteuid() != 0, reason="NOT TESTED: mounting a small disk needs root; a full one is simulated above"
)
def test_a_disk_that_is_really_full(tmp_path, tiny_yaml):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("NOT TESTED: no permission to mount a small file system; the full disk is simulated above")
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "fastdiff.train",
                tiny_yaml,
                "--training.output_dir",
                disk / "run",
                "--training.keep_last",
                "50",
                "--training.checkpoint_every",
                "1",
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and "No space left on device" in last
        kept = checkpoint.list_checkpoints(disk / "run" / "checkpoints")
        assert kept and str(kept[-1]) in last
        for path in kept:
            checkpoint.read_state(path)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_checkpoint_cut_short_is_named(tmp_path, make_trainer):
    make_trainer(tmp_path / "run").train()
    weights = tmp_path / "run" / "checkpoints" / "step_12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors has .*cut short; delete .*step_12") as error:
        make_trainer(tmp_path / "run", "--training.resume", "true")
    one_line(error)
    with pytest.raises(ValueError, match="cut short"):
        load_run(tmp_path / "run")
    assert load_run(tmp_path / "run" / "checkpoints" / "step_10").step == 10  # the one before it is still good


def test_a_checkpoint_of_another_model_is_refused(tmp_path, make_trainer):
    make_trainer(tmp_path / "run").train()
    config = tmp_path / "run" / "config.yaml"
    recipe = yaml.safe_load(config.read_text())
    recipe["model"]["hidden_size"] = 64
    config.write_text(yaml.safe_dump(recipe))
    with pytest.raises(
        ValueError, match="ema.safetensors: the weights are not those of the model of this recipe"
    ) as error:
        load_run(tmp_path / "run")
    one_line(error)


def test_a_folder_with_a_run_is_kept(tmp_path, make_trainer):
    make_trainer(tmp_path / "run", "--training.max_steps", 2).train()
    with pytest.raises(FileExistsError, match="holds a run already; pass --training.resume true"):
        make_trainer(tmp_path / "run")
    assert steps_in(tmp_path / "run") == [2]
    notes = tmp_path / "run" / "notes.txt"
    notes.write_text("mine")
    make_trainer(tmp_path / "run", "--training.overwrite", "true", "--training.max_steps", 3).train()
    assert steps_in(tmp_path / "run") == [3] and notes.exists()


def test_resume_with_another_recipe_is_refused(tmp_path, make_trainer):
    make_trainer(tmp_path / "run", "--training.max_steps", 2).train()
    with pytest.raises(ValueError, match="training.batch_size: got 4, but the run in .* was started with 8"):
        make_trainer(tmp_path / "run", "--training.resume", "true", "--training.batch_size", 4)


def test_unwritable_run_folder(tmp_path, make_trainer):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="training.output_dir: got .* is a file or lies in one"):
        make_trainer(tmp_path / "file" / "run")
    with pytest.raises(PermissionError, match="training.output_dir: got '/proc/run', which cannot be written"):
        make_trainer("/proc/run")


def test_batches_smaller_than_their_parts_are_refused(tmp_path, make_trainer):
    with pytest.raises(
        ValueError, match="training.batch_size: got 8; expected at least processes x accumulation_steps"
    ):
        make_trainer(tmp_path / "run", "--training.accumulation_steps", 9)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path, make_trainer):
    make_trainer(tmp_path / "run", "--training.checkpoint_every", 2, "--training.keep_last", 3).train()
    assert steps_in(tmp_path / "run") == [8, 10, 12]


def test_two_processes_on_one_folder(make_trainer, tiny_yaml, tmp_path):
    first = make_trainer(tmp_path / "run", "--training.max_steps", 2)
    command = [sys.executable, "-m", "fastdiff.train", str(tiny_yaml), "--training.output_dir", str(tmp_path / "run")]
    second = [*command, "--training.overwrite", "true"]
    done = subprocess.run(second, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "in which another process trains" in done.stderr, done.stderr
    first.train()  # unharmed; then the folder is free
    assert (tmp_path / "run" / "checkpoints" / "step_2").is_dir()
    done = subprocess.run([*command, "--training.resume", "true"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_while_a_checkpoint_is_written_leaves_nothing_half_written(tmp_path):
    def write(folder):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt  # as a second Ctrl-C raises it

    (tmp_path / "step_1").mkdir()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_checkpoint(tmp_path, 2, {}, write, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_overwrite_keeps_what_is_not_a_run(make_trainer, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("db: x\n")
    with pytest.raises(ValueError, match="config.yaml: got no recipe of a run"):
        make_trainer(folder, "--training.overwrite", "true")
    (folder / "config.yaml").unlink()
    (folder / "checkpoints" / "step_5").mkdir(parents=True)
    with pytest.raises(ValueError, match="step_5.* not a checkpoint of fastdiff.train"):
        make_trainer(folder, "--training.overwrite", "true")
    assert (folder / "checkpoints" / "step_5").is_dir()


def test_ctrl_c_ends_training_with_a_checkpoint_and_130(tiny_yaml, tmp_path, monkeypatch, capsys, batches_in_step):
    from fastdiff import train
    from fastdiff.tasks.dit.task import DiTTask

    whole = DiTTask.batch

    def stop(task, step, slots):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(task, step, slots)

    monkeypatch.setattr(DiTTask, "batch", stop)
    with pytest.raises(SystemExit) as exit_:
        train.main([str(tiny_yaml), "--training.output_dir", str(tmp_path / "run")])
    assert exit_.value.code == 130 and (tmp_path / "run" / "checkpoints" / "step_2").is_dir()
    assert "stopped by a signal after step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("checkpoints/step_3/optimizer.safetensors", b"junk", "optimizer.safetensors"),
        (
            "checkpoints/step_3/trainer_state.json",
            b'{"step": 3, "task": {}, "files": {}}',
            "not a whole trainer state",
        ),
        ("checkpoints/step_3/trainer_state.json", b'{"files": {"a": 1}}', "not a whole trainer state"),
        ("metrics.jsonl", b'{"loss": 1}', "metrics.jsonl, line 1: got .*expected the numbers of a step"),
        ("config.yaml", b"[1]", "config.yaml: got no recipe of a run"),
    ],
)
def test_resume_from_damaged_files_is_one_line(make_trainer, tmp_path, file, content, message):
    make_trainer(tmp_path / "run", "--training.max_steps", 3).train()
    path = tmp_path / "run" / file
    whole = path.read_bytes()
    path.write_bytes(content + bytes(max(0, len(whole) - len(content))) if path.suffix == ".safetensors" else content)
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(tmp_path / "run", "--training.max_steps", 4, "--training.resume", "true")
    one_line(error)


def test_overwrite_is_of_the_command_line_alone(make_trainer, tiny_yaml, tmp_path):
    from fastdiff.recipes import parse_recipe
    from fastdiff.tasks.dit.recipe import DiTRecipe

    make_trainer(tmp_path / "run", "--training.overwrite", "true", "--training.max_steps", 1).train()
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["training"]["overwrite"] is False  # who trains by this file again has not asked for it
    content = yaml.safe_load(tiny_yaml.read_text())
    content["training"]["overwrite"] = True
    tiny_yaml.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="tiny.yaml: training.overwrite: got true; expected it on the command line"):
        parse_recipe(DiTRecipe, [str(tiny_yaml)])
    assert parse_recipe(DiTRecipe, [str(tiny_yaml), "--training.overwrite", "true"]).training.overwrite


def test_overwrite_of_another_projects_folder_is_refused(make_trainer, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("training: {epochs: 3}\n")
    with pytest.raises(ValueError, match="mine/config.yaml' is not one that fastdiff.train wrote; nothing was deleted"):
        make_trainer(folder, "--training.overwrite", "true")
    (folder / "config.yaml").unlink()
    (folder / "metrics.jsonl").write_text("mine")
    for options in ([], ["--training.overwrite", "true"]):
        with pytest.raises(FileExistsError, match="holds metrics.jsonl but no run"):
            make_trainer(folder, *options)
    assert (folder / "metrics.jsonl").read_text() == "mine"


def test_a_run_whose_files_are_links_is_left_alone(make_trainer, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    make_trainer(other, "--training.max_steps", 1).train()
    shutil.copytree(other, run)
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    for name in ("checkpoints", "checkpoints/step_1", "metrics.jsonl", "config.yaml"):
        own, aside = run / name, tmp_path / "aside"
        own.rename(aside)
        own.symlink_to(other / name)
        for way in ("resume", "overwrite"):
            options = (f"--training.{way}", "true", "--training.max_steps", 9, "--training.checkpoint_every", 1)
            with pytest.raises(ValueError, match=f"training.output_dir: got .*run', whose {name} is a link to .*other"):
                make_trainer(run, *options)
        own.unlink()
        aside.rename(own)
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before
    (tmp_path / "link").symlink_to(other)  # a folder that is a link as a whole is a run's
    assert make_trainer(tmp_path / "link", "--training.resume", "true", "--training.max_steps", 2).train().steps == 2


def test_a_rate_that_jumps_is_said(make_trainer, tmp_path, capsys):
    make_trainer(tmp_path / "run", "--training.max_steps", 8).train()
    capsys.readouterr()
    trainer = make_trainer(tmp_path / "run", "--training.resume", "true", "--training.max_steps", 16)
    said = capsys.readouterr().err
    rate = f"{learning_rate(trainer.config, 8):.3g}"
    assert "training.max_steps: got 16, and the run was planned for 8" in said and f"to {rate} at step 9" in said
    trainer.folder.unlock()
    constant = dataclasses.replace(trainer.config, schedule="constant")
    assert rate_jump(constant, 8, 8) is None and rate_jump(trainer.config, 16, 8) is None


def test_a_second_ctrl_c_waits_for_the_checkpoint(tmp_path):
    """SIGINT's own action would leave a checkpoint that is not whole, SIGTERM's a half-written folder."""
    code = """
import os, signal, sys, time
from pathlib import Path
from fastdiff.training import checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)
def write(folder):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    (folder / "model.safetensors").write_bytes(b"whole")
checkpoint.write_checkpoint(Path(sys.argv[1]), 2, {"task": {}}, write, keep_last=1)
print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode != 0 and "not reached" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]
    assert checkpoint.read_state(tmp_path / "step_2")["step"] == 2
    checkpoint.check_files(tmp_path / "step_2", checkpoint.read_state(tmp_path / "step_2"))


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_training_goes_on(make_trainer, tmp_path, monkeypatch, capsys, method):
    from accelerate.tracking import TensorBoardTracker

    def fail(*_, **__):
        raise ConnectionError("the server has gone")

    monkeypatch.setattr(TensorBoardTracker, method, fail)
    options = ("--training.trackers", "[tensorboard]", "--training.max_steps", 4, "--training.log_every", 1)
    outcome = make_trainer(tmp_path / "run", *options).train()
    said = capsys.readouterr().err
    assert outcome.finished and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    assert said.count("the tracker tensorboard failed") == 1 and "ConnectionError: the server has gone" in said


@pytest.mark.parametrize("project", ["../../x", "/x", "..", "", "a\\b"])
def test_a_trackers_project_stays_in_its_folder(make_trainer, tmp_path, project):
    options = ("--training.trackers", "[tensorboard]", "--training.project", project)
    with pytest.raises(ValueError, match="training.project: got .*; expected a name without /"):
        make_trainer(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_steps_are_kept_when_the_data_fails(make_trainer, tmp_path, curve, same_files, capsys):
    trainer = make_trainer(tmp_path / "run")
    batch = trainer.task.batch

    def gone(step, slots):
        if step == 7:
            raise ValueError("a.png cannot be decoded")
        return batch(step, slots)

    trainer.task.batch = gone
    with pytest.raises(ValueError, match="a.png cannot be decoded"):
        trainer.train()
    assert steps_in(tmp_path / "run") == [5, 7] and "stopped after step 7; last whole" in capsys.readouterr().err
    trainer.folder.unlock()
    resumed = make_trainer(tmp_path / "run", "--training.resume", "true").train()
    whole = make_trainer(tmp_path / "whole").train()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    same_files(resumed.checkpoint, whole.checkpoint)
