"""A run goes by what was measured when it began, wherever it goes on."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import fastdiff
from fastdiff import tune, tuning
from fastdiff.data import DataConfig, load_data
from fastdiff.nn.attention import SelfAttention
from fastdiff.ops._sizes import measure_sizes
from fastdiff.recipes import parse_recipe
from fastdiff.tasks.dit.recipe import DiTRecipe
from fastdiff.tasks.dit.task import DiTTask
from fastdiff.training import Trainer
from fastdiff.training.run_folder import RunFolder

AUTO = ("--training.mixed_precision", "auto")
FEW_STEPS = ("--training.max_steps", 4, "--training.log_every", 2)


class Machine:
    """A CPU with bfloat16 instructions, on which a pass takes so many seconds in each precision."""

    def __init__(self, patch, folder, known):
        self.patch, self.folder, self.known, self.moves, self.passes = patch, folder, known, 0, 0
        for module in ("fastdiff.device", "fastdiff.training.choices", "fastdiff.training.setup"):
            patch.setattr(f"{module}.computes_bf16", lambda device_type: True)

    def move(self, *, bf16: float, no: float) -> None:
        """To another machine, whose cache knows no training step."""
        self.moves, self.seconds, self.now = self.moves + 1, {True: bf16, False: no}, 0.0
        self.patch.setenv("FASTDIFF_TUNE", "1")
        self.patch.setenv("FASTDIFF_CACHE", str(shutil.copytree(self.known, self.folder / f"cache_{self.moves}")))
        self.patch.setattr(tuning, "clock", self.clock)
        self.patch.setattr(tuning, "waited", lambda: 0.0)

    def __deepcopy__(self, memo):  # what copies of the model's hooks move is this clock
        return self

    def clock(self) -> float:
        self.now += 0.01  # of all else
        return self.now

    def work(self, *_) -> None:
        self.passes += 1
        self.now += self.seconds[torch.is_autocast_enabled("cpu")]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A cache that has all but training steps: these are what the tests are about."""
    folder = tmp_path_factory.mktemp("known")
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_TUNE", "1")
        patch.setenv("FASTDIFF_CACHE", str(folder))
        patch.setattr(tuning, "clock", lambda: next(ticks))
        patch.setattr(tuning, "waited", lambda: 0.0)
        measure_sizes()
        model, x = SelfAttention(32, 2), torch.zeros(1, 4, 32)
        for dtype in (torch.float32, torch.bfloat16):
            with tuning.measuring(), torch.autocast("cpu", dtype, dtype == torch.bfloat16):
                model(x)
                with torch.no_grad():
                    model(x)
    return folder


@pytest.fixture
def machine(monkeypatch, tmp_path, known):
    return Machine(monkeypatch, tmp_path, known)


@pytest.fixture
def make(machine, make_recipe, digits):
    """make(folder, …) → Trainer of a model whose passes take the machine's seconds."""

    def trainer(folder, *options):
        given = options if "--training.mixed_precision" in options else (*AUTO, *options)
        return trainer_of(machine, make_recipe("--training.output_dir", folder, *given), digits)

    return trainer


def trainer_of(machine, recipe, data):
    task = DiTTask(recipe, data)
    task.model.blocks[0].register_forward_pre_hook(machine.work)
    return Trainer(task, recipe.training)


def choices(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["training"]["choices"]


@pytest.mark.parametrize(("bf16", "no", "chosen"), [(0.1, 0.15, "bf16"), (0.15, 0.1, "no"), (0.098, 0.1, "bf16"),
                                                    (0.1, 0.098, "bf16"), (0.105, 0.1, "no")])  # fmt: skip
def test_auto_is_the_faster_precision_of_the_steps(machine, make, tmp_path, bf16, no, chosen):
    """Never slower than the other by more than 3 %: an AMD, an Intel, and what is between."""
    machine.move(bf16=bf16, no=no)
    trainer = make(tmp_path / "run")
    assert trainer.accelerator.mixed_precision == chosen
    dtype = {"bf16": "bfloat16", "no": "float32"}[chosen]
    recorded = choices(tmp_path / "run")
    assert recorded.pop("mixed_precision") == chosen
    uses = ("training", "inference")
    assert set(recorded) == {f"self-attention {dtype}, 16 channels, 16 tokens, {use}" for use in uses}
    trainer.folder.unlock()


def test_measuring_leaves_no_trace_in_the_model(machine, make, tmp_path):
    machine.move(bf16=0.15, no=0.1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer = make(tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)
    machine.patch.setenv("FASTDIFF_TUNE", "0")
    plain = make(tmp_path / "plain")
    for name, value in plain.task.model.state_dict().items():
        assert torch.equal(trainer.task.model.state_dict()[name], value), name
    assert all(parameter.grad is None for parameter in trainer.task.model.parameters())


def test_a_second_run_finds_what_the_first_has_measured(machine, make, tmp_path):
    machine.move(bf16=0.15, no=0.1)
    first = make(tmp_path / "first")
    passes = machine.passes
    assert make(tmp_path / "second").choices == first.choices and machine.passes == passes > 0
    assert any("million weights, 8 images: no (default bf16" in line for line in tuning.table())
    make(tmp_path / "larger", "--training.batch_size", 12)
    assert machine.passes > passes


def test_a_resumed_run_keeps_its_choices_and_its_bits(machine, make, tmp_path, curve, same_files):
    """On another machine, with and without measuring."""
    machine.move(bf16=0.15, no=0.1)
    whole = make(tmp_path / "whole", *FEW_STEPS).train()
    assert make(tmp_path / "run", *FEW_STEPS).train(stop_at=2).steps == 2
    recorded = choices(tmp_path / "run")
    for tunes in ("1", "0"):
        machine.move(bf16=0.1, no=0.15)
        machine.patch.setenv("FASTDIFF_TUNE", tunes)
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"resumed_{tunes}")
        resumed = make(folder, *FEW_STEPS, "--training.resume", "true")
        assert resumed.accelerator.mixed_precision == "no" and resumed.choices == recorded
        outcome = resumed.train()
        assert curve(folder) == curve(tmp_path / "whole")
        same_files(outcome.checkpoint, whole.checkpoint)
        assert choices(folder) == recorded == choices(tmp_path / "whole")


def test_a_run_of_an_earlier_version_goes_on_as_it_was(machine, make, tmp_path):
    machine.move(bf16=0.15, no=0.1)
    make(tmp_path / "run").train(stop_at=1)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    del config["training"]["choices"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    resumed = make(tmp_path / "run", "--training.resume", "true")
    assert resumed.accelerator.mixed_precision == "bf16" and resumed.choices == {}  # as the CPU has the instructions


def test_what_is_said_wins(machine, make, tmp_path):
    machine.move(bf16=0.15, no=0.1)
    explicit = make(tmp_path / "explicit", "--training.mixed_precision", "bf16")
    assert explicit.accelerator.mixed_precision == "bf16" and "mixed_precision" not in explicit.choices
    passes = machine.passes
    given = make(tmp_path / "given", "--training.choices", '{"mixed_precision": "bf16"}')
    assert given.accelerator.mixed_precision == "bf16" and choices(tmp_path / "given") == {"mixed_precision": "bf16"}
    machine.patch.setenv("FASTDIFF_TUNE", "0")
    rules = make(tmp_path / "rules")
    assert rules.accelerator.mixed_precision == "bf16" and rules.choices == {"mixed_precision": "bf16"}
    assert machine.passes == passes
    with pytest.raises(ValueError, match="training.choices: got 'fp8' for 'mixed_precision'; expected one of bf16, no"):
        make(tmp_path / "wrong", "--training.choices", '{"mixed_precision": "fp8"}')
    machine.patch.setenv("FASTDIFF_TUNE", "1")
    with pytest.raises(ValueError, match="training.choices.mixed_precision: got 'no', but the run in .* 'bf16'"):
        make(tmp_path / "given", "--training.choices", '{"mixed_precision": "no"}', "--training.resume", "true")


def test_a_folder_with_a_run_is_refused_before_anything_is_measured(machine, make, tmp_path):
    machine.move(bf16=0.15, no=0.1)
    make(tmp_path / "run")
    machine.move(bf16=0.15, no=0.1)
    passes = machine.passes
    with pytest.raises(FileExistsError, match="holds a run already"):
        make(tmp_path / "run")
    assert machine.passes == passes


def test_a_cpu_without_the_instructions_computes_in_float32(machine, make, tmp_path):
    machine.move(bf16=0.1, no=0.15)
    for module in ("fastdiff.device", "fastdiff.training.choices", "fastdiff.training.setup"):
        machine.patch.setattr(f"{module}.computes_bf16", lambda device_type: False)
    trainer = make(tmp_path / "run")
    assert trainer.accelerator.mixed_precision == trainer.choices["mixed_precision"] == "no"


def test_a_model_of_slow_steps_is_measured_by_its_products(machine, make, tmp_path, monkeypatch):
    machine.move(bf16=30.0, no=20.0)

    def linear(x, weight, bias=None):
        machine.now += 2.0 if torch.is_autocast_enabled("cpu") else 1.0
        return plain(x, weight, bias)

    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    trainer = make(tmp_path / "run")
    assert trainer.choices == {"mixed_precision": "no"}
    assert machine.passes == 2  # one sample, to see that it takes too long


def test_loaded_and_saved_runs_sample_as_they_were_trained(machine, make, tmp_path):
    machine.move(bf16=0.15, no=0.1)
    outcome = make(tmp_path / "run", "--training.max_steps", 2).train()
    machine.move(bf16=0.1, no=0.15)
    run = fastdiff.load(tmp_path / "run", device="cpu")
    run.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["mixed_precision"] == "auto" and config["choices"] == choices(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    os.rename(outcome.checkpoint, tmp_path / "elsewhere" / "step")
    saved, alone = (fastdiff.load(tmp_path / name, device="cpu") for name in ("saved", "elsewhere/step"))
    for each in (run, saved, alone):
        assert each.choices["mixed_precision"] == "no"
        assert torch.equal(each.sample([3], output_type="pt"), run.sample([3], output_type="pt"))


def test_the_command_measures_again(machine, tiny_yaml, capsys, tmp_path):
    machine.move(bf16=0.1, no=0.15)
    recipe = yaml.safe_load(tiny_yaml.read_text())
    recipe["training"]["mixed_precision"] = "auto"
    tiny_yaml.write_text(yaml.safe_dump(recipe))
    shown = []
    for _ in range(2):
        tune.main([str(tiny_yaml)])
        shown.append(capsys.readouterr().out)
        assert sum("million weights, 8 images: " in line for line in shown[-1].splitlines()) == 1
    tune.main([])
    assert "million weights" not in capsys.readouterr().out
    machine.patch.setenv("FASTDIFF_TUNE", "0")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "error: FASTDIFF_TUNE: got 0" in capsys.readouterr().err


_PROCESS = "import sys; sys.path[:0] = sys.argv[1:2]; import test_choices; test_choices.train_as(*sys.argv[2:])"


def train_as(rank, recipe, known, folder):
    """One of two processes, on the second of which bf16 would win; prints what it goes by."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, Path(folder) / f"caches_{rank}", known)
        machine.move(**({"bf16": 0.15, "no": 0.1} if rank == "0" else {"bf16": 0.1, "no": 0.15}))
        options = [recipe, *AUTO, "--training.output_dir", f"{folder}/run"]
        trainer = trainer_of(machine, parse_recipe(DiTRecipe, options), load_data(DataConfig(name="digits")))
        trainer.train(stop_at=1)
        print(json.dumps([trainer.accelerator.mixed_precision, trainer.choices]))


def test_processes_go_by_what_the_first_one_found(known, tiny_yaml, tmp_path):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    arguments = [sys.executable, "-c", _PROCESS, Path(__file__).parent, "RANK", tiny_yaml, known, tmp_path]
    processes = []
    for rank in ("0", "1"):
        arguments[4] = rank
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen([*map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True))
    found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    assert found[0] == found[1] and found[0][0] == found[0][1]["mixed_precision"] == "no"
    assert choices(tmp_path / "run") == found[0][1]


@pytest.mark.parametrize("value", ["hello", [1, 2], {"attention": {"a": "b"}}, {1: 2}, {"mixed_precision": False}])
def test_a_record_that_cannot_be_one_is_named(tmp_path, value):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"training": {"choices": value}}))
    with pytest.raises(ValueError, match=r"config.yaml: training.choices: got .*in quotes"):
        RunFolder(tmp_path).choices()
