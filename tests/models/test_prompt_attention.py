"""What text-to-image models attend to at chosen timesteps, and its pictures and arrays."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.diffusion import Diffusion, DiffusionConfig, prompt_attention, sample_prompts
from fastdiff.models import DiTConfig, TextToImage, TextToImageConfig
from fastdiff.nn import QFormerConfig, attention_maps, sink_share
from fastdiff.visualization import AttentionPanel, save_attention_heatmaps, save_prompt_attention, save_token_maps

PROMPTS, TOKENS = ("a red boot", "boot"), (["a", "red", "boot"], ["boot"])
SIZES = dict(input_size=4, patch_size=1, in_channels=3, hidden_size=16, depth=2, num_heads=4)


def model_of(kind):
    torch.manual_seed(0)
    crosses = kind == "cross_attention"
    more = (
        dict(conditioning="cross_attention", num_classes=0, null_label=False, class_dropout_prob=0)
        if crosses
        else dict(num_classes=3)
    )
    reader = None if crosses else QFormerConfig(hidden_size=16, num_queries=2, depth=2, num_heads=4)
    config = TextToImageConfig(dit=DiTConfig(**SIZES, **more), text_dim=8, conditioning=kind, q_former=reader)
    model = TextToImage(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # adaLN-Zero begins with nothing
    return model


@pytest.fixture(scope="module")
def process():
    return Diffusion(DiffusionConfig(noise_levels="linear", num_train_timesteps=100, prediction_type="epsilon"))


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(1)
    states, mask = torch.randn(2, 3, 8), torch.tensor([[True] * 3, [True, False, False]])
    return states * mask[..., None], mask


OPTIONS = dict(num_inference_steps=5, seed=3, guidance_scale=2.0)


@pytest.mark.parametrize("kind", ["q_former", "cross_attention"])
def test_maps_are_those_of_the_steps_and_samples_stay(kind, process, texts):
    model = model_of(kind)
    levels = []
    found = prompt_attention(model, process, *texts, [99, 30], callback=lambda *step: levels.append(step), **OPTIONS)
    condition = model.eval().condition(*texts)
    assert (found.samples - sample_prompts(model, process, condition, **OPTIONS)).abs().max() < 1e-4
    assert len(levels) == 5 and found.visited == {99: 99, 30: 39}  # 99, 79, 59, 39, 19
    queries, leading = (2, 0) if kind == "q_former" else (16, 1)
    assert found.leading_keys == leading and found.depends_on_time == (kind == "cross_attention")
    for rows in found.maps.values():
        assert [each.shape for each in rows] == [(2, 4, queries, leading + 3), (2, 4, queries, leading + 1)]
        assert all((each.sum(-1) - 1).abs().max() < 1e-5 for each in rows)
    same = torch.equal(found.maps[99][0], found.maps[30][0])
    assert same == (kind == "q_former")
    with attention_maps(model) as maps:
        condition = model.condition(*texts)
        if kind == "cross_attention":
            noise = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
            model(noise, torch.full((2,), 99.0), condition=condition)
    assert (maps[0][0] - found.maps[99][0]).abs().max() < 1e-5  # of the first step, by hand
    shares = torch.cat([sink_share(each[None], leading) for rows in found.maps.values() for each in rows])
    assert found.sink_share() == pytest.approx(shares.mean().item())
    assert found.even_share() == pytest.approx((1 / (leading + 3) + 1 / (leading + 1)) / 2)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([100], r"attention_timesteps: got 100; expected a level of the schedule, 0 … 99"),
        ([50, -1], r"attention_timesteps: got -1; expected a level"),
        ([50, 50], r"attention_timesteps: got \[50, 50\]; expected one or more, each once"),
        ([], r"attention_timesteps: got \[\]"),
    ],
)
def test_timesteps_outside_the_schedule_are_refused_before_work(timesteps, message, process, texts):
    with pytest.raises(ValueError, match=message):
        prompt_attention(model_of("q_former"), process, *texts, timesteps, callback=lambda *_: 1 / 0, **OPTIONS)


def test_maps_of_samples_at_timesteps_of_their_own(process, texts):
    model, chosen = model_of("cross_attention"), dict(timesteps=[90, 50, 20], seed=3)
    found = prompt_attention(model, process, *texts, attention_timesteps=[30, 99], **chosen)
    assert found.visited == {30: 20, 99: 90}
    expected = sample_prompts(model, process, model.eval().condition(*texts), **chosen)
    assert (found.samples - expected).abs().max() < 1e-4


def test_continuous_times(texts):
    process = Diffusion(DiffusionConfig(prediction_type="flow"))
    found = prompt_attention(model_of("cross_attention"), process, *texts, [0.5], num_inference_steps=4)
    assert found.visited == {0.5: 0.5} and list(found.maps) == [0.5]
    with pytest.raises(ValueError, match=r"attention_timesteps: got 500; expected a noise time, 0 to 1"):
        prompt_attention(model_of("cross_attention"), process, *texts, [500], num_inference_steps=4)


def test_pictures_and_arrays(process, texts, tmp_path):
    found = prompt_attention(model_of("cross_attention"), process, *texts, [99, 30], **OPTIONS)
    written = save_prompt_attention(found, PROMPTS, TOKENS, tmp_path / "all")
    assert [path.name for path in written] == ["attention_t99.png", "attention_t30.png", "attention.npz"]
    one = dataclasses.replace(found, maps={99: found.maps[99]})
    save_prompt_attention(one, PROMPTS, TOKENS, tmp_path / "heads", average="heads")
    heights = [Image.open(tmp_path / each / "attention_t99.png").height for each in ("all", "heads")]
    assert heights[0] < heights[1]  # more panels
    with np.load(tmp_path / "all" / "attention.npz", allow_pickle=False) as arrays:
        assert arrays["prompt0_t30"].shape == (2, 4, 16, 4) and arrays["visited"].tolist() == [99, 39]
        assert np.array_equal(arrays["prompt1_t99"], found.maps[99][1].numpy())
        assert arrays["prompt0_keys"].tolist() == ["(time)", "a", "red", "boot"]
        assert arrays["prompts"].tolist() == list(PROMPTS) and len(arrays["layers"]) == 2
    save_token_maps(found, 99, PROMPTS, TOKENS, tmp_path / "tokens.png")
    assert Image.open(tmp_path / "tokens.png").width > 300
    with pytest.raises(ValueError, match=r"tokens: got \[2, 2\] keys of 2 prompts; expected \[4, 2\]"):
        save_prompt_attention(found, PROMPTS, [["a"], ["boot"]], tmp_path)
    with pytest.raises(ValueError, match="average: got 'layers'"):
        save_prompt_attention(found, PROMPTS, TOKENS, tmp_path, average="layers")


def test_pictures_of_a_q_former(process, texts, tmp_path):
    found = prompt_attention(model_of("q_former"), process, *texts, [99, 30], **OPTIONS)
    written = save_prompt_attention(found, PROMPTS, TOKENS, tmp_path / "maps")
    assert [path.name for path in written] == ["attention.png", "attention.npz"]
    save_prompt_attention(found, PROMPTS, TOKENS, tmp_path / "heads", average="none")
    heights = [Image.open(tmp_path / each / "attention.png").height for each in ("maps", "heads")]
    assert heights[0] < heights[1] / 3  # 2 panels in a row; 16 in rows of 3
    with pytest.raises(ValueError, match="attention: got maps of 2 queries; expected those of a DiT's image tokens"):
        save_token_maps(found, 99, PROMPTS, TOKENS, tmp_path / "tokens.png")


def test_heatmaps_that_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"panels: got a map \[2, 3\] with 2 keys"):
        save_attention_heatmaps([AttentionPanel(torch.ones(2, 3), ["a", "b"], "x")], tmp_path / "a.png")
    with pytest.raises(ValueError, match="panels: got none"):
        save_attention_heatmaps([], tmp_path / "a.png")
