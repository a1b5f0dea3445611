"""Samplers against public code: the same images from the same noise as plain loops and diffusers' schedulers."""

import json

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from models import public_samplers as public
from torch import nn

from fastdiff.diffusion import Diffusion, DiffusionConfig, SamplerOptions, sample, sample_classes

# diffusers' DPM-Solver++ reads a tensor in a way that NumPy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LINEAR = DiffusionConfig("epsilon", "linear")
SHAPE, LABELS, NULL = (4, 6, 6), torch.tensor([2, 0]), 3
STEPS, SCALES = (10, 50, 250), (1.0, 4.0)
SEEDS = [7, 8]
KINDS = ("learned_range", "fixed_small", "fixed_large")  # of variance; long loops take the first


class Network(nn.Module):
    """Noise and variance that depend on place, time and label, of about unit size whatever x is."""

    class Config:
        num_classes, in_channels, image_size = NULL, SHAPE[0], SHAPE[1:]

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        generator = torch.Generator().manual_seed(1)
        self.mix = nn.Parameter(0.5 * torch.randn(2 * SHAPE[0], SHAPE[0], generator=generator))
        self.shift = nn.Parameter(torch.randn(NULL + 1, 2 * SHAPE[0], generator=generator))

    @torch.no_grad()
    def forward(self, x, time, class_labels):
        mixed = torch.einsum("oc,bchw->bohw", self.mix, x / (1 + x.square().mean((1, 2, 3), keepdim=True)).sqrt())
        return torch.tanh(mixed + self.shift[class_labels][:, :, None, None]) * (1 + time.view(-1, 1, 1, 1) / 1000)


NETWORK = Network()


def ours(diffusion=None, scale=1.0, steps=None, **options):
    diffusion = Diffusion(LINEAR) if diffusion is None else diffusion
    return sample_classes(
        NETWORK, diffusion, LABELS, guidance_scale=scale, num_inference_steps=steps, seed=SEEDS, **options
    )


def same(found, expected, within=1e-5):
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error < within, error


def plain(scale, channels=None):
    return public.guided_network(NETWORK, NULL, scale, channels), LABELS, public.noises(SEEDS, SHAPE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("scale", SCALES)
def test_facebookresearch_dit(steps, scale):  # seen: 1e-6
    spaced = public.SpacedDiffusion(str(steps))
    for kind in KINDS if steps < 250 else KINDS[:1]:
        expected = spaced.draw(*plain(scale, 3), kind=kind)
        same(ours(None, scale, steps, sampler="ddpm", timestep_spacing="respacing", variance_type=kind,
                  guidance_channels=3), expected)  # fmt: skip
    learnt = ours(None, scale, steps, sampler="ddpm", timestep_spacing="respacing", guidance_channels=3)
    same(learnt, spaced.draw(*plain(scale, 3)))
    for text, spacing in ((f"ddim{steps}", "ddim_respacing"), (str(steps), "respacing")):
        expected = public.SpacedDiffusion(text).draw(*plain(scale, 3), ddim=True)
        same(ours(None, scale, steps, sampler="ddim", timestep_spacing=spacing, guidance_channels=3), expected)
    clipped = public.SpacedDiffusion(f"ddim{steps}").draw(*plain(scale, 3), ddim=True, clip=0.7)
    same(ours(None, scale, steps, sampler="ddim", timestep_spacing="ddim_respacing", guidance_channels=3,
              clip_sample=0.7, use_clipped_model_output=True), clipped)  # fmt: skip


SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]


@pytest.mark.parametrize("spacing, offset", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
def test_diffusers_schedulers_as_plain_loops(steps, spacing, offset):
    terms = dict(timestep_spacing=spacing, steps_offset=offset)
    levels, of_solver = (public.spaced(spacing, steps, offset, solver=solver) for solver in (False, True))
    for scale in SCALES if steps < 250 else SCALES[-1:]:
        same(ours(None, scale, steps, sampler="ddim", **terms), public.ddim(*plain(scale), levels))
        for kind in KINDS if steps < 250 else KINDS[:1]:
            found = ours(None, scale, steps, sampler="ddpm", variance_type=kind, **terms)
            same(found, public.ddpm(*plain(scale), levels, kind))
        same(ours(None, scale, steps, sampler="dpm-solver++", **terms), public.dpm_solver(*plain(scale), of_solver))


def theirs(scheduler, steps, scale=1.0, learnt=False):
    """Drawn by diffusers' own scheduler, which is handed the noise, and with `learnt` the variance, too."""
    scheduler.set_timesteps(steps)
    network, labels, fresh = plain(scale)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    x = torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators])
    noisy = {"generator": generators} if isinstance(scheduler, DDPMScheduler) else {}
    for t in scheduler.timesteps:
        output = network(x, t.float().expand(len(x)), labels)
        x = scheduler.step(output if learnt else output[:, : SHAPE[0]], t, x, **noisy).prev_sample
    return x


SCHEDULERS = [
    DDIMScheduler(),  # clips at 1, as it does where nobody says otherwise
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    DDIMScheduler(clip_sample=False, timestep_spacing="linspace", steps_offset=5),
    DDPMScheduler(clip_sample=False),
    DDPMScheduler(clip_sample_range=2.0, variance_type="fixed_large"),
    DDPMScheduler(clip_sample=False, timestep_spacing="linspace", variance_type="learned_range"),
    DDPMScheduler(clip_sample=False, variance_type="fixed_small_log", timestep_spacing="trailing"),
    DPMSolverMultistepScheduler(),
    DPMSolverMultistepScheduler(timestep_spacing="leading", steps_offset=1),
    DPMSolverMultistepScheduler(timestep_spacing="trailing"),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: f"{type(s).__name__}-{s.config.timestep_spacing}")
def test_a_schedulers_file_draws_as_the_scheduler(tmp_path, scheduler):
    """Its tables are float32, and a difference of two of them is β: seen up to 2e-5."""
    scheduler.save_pretrained(tmp_path / "scheduler")
    diffusion = Diffusion.from_pretrained(tmp_path)
    learnt = scheduler.config.get("variance_type") == "learned_range"
    for steps, scale in ((10, 1.0), (50, 4.0), (250, 1.0), (37, 1.0)):  # 37 does not divide 1000
        same(ours(diffusion, scale, steps), theirs(scheduler, steps, scale, learnt), 1e-4)
    again = tmp_path / "again"
    diffusion.save_pretrained(again)
    assert Diffusion.from_pretrained(again).sampler_options == diffusion.sampler_options
    kind = type(scheduler).from_pretrained(again)
    same(theirs(kind, 37, 1.0, learnt), theirs(scheduler, 37, 1.0, learnt), 1e-4)


@pytest.mark.parametrize("steps", STEPS)
def test_flow_by_euler(tmp_path, steps):
    def velocity(x, t, labels):
        return NETWORK(x, t, labels)[:, : SHAPE[0]]

    def drawn(diffusion, **options):
        return sample(
            lambda x, t: velocity(x, t, LABELS), diffusion, (2, *SHAPE), device="cpu", num_inference_steps=steps,
            seed=SEEDS, **options,
        )  # fmt: skip

    def expected(times):
        return public.flow_euler(velocity, LABELS, public.noises(SEEDS, SHAPE), times)

    flow = Diffusion(DiffusionConfig())
    evenly = [1 - index / steps for index in range(steps)]
    same(drawn(flow), expected(evenly))
    to_last = [1 - index * (1 - 1e-3) / (steps - 1) for index in range(steps)]
    same(drawn(flow, timestep_spacing="linspace"), expected(to_last))
    same(drawn(flow, timesteps=[t**2 for t in evenly]), expected([t**2 for t in evenly]))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.save_pretrained(tmp_path)
    scheduler.set_timesteps(steps)
    x = public.noises(SEEDS, SHAPE)()
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.expand(2), LABELS), t, x).prev_sample
    same(drawn(Diffusion.from_pretrained(tmp_path)), x)


@pytest.mark.parametrize("steps", [1, 3, 10, 11, 30, 50, 250, 999])
def test_the_levels_are_those_of_public_code(steps):
    for spacing, offset in SPACINGS:
        if spacing == "leading" and steps == 999:
            continue
        for solver in (False, True):
            options = SamplerOptions("dpm-solver++" if solver else "ddim", spacing, offset)
            assert options.levels(LINEAR, steps) == public.spaced(spacing, steps, offset, solver=solver)
    assert SamplerOptions(timestep_spacing="respacing").levels(LINEAR, steps) == public.respaced(str(steps))[::-1]
    if steps in (10, 50, 250):
        options = SamplerOptions(timestep_spacing="ddim_respacing")
        assert options.levels(LINEAR, steps) == public.respaced(f"ddim{steps}")[::-1]
        assert SamplerOptions().levels(LINEAR, steps) == public.spaced("trailing", steps)


def test_published_levels():
    def levels(spacing, **options):
        return SamplerOptions(timestep_spacing=spacing, **options).levels(LINEAR, 50)

    assert levels("ddim_respacing")[::-1] == list(range(0, 1000, 20))
    assert levels("respacing")[::-1][:3] == [0, 20, 41] and levels("respacing")[:2] == [999, 979]
    assert levels("leading")[0] == 980 and levels("leading", steps_offset=1)[::49] == [981, 1]
    assert levels("trailing")[::49] == [999, 19] == levels(None)[::49]


@pytest.mark.parametrize("spacing, steps", [(None, 50), (None, 10), ("leading", 7), ("trailing", 13), ("respacing", 1)])
def test_ddpms_last_step_adds_no_noise(spacing, steps):
    """An image of 0 with the largest variance that can be learnt is drawn as 0, whatever the last level is."""
    for kind in (None, "learned_range", "fixed_small", "fixed_large"):
        found = sample(
            lambda x, t: torch.cat([torch.zeros_like(x), torch.ones_like(x)], 1),
            Diffusion(DiffusionConfig("sample", "linear")), (1, 4, 8, 8), device="cpu", sampler="ddpm",
            num_inference_steps=steps, timestep_spacing=spacing, variance_type=kind,
        )  # fmt: skip
        assert found.abs().max() == 0


def test_explicit_timesteps():
    levels = [990, 700, 411, 90, 3]
    spaced = public.SpacedDiffusion("5")
    found = {name: ours(sampler=name, timesteps=levels) for name in ("ddim", "ddpm", "dpm-solver++")}
    same(found["ddpm"], public.ddpm(*plain(1.0), levels, "learned_range"))
    same(found["dpm-solver++"], public.dpm_solver(*plain(1.0), levels))
    assert spaced.levels == [0, 250, 500, 749, 999]
    same(ours(sampler="ddim", timesteps=[999, 749, 500, 250, 0]), spaced.draw(*plain(1.0), ddim=True))
    assert torch.equal(ours(timesteps=levels, steps=5), found["ddim"])


def test_what_was_read_is_kept_and_what_is_given_wins(tmp_path):
    DDIMScheduler(clip_sample=False, steps_offset=1).save_pretrained(tmp_path)
    diffusion = Diffusion.from_pretrained(tmp_path)
    assert diffusion.sampler_options == SamplerOptions("ddim", "leading", 1)
    given = ours(diffusion, steps=10, timestep_spacing="respacing", sampler="ddpm", variance_type="fixed_large")
    same(given, ours(steps=10, timestep_spacing="respacing", sampler="ddpm", variance_type="fixed_large"))
    same(ours(diffusion, steps=10, timestep_spacing="leading"), ours(diffusion, steps=10))
    assert not torch.equal(ours(diffusion, steps=10, steps_offset=2), ours(diffusion, steps=10))
    DDIMScheduler(clip_sample_range=0.5).save_pretrained(tmp_path)
    clipped = Diffusion.from_pretrained(tmp_path)
    assert float(ours(clipped, steps=10).abs().max()) <= 0.5 < float(ours(clipped, steps=10, clip_sample=2).abs().max())
    without = ours(Diffusion(LINEAR, SamplerOptions("ddim", "leading")), steps=10)
    assert torch.equal(ours(clipped, steps=10, clip_sample=float("inf")), without)


@pytest.mark.parametrize(
    "options, kind, match",
    [
        (
            dict(sampler="ddim", timestep_spacing="even"),
            ValueError,
            "timestep_spacing: got 'even'; expected one of str",
        ),
        (dict(variance_type="learned"), ValueError, "variance_type: got 'learned'; expected one of learned_range, fix"),
        (
            dict(variance_type="fixed_small"),
            ValueError,
            "variance_type: got 'fixed_small' with sampler 'ddim'; expecte",
        ),
        (dict(sampler="ddpm", set_alpha_to_one=False), ValueError, "set_alpha_to_one: got False with sampler 'ddpm'"),
        (dict(steps_offset=1), ValueError, "steps_offset: got 1; expected timestep_spacing 'leading'"),
        (dict(steps_offset=1.5), ValueError, "steps_offset: got 1.5; expected a whole number"),
        (
            dict(timestep_spacing="leading", steps_offset=41),
            ValueError,
            "steps_offset: got 41 with .* expected at most 39",
        ),
        (dict(timestep_spacing="ddim_respacing", steps=300), ValueError, "num_inference_steps: got 300 .* such as 334"),
        (dict(timesteps=[3, 5]), ValueError, r"timesteps: got \[3, 5\]; expected at least one, in falling order"),
        (dict(timesteps=[1000, 5]), ValueError, r"timesteps: got \[1000, 5\]; expected whole numbers of 0..999"),
        (dict(timesteps=[9, 5], steps=3), ValueError, "timesteps: got 2 with num_inference_steps 3; expected as many"),
        (dict(timesteps="9,5"), TypeError, "timesteps: got '9,5'; expected a list of numbers"),
        (dict(clip_sample=0), ValueError, "clip_sample: got 0; expected a positive number"),
        (dict(steps="9"), TypeError, "num_inference_steps: got '9'; expected a whole number"),
        (dict(eta=1.0), TypeError, "eta: got an option that there is not; expected sampler, timestep_spacing"),
        (dict(scale="x"), TypeError, "guidance_scale: got 'x'; expected a number"),
        (dict(scale=2.0, guidance_channels=0), ValueError, "guidance_channels: got 0; expected at least 1"),
        (dict(seed="x"), TypeError, "seed: got 'x'; expected a whole number"),
        (dict(seed=None), TypeError, "seed: got None; expected a whole number"),
        (dict(seed=2**64 - 1), ValueError, r"seed: got 18446744073709551616; expected at most 18446744073709551615"),
        (dict(seed=[1, -(2**63) - 1]), ValueError, "seed: got -9223372036854775809; expected at most .* at least -2"),
    ],
)
def test_refusals_before_any_work(options, kind, match):
    def never(*_):
        raise AssertionError("it was called")

    network = Network()
    network.forward = never
    fields = {"guidance_scale": options.pop("scale", 1.0), "num_inference_steps": options.pop("steps", None)}
    with pytest.raises(kind, match=match) as caught:
        sample_classes(network, Diffusion(LINEAR), LABELS, **fields, **options)
    assert "\n" not in str(caught.value)


def test_other_refusals():
    flow = Diffusion(DiffusionConfig())
    for options, match in (
        (
            dict(timestep_spacing="leading"),
            "timestep_spacing: got 'leading' with sampler 'euler'; expected one of trail",
        ),
        (dict(timesteps=[2.0]), r"timesteps: got \[2\] with noise_levels .* expected noise times in \(0, 1\]"),
        (dict(sampler="renoise", timestep_spacing="linspace"), "with sampler 'renoise'; expected it with euler"),
        (dict(variance_type="fixed_small"), "variance_type: .* expected none with noise_levels 'logit_normal'"),
    ):
        with pytest.raises(ValueError, match=match):
            ours(flow, **options)
    for wrong in (None, "abc", 3.5):
        with pytest.raises(TypeError, match="class_labels: got"):
            sample_classes(NETWORK, flow, wrong)
        with pytest.raises(TypeError, match="shape: got"):
            sample(NETWORK, flow, wrong, device="cpu")
    with pytest.raises(ValueError, match="variance_type: got 'learned_range' for a network that predicts no variance"):
        sample(lambda x, t: x, Diffusion(LINEAR), (1, 2), device="cpu", sampler="ddpm", variance_type="learned_range")
    with pytest.raises(ValueError, match="sampler: got 'euler' for prediction_type 'epsilon'"):
        Diffusion(LINEAR, SamplerOptions("euler"))


@pytest.mark.parametrize(
    "scheduler, changes, match",
    [
        (
            "DDIMScheduler",
            dict(timestep_spacing="even"),
            "timestep_spacing: got 'even'; expected one of trailing, lead",
        ),
        ("DDIMScheduler", dict(steps_offset=None), "steps_offset: got None; expected a whole number"),
        ("DDIMScheduler", dict(clip_sample="no"), "clip_sample: got 'no'; expected true or false"),
        ("DDIMScheduler", dict(clip_sample_range="1"), "clip_sample_range: got '1'; expected a number"),
        ("DDPMScheduler", dict(variance_type="learned"), "variance_type: got 'learned'; expected one of fixed_small"),
        ("DDPMScheduler", dict(variance_type="fixed_large_log"), "variance_type: got 'fixed_large_log'"),
        ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), "algorithm_type: got 'sde-dpmsolver"),
        ("DPMSolverMultistepScheduler", dict(solver_order=3), "solver_order: got 3; expected 2"),
        ("PNDMScheduler", {}, "_class_name: got 'PNDMScheduler'; expected one of DDIMScheduler, DDPMScheduler"),
    ],
)
def test_what_no_sampler_here_does_is_refused(tmp_path, scheduler, changes, match):
    getattr(diffusers, scheduler)().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=match) as caught:
        Diffusion.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, name",
    [
        (SamplerOptions(), "DDIMScheduler"),
        (SamplerOptions("ddpm", variance_type="fixed_large"), "DDPMScheduler"),
        (SamplerOptions("dpm-solver++"), "DPMSolverMultistepScheduler"),
        (SamplerOptions("ddim", "leading", 1, set_alpha_to_one=False), "DDIMScheduler"),
        (SamplerOptions("ddim", "respacing"), "Diffusion"),
        (SamplerOptions("ddim", timesteps=(5, 3)), "Diffusion"),
        (SamplerOptions("dpm-solver++", clip_sample=1.0), "Diffusion"),
        (SamplerOptions("ddim", clip_sample=1.0, use_clipped_model_output=True), "Diffusion"),
    ],
)
def test_what_is_written_is_how_it_samples(tmp_path, options, name):
    Diffusion(LINEAR, options).save_pretrained(tmp_path)
    assert Diffusion.from_pretrained(tmp_path).sampler_options == options
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == name
    if name != "Diffusion":
        scheduler = getattr(diffusers, name).from_pretrained(tmp_path)
        if name == "DDPMScheduler":  # from above level 0 its last step would add noise
            scheduler.register_to_config(timestep_spacing="leading", steps_offset=0)
            options = SamplerOptions("ddpm", "leading", variance_type=options.variance_type)
        same(ours(Diffusion(LINEAR, options), steps=50), theirs(scheduler, 50), 1e-4)
