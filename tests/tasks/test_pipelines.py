"""Pipelines of diffusers and facebookresearch/DiT files through fastdiff.load: whole, and drawn as public code does."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, Transformer2DModel
from models import public_samplers as public
from models.plain_llm2dit import PlainLLM2DiT
from models.test_dit_checkpoints import PlainDiT, diffusers_model, randomised
from tasks.test_load import fails

import fastdiff
from fastdiff import sample

NAMES = {str(label): f"thing {label}, t{label}, bird" for label in range(1000)}


def autoencoder(**options):
    torch.manual_seed(0)
    blocks = {f"{way}_block_types": (f"{kind}EncoderBlock2D".replace("UpEncoder", "UpDecoder"),) * 2
              for way, kind in (("down", "Down"), ("up", "Up"))}  # fmt: skip
    return AutoencoderKL(
        **{**blocks, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16,
           "latent_channels": 4, "scaling_factor": 0.18215, **options}
    ).eval()  # fmt: skip


def older_transformer(**options):
    """The model as published pipelines name it."""
    torch.manual_seed(0)
    return randomised(
        Transformer2DModel(
            **{**dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
                      sample_size=8, patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=1000,
                      activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False),
               **options}
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder that DiTPipeline wrote, and the pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = DiTPipeline(older_transformer(), autoencoder(), DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": NAMES}))
    pipe.set_progress_bar_config(disable=True)
    return folder, pipe


def theirs(pipe, labels, *, steps, scale, seed=0):
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(labels))]
    called = dict(guidance_scale=scale, num_inference_steps=steps, generator=generators)
    return pipe(list(labels), output_type="pil", **called).images


def test_a_pipeline_loads_whole_and_draws_what_it_draws(pipeline, recwarn):
    folder, pipe = pipeline
    run = fastdiff.load(folder, device="cpu")
    assert not [each for each in recwarn if "assuming" in str(each.message)]
    for steps, scale, seed in ((10, 1.0, 0), (50, 4.0, 5)):
        found = run.sample([207, 360], num_inference_steps=steps, guidance_scale=scale, seed=seed)
        expected = theirs(pipe, (207, 360), steps=steps, scale=scale, seed=seed)
        for one, other in zip(found, expected, strict=True):
            assert one.mode == "RGB" and one.size == (16, 16) == other.size
            difference = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
            assert difference.max() <= 1 and difference.mean() < 0.01  # seen: 0; a rounding may fall elsewhere
            assert np.asarray(one).std() > 1
    assert run.sampling.num_inference_steps == 50 and run.sampling.guidance_scale == 4.0  # of the pipeline's call
    latents = run.sample([207], num_inference_steps=2, output_type="latent")
    images = run.sample([207], num_inference_steps=2, output_type="pt")
    assert latents.shape == (1, 4, 8, 8) and images.shape == (1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(images, pipe.vae.decode(latents / 0.18215).sample, rtol=1e-4, atol=1e-4)
    by_name = [run.sample(each, num_inference_steps=2, output_type="pt") for each in ("thing 207, t207, bird", "t207")]
    assert torch.equal(by_name[0], images) and torch.equal(by_name[1], images)
    fails("labels: got 'bird'; expected 0 to 999 or a class's name", run.sample, "bird")  # of many classes


def test_what_is_saved_of_a_pipeline_draws_the_same(pipeline, tmp_path):
    run = fastdiff.load(pipeline[0], device="cpu")
    run.save_pretrained(tmp_path / "saved")
    again = fastdiff.load(tmp_path / "saved", device="cpu")
    assert again.class_names == run.class_names and again.diffusion.sampler_options == run.diffusion.sampler_options
    options = dict(num_inference_steps=7, output_type="pt")
    torch.testing.assert_close(again.sample([1, 2], **options), run.sample([1, 2], **options), rtol=0, atol=1e-5)
    assert 'images[0].save("sample.png")' in (tmp_path / "saved" / "README.md").read_text()


def test_images_are_decoded_a_few_at_a_time(pipeline, monkeypatch):
    run, sizes = fastdiff.load(pipeline[0], device="cpu"), []
    decode = run.decoder.decode
    monkeypatch.setattr(run.decoder, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    images = run.sample([1] * 19, num_inference_steps=1)
    assert len(images) == 19 and sizes == [8, 8, 3]


def test_the_command_draws_a_pipelines_images(pipeline, tmp_path, monkeypatch, capsys):
    from fastdiff import visualization

    seen = {}
    drawn = visualization.save_sample_grid

    def save_sample_grid(images, labels, names, path, **options):
        seen.update(images=images, labels=labels.tolist(), title=options["title"])
        return drawn(images, labels, names, path, **options)

    monkeypatch.setattr(visualization, "save_sample_grid", save_sample_grid)
    folder, options = pipeline[0], ["--labels", "207,360", "--images-per-label", "2", "--device", "cpu"]
    options += ["--timesteps", "900,300,10", "--sampler", "ddpm", "--variance-type", "fixed_large"]
    options += ["--guidance-channels", "3", "--seed", "4", "--output", str(tmp_path / "grid.png")]
    sample.main([str(folder), *options])
    assert capsys.readouterr().out.strip() == str(tmp_path / "grid.png") and (tmp_path / "grid.png").is_file()
    run = fastdiff.load(folder, device="cpu")
    expected = run.sample(
        [207, 360], num_images_per_class=2, timesteps=[900, 300, 10], sampler="ddpm", variance_type="fixed_large",
        guidance_channels=3, seed=4, output_type="pt",
    )  # fmt: skip
    assert torch.equal(seen["images"], expected) and seen["labels"] == [207, 207, 360, 360]
    assert seen["title"] == "guidance 4, 3 denoising steps"
    with pytest.raises(SystemExit):
        sample.main([str(folder), "--timesteps", "9,x", "--device", "cpu"])
    assert "--timesteps: got '9,x'; expected numbers with commas" in capsys.readouterr().err


def test_latents_without_a_decoder_are_no_pictures(tmp_path, capsys):
    older_transformer().save_pretrained(tmp_path / "transformer")
    with pytest.warns(UserWarning, match="assuming"), pytest.raises(SystemExit):
        sample.main([str(tmp_path), "--labels", "1", "--device", "cpu"])
    out, told = capsys.readouterr()
    assert "error: " in told and "got a model of latents with 4 channels and no decoder" in told
    assert "sampling" not in told and not out


def changed(pipeline, tmp_path, file, **changes):
    """A copy of the pipeline's folder with keys of a JSON file replaced."""
    folder = shutil.copytree(pipeline[0], tmp_path / "changed", dirs_exist_ok=True)
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "file, changes, match",
    [
        ("vae/config.json", dict(latent_channels=8), "latent_channels: got 8; expected 4, as the DiT beside it has"),
        ("vae/config.json", dict(_class_name="VQModel"), "_class_name: got 'VQModel'; expected 'AutoencoderKL'"),
        ("vae/config.json", dict(shift_factor=0.1), "shift_factor: got 0.1; expected null"),
        ("vae/config.json", dict(layers_per_block=10**7), "layers_per_block: got 10000000 with "),
        ("vae/config.json", dict(layers_per_block=2), "the weights are not those of its configuration: missing"),
        ("scheduler/scheduler_config.json", dict(thresholding=True), "thresholding: got True; expected False"),
        ("model_index.json", dict(id2label={"0": "a"}), "id2label: got 1 names; expected those of 0 to 999"),
        ("model_index.json", dict(id2label={"a": "b"}), "id2label: got 1 names; expected those of 0 to 999"),
        ("transformer/config.json", dict(norm_type="layer_norm"), "norm_type: got 'layer_norm'; expected 'ada_norm_ze"),
        ("transformer/config.json", dict(cross_attention_dim=8), "cross_attention_dim: got 8; expected None"),
    ],
)
def test_what_does_not_fit_is_refused_when_loading(pipeline, tmp_path, file, changes, match):
    fails(match, fastdiff.load, changed(pipeline, tmp_path, file, **changes), device="cpu")


def test_a_pipeline_of_one_variant(pipeline, tmp_path):
    folder = changed(pipeline, tmp_path, "vae/config.json")
    for part in ("vae", "transformer"):
        weights = folder / part / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    runs = [fastdiff.load(path, device="cpu") for path in (folder, pipeline[0])]
    images = [run.sample([1], num_inference_steps=2, output_type="pt") for run in runs]
    assert torch.equal(*images)


def test_damaged_decoders_are_one_line(pipeline, tmp_path):
    weights = changed(pipeline, tmp_path, "vae/config.json") / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails("vae: not an AutoencoderKL that can be loaded", fastdiff.load, weights.parent.parent, device="cpu")
    weights.unlink()
    fails("vae: not an AutoencoderKL that can be loaded", fastdiff.load, weights.parent.parent, device="cpu")


def test_the_older_name_means_the_same_model_with_other_defaults(tmp_path):
    older = older_transformer()
    older.save_pretrained(tmp_path)
    model = fastdiff.models.DiT.from_pretrained(tmp_path)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([1, 1000])
    with torch.no_grad():
        expected = older(x, timestep=t, class_labels=labels).sample
        torch.testing.assert_close(model(x, t, labels), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, match in (("norm_type", "norm_type: got 'layer_norm'"), ("activation_fn", "activation_fn: got 'geglu'")):
        (tmp_path / "config.json").write_text(json.dumps({name: v for name, v in config.items() if name != key}))
        fails(match, fastdiff.load, tmp_path, device="cpu")


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_facebookresearch_file_is_sampled_as_there(tmp_path, learn_sigma):
    """sample.py: ddpm over 250 respaced steps, guidance 4 of the first three channels, learnt or large variance."""
    plain = randomised(PlainDiT(depth=1, out_channels=8 if learn_sigma else 4))
    torch.save(plain.state_dict(), tmp_path / "a.pt")
    told = r"ddpm, 250 steps, timestep_spacing 'respacing', guidance 4 of the first 3 channels"
    with pytest.warns(UserWarning, match=told) as caught:
        run = fastdiff.load(tmp_path / "a.pt", device="cpu", num_heads=4)
    assert len([each for each in caught if "assuming" in str(each.message)]) == 1
    assert run.sampling.num_inference_steps == 250 and run.sampling.guidance_channels == 3

    @torch.no_grad()
    def network(x, t, labels):
        output = plain(x, t, labels)
        return output if learn_sigma else torch.cat([output, output], 1)

    guided = public.guided_network(network, 7, 4.0, 3)
    fresh, labels = public.noises([2, 3], (4, 8, 8)), torch.tensor([1, 5])
    kind = "learned_range" if learn_sigma else "fixed_large"
    expected = public.SpacedDiffusion("20").draw(guided, labels, fresh, kind=kind)
    found = run.sample([1, 5], num_inference_steps=20, seed=2, output_type="latent")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    run.save_pretrained(tmp_path / "saved")
    again = fastdiff.load(tmp_path / "saved", device="cpu")
    assert torch.equal(again.sample([1, 5], num_inference_steps=20, seed=2, output_type="latent"), found)
    every = run.sample([1, 5], num_inference_steps=20, seed=2, output_type="latent", guidance_channels=4)
    assert not torch.equal(every, found)


def test_a_file_of_llm2dit_is_sampled_as_there(tmp_path):
    """Its time is (level + 1) / levels; ddpm over all levels with the large variance, no guidance."""
    plain = randomised(PlainLLM2DiT(dim=64, layers=2, heads=4, text_dim=16))
    torch.save(plain.state_dict(), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="as by LLM2DiT .ddpm, 1000 steps, .* guidance 1 of") as caught:
        run = fastdiff.load(tmp_path / "a.pth", device="cpu", num_heads=4)
    assert any("its Q-Former is left out" in str(each.message) for each in caught)
    assert run.diffusion.model_time(torch.tensor([0, 499, 999])).tolist() == pytest.approx([0.001, 0.5, 1.0])
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([4, 10])
    with torch.no_grad():
        expected = plain(x, torch.tensor([0.001, 0.5]), labels)
        found = run.model(x, run.diffusion.model_time(torch.tensor([0, 499])), labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    options = dict(num_inference_steps=3, seed=2, output_type="latent")
    run.save_pretrained(tmp_path / "saved")
    again = fastdiff.load(tmp_path / "saved", device="cpu")
    assert again.diffusion.config == run.diffusion.config
    assert torch.equal(again.sample([1, 5], **options), run.sample([1, 5], **options))


def test_a_folder_without_a_scheduler_says_what_is_assumed(tmp_path):
    diffusers_model().save_pretrained(tmp_path)
    told = r"1000 levels, linear betas, predicted noise\), sampled as by diffusers' DiTPipeline \(ddim, 50 steps, .*all"
    with pytest.warns(UserWarning, match=told):
        run = fastdiff.load(tmp_path, device="cpu")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "scheduler")
    named = fastdiff.load(tmp_path, device="cpu")
    options = dict(num_inference_steps=10, output_type="latent")
    assert torch.equal(run.sample([1], **options), named.sample([1], **options))
    DDPMScheduler(clip_sample=False, variance_type="learned_range").save_pretrained(tmp_path / "scheduler")
    assert fastdiff.load(tmp_path, device="cpu").diffusion.sampler_options.sampler == "ddpm"


def test_a_runs_scheduler_says_how_the_run_samples(runs, tmp_path):
    run = fastdiff.load(runs / "dit", device="cpu")
    for given in ({"timestep_spacing": "linspace"}, {"timesteps": [1.0, 0.4]}):
        sampling = run.sampling.replaced({"sampler": "euler", **given})
        other = type(run)(**{**vars(run), "sampling": sampling})
        other.save_pretrained(tmp_path)
        again = fastdiff.load(tmp_path, device="cpu")
        assert again.sampling == sampling and again.diffusion.sampler_options.sampler == "euler"
        assert torch.equal(again.sample([1], output_type="pt"), run.sample([1], output_type="pt", **given))


def test_wrong_arguments_are_one_line(runs):
    run = fastdiff.load(runs / "dit", device="cpu")
    fails("seed: got 'x'; expected a whole number", run.sample, [1], seed="x", kind=TypeError)
    fails("seed: got 18446744073709551616; expected at most", run.sample, [1, 2], seed=2**64 - 1)
    fails("num_images_per_class: got '2'", run.sample, [1], num_images_per_class="2", kind=TypeError)
    fails("num_inference_steps: got 2.5", run.sample, [1], num_inference_steps=2.5, kind=TypeError)
    fails("guidance_scale: got 'x'", run.sample, [1], guidance_scale="x", kind=TypeError)
    fails("labels: got 3.5; expected class labels", run.sample, 3.5, kind=TypeError)
    fails(r"labels: got \[None\]; expected class labels", run.sample, [None], kind=TypeError)
    fails("steps: got an option that there is not", run.sample, [1], steps=3, kind=TypeError)
    fails("images_per_class: got an option that there is not", run.sample, [1], images_per_class=3, kind=TypeError)
    fails("sampler: got 'ddim' for prediction_type", run.sample, [1], sampler="ddim")
    fails("timesteps: got 5; expected a list", run.sample, [1], timesteps=5, kind=TypeError)
    qgfd = fastdiff.load(runs / "qgfd", device="cpu")
    fails("num_samples: got '2'", qgfd.sample, num_samples="2", kind=TypeError)
    fails("seed: got 'x'", qgfd.sample, seed="x", kind=TypeError)
    fails("seed: got 36893488147419103232", qgfd.sample, seed=2**65)
