"""A run that is killed and resumed equals one that was not, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = ("--training.max_steps", 14, "--training.checkpoint_every", 5)

# Runs in a process of its own: forks one child per kind of death, each of which trains until it kills itself.
KILLER = """
import os, signal, sys
from pathlib import Path
from fastdiff.recipes import parse_recipe
from fastdiff.training import checkpoint, trainer
from fastdiff.tasks.dit.recipe import DiTRecipe
from fastdiff.tasks.dit.task import DiTTask

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

class Doomed(DiTTask):
    last_step = None
    def batch(self, step, slots):
        if step == self.last_step:
            die()
        return super().batch(step, slots)

def train(folder, death, options):
    recipe = parse_recipe(DiTRecipe, [*options, "--training.output_dir", str(folder)])
    task = Doomed(recipe)
    if death == "while-writing":  # the checkpoint of step 10, all files written, not yet renamed
        rename = os.rename
        checkpoint.os.rename = lambda a, b: die() if str(b).endswith("step_10") else rename(a, b)
    else:
        task.last_step = int(death)
    trainer.pays = lambda device: False  # each batch in its own step
    trainer.Trainer(task, recipe.training).train()

root, deaths, options = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
for death in deaths:
    child = os.fork()
    if child == 0:
        train(root / death, death, options)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (death, status)
"""
DEATHS = ("3", "5", "12", "while-writing")


@pytest.fixture
def killed(tmp_path, tiny_yaml):
    """Folders of runs that died by SIGKILL, by the way they died."""
    command = [sys.executable, "-c", KILLER, str(tmp_path), ",".join(DEATHS), str(tiny_yaml), *map(str, STEPS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {death: tmp_path / death for death in DEATHS}


def test_killed_runs_resume_bit_for_bit(killed, tmp_path, make_trainer, curve, same_files):
    whole = make_trainer(tmp_path / "whole", *STEPS).train()
    assert whole.finished and whole.steps == 14
    found = {death: sorted(p.name for p in (folder / "checkpoints").glob("step_*")) for death, folder in killed.items()}
    assert found == {"3": [], "5": ["step_5"], "12": ["step_10", "step_5"], "while-writing": ["step_5"]}
    for folder in killed.values():
        resumed = make_trainer(folder, *STEPS, "--training.resume", "true").train()
        assert curve(folder) == curve(tmp_path / "whole")
        same_files(resumed.checkpoint, whole.checkpoint)
        assert not list((folder / "checkpoints").glob(".*"))  # nothing half-written is left


def test_resume_after_the_end_does_nothing(tmp_path, make_trainer, curve):
    make_trainer(tmp_path / "run").train()
    before = curve(tmp_path / "run")
    again = make_trainer(tmp_path / "run", "--training.resume", "true").train()
    assert again.steps == 12 and again.samples_per_second == 0 and curve(tmp_path / "run") == before


def test_a_longer_run_goes_on(tmp_path, make_trainer, curve):
    constant = ("--training.schedule", "constant")
    make_trainer(tmp_path / "run", *constant).train()
    more = make_trainer(tmp_path / "run", *constant, "--training.resume", "true", "--training.max_steps", 16).train()
    whole = make_trainer(tmp_path / "whole", *constant, "--training.max_steps", 16).train()
    assert more.steps == whole.steps == 16
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(tmp_path, make_trainer, curve, same_files, number, batches_in_step):
    trainer, before = make_trainer(tmp_path / "run"), signal.getsignal(number)
    batch = trainer.task.batch
    trainer.task.batch = lambda step, slots: (step == 6 and os.kill(os.getpid(), number), batch(step, slots))[1]
    outcome = trainer.train()
    assert not outcome.finished and outcome.steps == 7 and outcome.checkpoint.name == "step_7"
    assert signal.getsignal(number) == before
    assert len(curve(tmp_path / "run")) == 7
    resumed = make_trainer(tmp_path / "run", "--training.resume", "true").train()
    whole = make_trainer(tmp_path / "whole").train()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    same_files(resumed.checkpoint, whole.checkpoint)


def test_accumulation_gives_the_same_steps(tmp_path, make_trainer, curve):
    make_trainer(tmp_path / "one", "--training.max_steps", 5).train()
    make_trainer(tmp_path / "three", "--training.max_steps", 5, "--training.accumulation_steps", 3).train()
    for one, three in zip(curve(tmp_path / "one"), curve(tmp_path / "three"), strict=True):
        assert one == pytest.approx(three, rel=1e-5)


def test_two_processes_equal_one(tmp_path, tiny_yaml, make_trainer, curve):
    """7 samples a step: 4 and 3 on two processes, each in two parts of unequal size."""
    options = ("--training.batch_size", 7, "--training.max_steps", 6)
    make_trainer(tmp_path / "one", *options).train()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "-m",
        "fastdiff.train",
        tiny_yaml,
        *options,
        "--training.output_dir",
        tmp_path / "two",
        "--training.accumulation_steps",
        2,
        "--training.device",
        "auto",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(curve(tmp_path / "one")) == 6
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
