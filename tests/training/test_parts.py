"""The trainer's parts: schedule, randomness, averaged weights, checkpoints."""

import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastdiff.data import AudioDataConfig
from fastdiff.errors import named, section
from fastdiff.training import TrainingConfig, checkpoint
from fastdiff.training.ema import Ema
from fastdiff.training.randomness import derive_seed, normal_noise
from fastdiff.training.run_folder import MetricsLog, read_metrics
from fastdiff.training.schedule import learning_rate
from fastdiff.training.setup import parameter_groups


def config(**fields) -> TrainingConfig:
    return TrainingConfig(learning_rate=1.0, max_steps=100, **fields)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 99: 1.0}),
        ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5, 99: 0.5 * (1 + math.cos(math.pi * 89 / 90))}),
        ("constant_then_linear", {0: 0.1, 49: 1.0, 50: 1.0, 75: 0.5, 99: 0.02}),
    ],
)
def test_schedules(schedule, expected):
    found = {step: learning_rate(config(warmup_steps=10, schedule=schedule), step) for step in expected}
    assert found == pytest.approx(expected)


@given(
    schedule=st.sampled_from(["constant", "cosine", "constant_then_linear"]),
    warmup=st.integers(0, 300),
    decay=st.floats(0, 1),
    step=st.integers(0, 99),
)
def test_schedules_stay_in_bounds(schedule, warmup, decay, step):
    rate = learning_rate(config(warmup_steps=warmup, schedule=schedule, decay_fraction=decay), step)
    assert 0 < rate <= 1


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), st.lists(st.integers(0, 2**63 - 1), max_size=4))
def test_seeds_differ_by_their_parts(first, second):
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)
    assert 0 <= derive_seed(*first) < 2**63


def test_noise_belongs_to_its_slot():
    whole = normal_noise(range(0, 200), (3, 8, 8), 7, 1)
    assert torch.equal(whole[50:60], normal_noise(range(50, 60), (3, 8, 8), 7, 1))
    assert not torch.equal(whole, normal_noise(range(0, 200), (3, 8, 8), 7, 2))
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02
    neighbours = (whole[1:] * whole[:-1]).mean()
    assert abs(neighbours) < 0.02


def test_ema_equals_its_formula():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema, expected = Ema(model, decay=0.6), model.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(ema.module.weight, expected, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_frozen_weights_are_their_own_average():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = Ema(model, decay=0.6)
    assert ema.module[0].weight is model[0].weight and ema.module[1].weight is not model[1].weight
    assert [parameter for parameter, _ in ema.pairs()] == list(model[1].parameters())
    ema.update(0)
    assert torch.equal(ema.module(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_decay_is_for_matrices_alone():
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), 0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]


def test_a_failed_checkpoint_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_checkpoint(tmp_path, 7, {}, fail, keep_last=1)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_not_checkpoints(tmp_path):
    for name in (".writing-step_3", ".removing-step_2", "step_x", "step_10", "step_9"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_11").write_text("a file")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_9", "step_10"]
    checkpoint.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_x", "step_10", "step_9", "step_11"}


def test_metrics_are_cut_at_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = MetricsLog(path, steps_done=2)
    log.append([{"step": 3, "again": True}])
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("max_steps", 0),
        ("keep_last", 0),
        ("ema_decay", 1.5),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
    ],
)
def test_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got {value}; expected"):
        TrainingConfig(**{field: value})


def test_errors_name_the_section_that_a_recipe_has():
    def message(within):
        with within, pytest.raises(ValueError) as error:
            AudioDataConfig(hop=0)
        return str(error.value)

    assert message(section("audio_data")) == "audio_data.hop: got 0; expected at least 1"
    with section("text_data"), section("tokenizer"):
        assert named("name") == "tokenizer.name"
    with section("data"):
        with pytest.raises(KeyError), section("sampling"):
            raise KeyError
        assert named("hop") == "data.hop"  # an inner section ends with its error
    assert message(contextlib.nullcontext()) == "hop: got 0; expected at least 1"


def test_training_ends_after_a_time_with_a_checkpoint(make_trainer, tmp_path):
    outcome = make_trainer(tmp_path / "run", "--training.max_steps", 500, "--training.log_every", 2).train(seconds=0)
    assert not outcome.finished and outcome.steps == 2 and outcome.checkpoint.name == "step_2"
