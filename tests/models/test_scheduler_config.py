"""`Diffusion.save_pretrained` and `from_pretrained`: exact round trips, diffusers' own classes, refusals."""

import dataclasses
import inspect
import json
import logging

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from fastdiff.diffusion import Diffusion, DiffusionConfig, sample
from fastdiff.diffusion.scheduler_config import _DEFAULTS, _DISCRETE_CLASSES, _READ_BY, _REQUIRED

CONFIGS = [
    *(
        DiffusionConfig(prediction_type=prediction, noise_levels=levels)
        for levels in ("linear", "cosine", "scaled_linear", "uniform", "logit_normal", "beta")
        for prediction in ("epsilon", "sample", "v_prediction", "flow")
        if prediction != "flow" or levels in ("uniform", "logit_normal", "beta")
    ),
    DiffusionConfig("epsilon", "linear", num_train_timesteps=77, beta_start=0.1 + 0.2 - 0.29, beta_end=1 / 3),
    DiffusionConfig("flow", "beta", beta_a=1 / 7, beta_b=3.3, time_scale=1.0),
    DiffusionConfig("sample", "beta", time_scale=100.0, time_range=(0.01, 0.99)),
    DiffusionConfig("flow", "logit_normal", logit_normal_mean=-1.1, logit_normal_std=0.7, num_train_timesteps=250),
]
DISCRETE = [config for config in CONFIGS if config.is_discrete]


@pytest.fixture
def diffusers_log(caplog):
    """Its logger does not hand on to the root's, where caplog listens."""
    diffusers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING, "diffusers"):
        yield caplog
    diffusers.logging.disable_propagation()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.noise_levels}-{c.prediction_type}")
def test_a_round_trip_is_exact(tmp_path, config):
    Diffusion(config).save_pretrained(tmp_path / "a" / "model")
    assert [file.name for file in (tmp_path / "a" / "model").iterdir()] == ["scheduler_config.json"]
    found = Diffusion.from_pretrained(tmp_path / "a" / "model")
    assert found.config == config
    assert found.betas is None if not config.is_discrete else torch.equal(found.betas, Diffusion(config).betas)


def test_it_is_found_in_a_pipeline_and_beside_the_weights_first(tmp_path):
    Diffusion(CONFIGS[0]).save_pretrained(tmp_path / "scheduler")
    assert Diffusion.from_pretrained(str(tmp_path)).config == CONFIGS[0]
    Diffusion(CONFIGS[-1]).save_pretrained(tmp_path)
    assert Diffusion.from_pretrained(tmp_path).config == CONFIGS[-1]


@pytest.mark.parametrize("config", DISCRETE, ids=lambda c: f"{c.noise_levels}-{c.prediction_type}")
def test_diffusers_reads_the_same_levels(tmp_path, config, diffusers_log):
    Diffusion(config).save_pretrained(tmp_path)
    theirs = DDIMScheduler.from_pretrained(tmp_path)
    assert not diffusers_log.messages
    torch.testing.assert_close(theirs.betas, Diffusion(config).betas.float(), rtol=1e-5, atol=0)  # seen: 2e-7
    assert theirs.config.prediction_type == config.prediction_type and not theirs.config.clip_sample


@pytest.mark.parametrize("config", DISCRETE[:8], ids=lambda c: f"{c.noise_levels}-{c.prediction_type}")
def test_diffusers_draws_the_same_sample(tmp_path, config):
    """Its scheduler, as we describe it, takes the steps of our "ddim"."""
    diffusion = Diffusion(config)
    diffusion.save_pretrained(tmp_path)
    theirs = DDIMScheduler.from_pretrained(tmp_path)

    def predict(x, time):
        return torch.tanh(x) + 0.001 * time.view(-1, 1, 1)

    found = sample(predict, diffusion, (1, 2, 4), device="cpu", sampler="ddim", num_inference_steps=25, seed=3)
    theirs.set_timesteps(25)
    x = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(3))
    for t in theirs.timesteps:
        x = theirs.step(predict(x, t.float()[None]), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4 * float(x.abs().max()))  # seen: 7e-6


@pytest.mark.parametrize("levels", ["uniform", "logit_normal", "beta"])
def test_diffusers_draws_the_same_flow(tmp_path, levels, diffusers_log):
    diffusion = Diffusion(DiffusionConfig("flow", levels, num_train_timesteps=500))
    diffusion.save_pretrained(tmp_path)
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert not diffusers_log.messages

    def predict(x, time):
        return torch.tanh(x) + 0.001 * time.view(-1, 1, 1)

    found = sample(predict, diffusion, (1, 2, 4), device="cpu", sampler="euler", num_inference_steps=10, seed=3)
    theirs.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    x = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(3))
    for t in theirs.timesteps:
        x = theirs.step(predict(x, t.float()[None]), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_what_diffusers_has_no_scheduler_of_names_none(tmp_path):
    for config in (DiffusionConfig("epsilon", "uniform"), DiffusionConfig("flow", "beta", time_scale=1.0)):
        Diffusion(config).save_pretrained(tmp_path)
        values = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert values.keys() == {"_class_name", "_fastdiff"} and not hasattr(diffusers, values["_class_name"])


def test_schedulers_of_diffusers_are_read(tmp_path):
    def read(scheduler):
        scheduler.save_pretrained(tmp_path)
        return Diffusion.from_pretrained(tmp_path)

    for name in _DISCRETE_CLASSES:  # what they do not say is their default, which is the same for all
        defaults = inspect.signature(getattr(diffusers, name)).parameters
        assert {key: defaults[key].default for key in _DEFAULTS} == _DEFAULTS
        assert read(getattr(diffusers, name)()).config == DiffusionConfig(
            "epsilon", "linear", beta_start=0.0001, beta_end=0.02
        )
    for levels, schedule in (("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")):
        theirs = DDPMScheduler(
            300, beta_start=0.001, beta_end=0.011, beta_schedule=schedule, prediction_type="v_prediction"
        )
        found = read(theirs)
        assert found.config.noise_levels == levels and found.config.prediction_type == "v_prediction"
        torch.testing.assert_close(theirs.betas, found.betas.float(), rtol=1e-4, atol=1e-7)
    found = read(FlowMatchEulerDiscreteScheduler(num_train_timesteps=100))
    assert found.config == DiffusionConfig(num_train_timesteps=100) and found.config.prediction_type == "flow"
    again = DDPMScheduler.from_config(DDIMScheduler.from_pretrained(write(tmp_path, DISCRETE[0])).config)
    assert read(again).config.noise_levels == "linear"  # diffusers hands a scheduler's terms from class to class
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    assert Diffusion.from_pretrained(tmp_path).config.num_train_timesteps == 1000


def test_a_key_that_the_scheduler_has_not_is_left_unread(tmp_path):
    solver = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, timestep_spacing="trailing")
    diffusers.DDIMScheduler.from_config(solver.config).save_pretrained(tmp_path)  # which hands on what it has not
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["use_karras_sigmas"] is True
    assert Diffusion.from_pretrained(tmp_path).sampler_options.timestep_spacing == "trailing"
    for name, keys in _READ_BY.items():
        known = inspect.signature(getattr(diffusers, name)).parameters
        assert keys == _REQUIRED.keys() & known.keys(), name


def test_the_values_refused_are_not_diffusers_defaults():
    classes = [getattr(diffusers, name) for name in (*_DISCRETE_CLASSES, "FlowMatchEulerDiscreteScheduler")]
    defaults = {}
    for kind in classes:
        defaults |= {name: p.default for name, p in inspect.signature(kind).parameters.items() if name in _REQUIRED}
    assert defaults.keys() == _REQUIRED.keys()
    assert {name: value or None for name, value in defaults.items()} == {n: v or None for n, v in _REQUIRED.items()}


def write(folder, config, **changes):
    """A saved diffusion with keys replaced, in diffusers' terms alone where "_fastdiff" is None."""
    Diffusion(config).save_pretrained(folder)
    file = folder / "scheduler_config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(
        json.dumps({key: value for key, value in values.items() if key != "_fastdiff" or value is not None})
    )
    return folder


LINEAR, FLOW = DiffusionConfig("epsilon", "linear"), DiffusionConfig()


@pytest.mark.parametrize(
    "config, changes, match",
    [
        (LINEAR, dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr: got True; expected False"),
        (LINEAR, dict(trained_betas=[0.1, 0.2]), r"trained_betas: got \[0.1, 0.2\]; expected None"),
        (LINEAR, dict(trained_betas=[0.1] * 1000), r"trained_betas: got \[0.1, .{,40}\.\.\.\]; expected None"),
        (LINEAR, dict(thresholding=True), "thresholding: got True; expected False"),
        (LINEAR, dict(beta_schedule="sigmoid"), "beta_schedule: got 'sigmoid'; expected one of linear, scaled_linear"),
        (LINEAR, dict(beta_schedule=["linear"]), r"beta_schedule: got \['linear'\]; expected one of"),
        (LINEAR, dict(prediction_type="flow_prediction"), "prediction_type: got 'flow_prediction'; expected one of"),
        (LINEAR, dict(num_train_timesteps="1000"), "num_train_timesteps: got '1000'; expected a whole number"),
        (LINEAR, dict(num_train_timesteps=-5), "num_train_timesteps: got -5; expected a positive number"),
        (LINEAR, dict(beta_end=None), "beta_end: got None; expected a number"),
        (LINEAR, dict(beta_end=2.0), r"beta_start, beta_end: got \(0.0001, 2.0\)"),
        (LINEAR, dict(_class_name="EDMEulerScheduler"), "_class_name: got 'EDMEulerScheduler'; expected one of DDIM"),
        (LINEAR, dict(_class_name=None), "_class_name: got None; expected one of DDIM"),
        (FLOW, dict(shift=3.0), "shift: got 3.0; expected 1.0"),
        (FLOW, dict(use_dynamic_shifting=True), "use_dynamic_shifting: got True; expected False"),
        (FLOW, dict(num_train_timesteps=True), "num_train_timesteps: got True; expected a whole number"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, config, changes, match):
    refused(write(tmp_path, config, **{"_fastdiff": None, **changes}), match)


@pytest.mark.parametrize(
    "config, changes, match",
    [
        (LINEAR, dict(_fastdiff=[1]), "_fastdiff: got a JSON list; expected an object"),
        (LINEAR, dict(_fastdiff=dict(levels=3)), "_fastdiff: got 'levels'; expected prediction_type, .*; install"),
        (LINEAR, dict(_fastdiff=dict(noise_levels="sigmoid")), "noise_levels: got 'sigmoid'; expected one of linear"),
        (LINEAR, dict(_fastdiff=dict(num_train_timesteps=2.5)), "_fastdiff.num_train_timesteps: got 2.5; expected a w"),
        (FLOW, dict(_fastdiff=dict(beta_a="1")), "_fastdiff.beta_a: got '1'; expected a number"),
        (LINEAR, dict(prediction_type="v_prediction"), "prediction_type: got 'v_prediction'; expected 'epsilon', as"),
        (LINEAR, dict(beta_end=0.03), "beta_end: got 0.03; expected 0.02, as _fastdiff says"),
    ],
)
def test_damaged_and_contradicting_files_are_refused(tmp_path, config, changes, match):
    refused(write(tmp_path, config, **changes), match)


def refused(folder, match):
    with pytest.raises(ValueError, match=match) as caught:
        Diffusion.from_pretrained(folder)
    text = str(caught.value)
    assert text.startswith(str(folder / "scheduler_config.json") + ": ") and "\n" not in text


def test_missing_and_broken_files(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"no scheduler_config.json in it or in its folder scheduler; expec"
        ):
            Diffusion.from_pretrained(folder)
    for content, match in (("{", "not a JSON file"), ("[]", "got a JSON list; expected an object")):
        (tmp_path / "scheduler_config.json").write_text(content)
        refused(tmp_path, match)


def test_every_field_is_written(tmp_path):
    Diffusion(FLOW).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())["_fastdiff"]
    assert written == dataclasses.asdict(FLOW)
