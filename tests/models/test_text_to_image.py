"""Text to image against the published systems written plainly: the same weights, numbers, gradients and images."""

import pytest
import torch
from models import plain_latent_diffusion as latent
from models import plain_llm2dit as llm2dit
from models import public_samplers as public
from models.random_weights import random_weights
from safetensors.torch import save_file
from torch import nn

from fastdiff.diffusion import Diffusion, DiffusionConfig, sample_classes, sample_prompts
from fastdiff.models import DiT, TextToImage, TextToImageConfig, preset_config
from fastdiff.nn import QFormerConfig

LEVELS = 12
NOISE = Diffusion(DiffusionConfig("epsilon", "linear", num_train_timesteps=LEVELS, time_scale=1.0))
IMAGES = Diffusion(DiffusionConfig("sample", "beta", time_scale=100.0))
# of plain and fused operators: sums in another order
CLOSE = 2e-5


def published(model, folder):
    """The model read from a file as its authors save it."""
    path = folder / "published.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    torch.manual_seed(0)
    plain = random_weights(llm2dit.PlainLLM2DiT(dim=64, layers=3, heads=4, text_dim=48, queries=3))
    path = published(plain, tmp_path_factory.mktemp("llm2dit"))
    return plain, TextToImage.from_pretrained(path, num_heads=4)


@pytest.fixture(scope="module")
def texts():
    torch.manual_seed(2)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 3:], mask[2, 5:] = False, False
    return torch.randn(3, 7, 48), mask


@pytest.fixture(params=["flash", "torch", "table"])
def latents(request, tmp_path):
    torch.manual_seed(0)
    options = dict(attention=latent.TorchAttention) if request.param == "torch" else {}
    options |= dict(table=16, patch=2) if request.param == "table" else {}
    plain = random_weights(latent.PlainLatentDiffusion(64, 3, 2, 4, size=8, **options))
    ours = TextToImage.from_pretrained(published(plain, tmp_path), num_heads=2)
    labels = torch.tensor([3, 0, 9])
    states = nn.functional.one_hot(labels, 10).float()[:, None]
    return plain, ours, labels if request.param == "table" else states[:, 0], states


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ LLM2DiT


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 8, 8)])
def test_llm2dit_predicts_what_it_predicts_with_texts_and_with_labels(llm, texts, shape):
    plain, ours = llm
    x, t = torch.randn(3, *shape), torch.tensor([1.0, 0.5, 0.003])
    with torch.no_grad():
        expected = plain(x, t, text_states=texts[0], text_mask=texts[1])
        found = ours(x, t, text_states=texts[0], text_mask=texts[1])
        assert difference(found, expected) < CLOSE
        expected = plain(x, t, labels=torch.tensor([2, 10, 0]))
        assert difference(ours.dit(x, t, torch.tensor([2, 10, 0])), expected) < CLOSE
    assert torch.equal(ours.condition(*texts)["layer_embedding"], ours.q_former(*texts))


def test_llm2dit_learns_as_it_learns_with_its_dit_frozen(llm, texts):
    plain, ours = llm
    x0, noise = torch.randn(2, 3, 3, 32, 32).unbind()
    level = torch.tensor([1, 7, LEVELS])
    plain.requires_grad_(False)
    plain.query_embedder.requires_grad_(True)
    expected_loss = llm2dit.loss(plain, x0, level, noise, *texts, LEVELS)
    expected = gradients(expected_loss, plain)
    ours.dit.requires_grad_(False)
    losses = NOISE.loss(lambda x, time: ours(x, time, text_states=texts[0], text_mask=texts[1]), x0, level - 1, noise)
    found = gradients(losses.mean(), ours)
    assert losses.mean().item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert all(name.startswith("q_former.") for name in found) and len(found) == len(list(ours.q_former.parameters()))
    pairs = {
        "q_former.queries.weight": expected["query_embedder.query_table.weight"],
        "q_former.query_to_layer.weight": expected["query_embedder.query_to_layer.weight"],
        "q_former.blocks.0.self_attn.qkv.weight": torch.cat(
            [expected[f"query_embedder.blocks.0.self_attn.w{letter}.weight"] for letter in "qkv"]
        ),
        "q_former.blocks.1.cross_attn.wk.weight": expected["query_embedder.blocks.1.cross_attn.wk.weight"],
        "q_former.blocks.1.ffn.down_proj.weight": expected["query_embedder.blocks.1.ffn.w2.weight"],
        "q_former.blocks.0.cross_attn.q_norm.weight": expected["query_embedder.blocks.0.cross_attn.q_norm.weight"],
    }
    for name, gradient in pairs.items():
        assert difference(found[name], gradient) < 1e-4, name


def test_llm2dit_trained_as_a_whole_has_the_gradients_of_every_part(llm, texts):
    plain, ours = llm
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0.2, 0.5, 0.9])
    plain.requires_grad_(True)
    ours.requires_grad_(True)
    expected = gradients(plain(x, t, text_states=texts[0], text_mask=texts[1]).square().mean(), plain)
    found = gradients(ours(x, t, text_states=texts[0], text_mask=texts[1]).square().mean(), ours)
    for name, theirs in {
        "dit.stem.0.weight": "init_conv_seq.0.weight",
        "dit.blocks.0.attn.proj.weight": "layers.0.attention.wo.weight",
        "dit.blocks.1.norm1.weight": "layers.1.attention_norm.weight",
        "dit.blocks.2.mlp.gate_proj.weight": "layers.2.feed_forward.w1.weight",
        "dit.blocks.2.adaLN_modulation.1.weight": "layers.2.adaLN_modulation.1.weight",
        "dit.final_layer.adaLN_modulation.1.bias": "final_layer.adaLN_modulation.1.bias",
        "dit.t_embedder.mlp.0.weight": "t_embedder.mlp.0.weight",
    }.items():
        assert difference(found[name], expected[theirs]) < 1e-4, name
    assert difference(found["dit.blocks.0.attn.k_norm.weight"].sort()[0],
                      expected["layers.0.attention.k_norm.weight"].sort()[0]) < 1e-4  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_llm2dit_draws_the_images_that_it_draws(llm, texts, scale):
    plain, ours = llm
    seeds, shape = [5, 6, 7], (3, 16, 16)
    expected = llm2dit.draw(plain, public.noises(seeds, shape), *texts, LEVELS, scale, shape)
    with torch.no_grad():
        condition = ours.condition(*texts)
    options = dict(num_inference_steps=LEVELS, sampler="ddpm", variance_type="fixed_large", seed=seeds, sample_size=16)
    found = sample_prompts(ours, NOISE, condition, guidance_scale=scale, **options)
    assert difference(found, expected) < 1e-4
    as_labels = sample_prompts(ours, NOISE, ours.null_condition(3), **options)
    assert difference(sample_classes(ours.dit, NOISE, [10] * 3, **options), as_labels) < CLOSE


def test_prompts_that_are_the_same_are_modulated_once(llm, texts, monkeypatch):
    ours, asked = llm[1], []
    made = DiT.modulations
    monkeypatch.setattr(DiT, "modulations", lambda self, times, **given: (
        asked.append(len(given["layer_embedding"])), made(self, times, **given))[1])  # fmt: skip
    condition = {name: tensor[[0, 1, 0, 0]].detach() for name, tensor in ours.condition(*texts).items()}
    options = dict(num_inference_steps=4, sample_size=8, guidance_scale=2.0)
    found = sample_prompts(ours, NOISE, condition, **options)
    assert set(asked) == {3}  # two prompts and no prompt
    hook = ours.dit.blocks[0].register_forward_hook(lambda *_: None)  # a wrapped model is called as it is
    asked.clear()
    assert difference(sample_prompts(ours, NOISE, condition, **options), found) < CLOSE and not asked
    hook.remove()


# ------------------------------------------------------------------------------------------------ latents


def test_latent_diffusion_predicts_what_it_predicts(latents):
    plain, ours, text, states = latents
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.99, 0.4, 0.01])
    with torch.no_grad():
        assert difference(ours(x, 100 * t, text_states=states), plain(x, text, t)) < CLOSE


def test_latent_diffusion_learns_as_it_learns(latents):
    plain, ours, text, states = latents
    if text.dtype == torch.int64:
        pytest.skip("with a table its dropped label is class 0")
    x0, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    t, dropped = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([False, True, False])
    expected_loss = latent.loss(plain, x0, t, noise, text, dropped)
    expected = gradients(expected_loss, plain)
    losses = IMAGES.loss(lambda x, time: ours(x, time, text_states=states, dropped=dropped), x0, t, noise)
    found = gradients(losses.mean(), ours)
    assert losses.mean().item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert len(found) == len(list(ours.parameters()))
    for name, theirs in {
        "dit.pos_embed": "pos_embed",
        "text_proj.weight": "text_proj.weight",
        "text_proj.bias": "text_proj.bias",
        "dit.context_norm.weight": "context_norm.weight",
        "dit.t_embedder.mlp.2.weight": "time_embed.3.weight",
        "dit.blocks.0.mlp.conv.weight": "blocks.0.mlp.dw.weight",
        "dit.blocks.1.mlp.conv.bias": "blocks.1.mlp.dw.bias",
        "dit.blocks.2.mlp.fc1.bias": "blocks.2.mlp.fc1.bias",
        "dit.blocks.1.cross_attn.wo.weight": "blocks.1.attn2.out_proj.weight",
        "dit.x_embedder.proj.weight": "patch_embed.proj.weight",
    }.items():
        assert difference(found[name], expected[theirs]) < 1e-4, name


def test_latent_diffusion_draws_the_images_that_it_draws(latents):
    plain, ours, text, states = latents
    seeds, steps = [4, 5, 6], 5
    expected = latent.draw(plain, public.noises(seeds, (4, 8, 8)), text, steps)
    with torch.no_grad():
        condition = ours.condition(states)
    after = []
    # its result is what ours holds before a last prediction
    sample_prompts(ours, IMAGES, condition, num_inference_steps=steps + 1, sampler="renoise", seed=seeds,
                   callback=lambda step, _, x, __: after.append(x))  # fmt: skip
    assert difference(after[steps - 1], expected) < 1e-4


# ------------------------------------------------------------------------------------------------ presets


def test_presets_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        plain, ours = llm2dit.PlainLLM2DiT(), TextToImage.from_preset("llm2dit")
        count = sum(p.numel() for p in ours.parameters())
        assert count == sum(p.numel() for p in plain.parameters()) == 32_403_892
        assert sum(p.numel() for p in ours.q_former.parameters()) == 19_095_848
        plain, ours = latent.PlainLatentDiffusion(), TextToImage.from_preset("fmnist_t2i")
        count = sum(p.numel() for p in ours.parameters())
        assert count == sum(p.numel() for p in plain.parameters()) - plain.null_token.numel() == 28_776_964


def test_a_model_around_a_trained_dit_is_that_dit(llm):
    dit = llm[1].dit
    config = TextToImageConfig(dit=dit.config, text_dim=20, q_former=QFormerConfig(hidden_size=16, num_heads=2))
    model = TextToImage.from_dit(dit, config)
    assert model.dit is dit and model.q_former.text_proj.in_features == 20
    wider = TextToImageConfig(dit=preset_config("llm2dit"), text_dim=20)
    with pytest.raises(ValueError, match="dit.hidden_size: got 256; the trained DiT has 64"):
        TextToImage.from_dit(dit, wider)


def test_a_file_of_a_dit_alone_is_a_dit(llm, tmp_path):
    plain, ours = llm
    state = {name: t for name, t in plain.state_dict().items() if not name.startswith("query_embedder.")}
    save_file(state, tmp_path / "dit.safetensors")
    dit = DiT.from_pretrained(tmp_path / "dit.safetensors", num_heads=4)
    assert all(torch.equal(tensor, ours.dit.state_dict()[name]) for name, tensor in dit.state_dict().items())
    with pytest.raises(ValueError, match="dit.safetensors: not a checkpoint of LLM2DiT .* it has no Q-Former"):
        TextToImage.from_pretrained(tmp_path / "dit.safetensors", num_heads=4)
    state["layers.1.extra.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match=r"dit.safetensors: .*layers\.1\.extra\.weight"):
        DiT.from_pretrained(tmp_path / "dit.safetensors", num_heads=4)
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="a.safetensors: not a checkpoint of LLM2DiT or latent Fashion-MNIST diffusion"
    ):
        TextToImage.from_pretrained(tmp_path / "a.safetensors")
