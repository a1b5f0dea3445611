"""Checkpoints: our own folders, facebookresearch/DiT's files and diffusers' folders, whole and damaged."""

import argparse
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from fastdiff.models import DiT
from fastdiff.nn import sincos_2d

TOLERANCE = dict(rtol=0, atol=1e-5)  # seen: 2e-6 (fp32, outputs of size 1)


class PlainDiT(nn.Module):
    """facebookresearch/DiT written plainly: its parameter names and its order of operations, nothing fused."""

    def __init__(self, grid=4, patch=2, channels=4, dim=48, depth=3, heads=4, classes=7, out_channels=8):
        super().__init__()
        self.grid, self.patch, self.dim, self.heads, self.out_channels = grid, patch, dim, heads, out_channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, stride=patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.pos_embed = nn.Parameter(self.positions()[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn": nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)}),
                    "mlp": nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)}),
                    "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)),
                }
            )
            for _ in range(depth)
        )
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(dim, patch * patch * out_channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)),
            }
        )

    def positions(self):
        rows = []
        for y in range(self.grid):
            for x in range(self.grid):
                row = []
                for coordinate in (x, y):
                    angles = [coordinate / 10000 ** (i / (self.dim / 4)) for i in range(self.dim // 4)]
                    row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                rows.append(row)
        return torch.tensor(rows)

    def modulated(self, x, shift, scale):
        return F.layer_norm(x, (self.dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def forward(self, image, timestep, labels):
        x = self.x_embedder["proj"](image).flatten(2).transpose(1, 2) + self.pos_embed
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = timestep[:, None].float() * frequencies
        time = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=-1))
        c = time + self.y_embedder["embedding_table"](labels)
        for block in self.blocks:
            s1, c1, g1, s2, c2, g2 = block["adaLN_modulation"](c).chunk(6, dim=1)
            q, k, v = block["attn"]["qkv"](self.modulated(x, s1, c1)).chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + g1[:, None] * block["attn"]["proj"]((weights @ v).transpose(1, 2).flatten(2))
            hidden = F.gelu(block["mlp"]["fc1"](self.modulated(x, s2, c2)), approximate="tanh")
            x = x + g2[:, None] * block["mlp"]["fc2"](hidden)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        x = self.final_layer["linear"](self.modulated(x, shift, scale))
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(-1, (self.patch, self.patch, self.out_channels))
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.out_channels, *image.shape[2:])


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / parameter[0].numel() ** 0.5)
    return model.eval()


def inputs(channels=4, size=8, classes=7):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, channels, size, size, generator=generator)
    return image, torch.tensor([0, 37, 999]), torch.tensor([0, 3, classes])


@pytest.fixture(scope="module")
def plain():
    return randomised(PlainDiT())


@pytest.mark.parametrize("layout", ["state_dict", "training checkpoint", "wrapped", "safetensors"])
def test_facebookresearch_checkpoint_gives_the_same_output(plain, tmp_path, layout):
    state = plain.state_dict()
    path = tmp_path / "DiT.pt"
    if layout == "state_dict":
        torch.save(state, path)
    elif layout == "training checkpoint":
        other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        arguments = argparse.Namespace(model="DiT-S/2", num_classes=7)
        torch.save({"model": other, "ema": state, "opt": {"state": {}}, "args": arguments}, path)
    elif layout == "wrapped":
        torch.save({"module." + name: tensor for name, tensor in state.items()}, path)
    else:
        path = tmp_path / "DiT.safetensors"
        save_file(state, path)
    model = DiT.from_pretrained(path, num_heads=4)
    assert model.config.learn_sigma and model.config.num_classes == 7 and model.config.image_size == (8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), plain(*inputs()), **TOLERANCE)


def test_heads_come_from_the_width_of_a_preset_or_must_be_given(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: .*width 48 .*num_heads="):
        DiT.from_pretrained(tmp_path / "a.pt")
    small = PlainDiT(dim=384, depth=1, heads=6)
    torch.save(small.state_dict(), tmp_path / "b.pt")
    assert DiT.from_pretrained(tmp_path / "b.pt").config.num_heads == 6


def test_learnt_positions_are_refused_not_replaced(plain, tmp_path):
    state = dict(plain.state_dict())
    state["pos_embed"] = state["pos_embed"] + 0.1
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="pos_embed"):
        DiT.from_pretrained(tmp_path / "a.pt", num_heads=4)


def diffusers_model(**options):
    config = dict(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        num_embeds_ada_norm=7,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomised(DiTTransformer2DModel(**{**config, **options}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(activation_fn="gelu", out_channels=4, norm_eps=1e-3),
        dict(attention_bias=False, norm_elementwise_affine=True),
    ],
)
def test_diffusers_folder_gives_the_same_output(tmp_path, options):
    theirs = diffusers_model(**options)
    theirs.save_pretrained(tmp_path)
    model = DiT.from_pretrained(tmp_path)
    assert model.config.embedders_per_block  # random weights: each block has its own
    image, timestep, labels = inputs()
    with torch.no_grad():
        expected = theirs(image, timestep=timestep, class_labels=labels).sample
        torch.testing.assert_close(model(image, timestep, labels), expected, **TOLERANCE)


def test_diffusers_shards_pickles_and_pipelines(tmp_path):
    theirs = diffusers_model()
    image, timestep, labels = inputs()
    with torch.no_grad():
        expected = theirs(image, timestep=timestep, class_labels=labels).sample
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert list((tmp_path / "sharded").glob("*.index.json"))
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    for name in ("sharded", "pickled", "pipeline"):
        with torch.no_grad():
            torch.testing.assert_close(
                DiT.from_pretrained(tmp_path / name)(image, timestep, labels), expected, **TOLERANCE
            )


def test_diffusers_equal_embedders_are_kept_once(tmp_path):
    theirs = diffusers_model()
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    theirs.save_pretrained(tmp_path)
    model = DiT.from_pretrained(tmp_path)
    assert not model.config.embedders_per_block
    image, timestep, labels = inputs()
    with torch.no_grad():
        expected = theirs(image, timestep=timestep, class_labels=labels).sample
        torch.testing.assert_close(model(image, timestep, labels), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(activation_fn="geglu"), "activation_fn"),
        (dict(dropout=0.5), "dropout"),
        (dict(out_channels=5), "5 output"),
    ],
)
def test_diffusers_options_that_do_not_exist_here_are_named(tmp_path, change, message):
    diffusers_model(**change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DiT.from_pretrained(tmp_path)


def small_model(**overrides):
    options = dict(hidden_size=32, depth=2, num_heads=2, input_size=(8, 12), patch_size=2, num_classes=7)
    return randomised(DiT.from_preset("DiT-S/2", **{**options, **overrides}))


@pytest.mark.parametrize("overrides", [{}, dict(norm="rms", norm_elementwise_affine=True, learn_sigma=True)])
def test_round_trip_is_exact(tmp_path, overrides):
    model = small_model(**overrides)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = DiT.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and not again.training
    image = torch.randn(2, 4, 8, 12)
    time = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        torch.testing.assert_close(again(image, time), model(image, time), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_dtype_and_free_fields_may_change_on_loading(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = DiT.from_pretrained(tmp_path, dtype=torch.bfloat16, attention="sdpa", input_size=16)
    assert model.config.attention == "sdpa" and model.positions.shape == (64, 32)
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {torch.bfloat16}
    with torch.no_grad():
        assert model(torch.randn(1, 4, 16, 16, dtype=torch.bfloat16), torch.zeros(1)).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="depth.*cannot be changed"):
        DiT.from_pretrained(tmp_path, depth=5)


def test_a_failed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    model = small_model()
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(state, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.final_layer.linear.bias)
    with pytest.raises(OSError, match="No space"):
        other.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def assert_one_line_naming(error, path, *words):
    text = str(error.value)
    assert "\n" not in text and path.name in text, text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_named(tmp_path, keep):
    small_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError) as error:
        DiT.from_pretrained(tmp_path)
    assert_one_line_naming(error, weights, "cut short")


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_pt_file_cut_short_is_named(plain, tmp_path, keep):
    path = tmp_path / "DiT.pt"
    torch.save(plain.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError) as error:
        DiT.from_pretrained(path, num_heads=4)
    assert_one_line_naming(error, path, "cut short")


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_nothing_in_a_pt_file_is_executed(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as error:
        DiT.from_pretrained(tmp_path / "bad.pt")
    assert_one_line_naming(error, tmp_path / "bad.pt", "expected a PyTorch checkpoint of a DiT")
    assert "never run" not in capsys.readouterr().out


def test_checkpoints_of_other_models_are_named(tmp_path):
    foreign = tmp_path / "other.pt"
    torch.save(nn.Linear(3, 4).state_dict(), foreign)
    with pytest.raises(ValueError) as error:
        DiT.from_pretrained(foreign)
    assert_one_line_naming(error, foreign, "x_embedder.proj.weight", "is missing")

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError) as error:
        DiT.from_pretrained(folder)
    assert_one_line_naming(error, folder / "config.json", "UNet2DModel", "expected 'DiT'")

    (folder / "config.json").write_text('{"_class_name": "DiT", "hidden')
    with pytest.raises(ValueError) as error:
        DiT.from_pretrained(folder)
    assert_one_line_naming(error, folder / "config.json", "JSON")

    (folder / "config.json").write_text(json.dumps({"_class_name": "DiT", "hidden_sizes": 3}))
    with pytest.raises(ValueError) as error:
        DiT.from_pretrained(folder)
    assert_one_line_naming(error, folder / "config.json", "hidden_sizes")


def test_weights_of_another_shape_are_named(tmp_path):
    small_model(depth=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 2, "num_classes": 9}))
    with pytest.raises(ValueError) as error:
        DiT.from_pretrained(tmp_path)
    assert_one_line_naming(error, tmp_path, "blocks.2.", "is unknown", "more")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 9}))
    with pytest.raises(ValueError, match=r"embedding_table.weight has shape \[8, 32\], expected \[10, 32\]"):
        DiT.from_pretrained(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DiT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        DiT.from_pretrained(tmp_path)
    small_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        DiT.from_pretrained(tmp_path)


def test_positions_of_a_grid_that_is_not_square():
    whole = sincos_2d(5, 3, 8).view(5, 3, 8)
    torch.testing.assert_close(whole[:3], sincos_2d(3, 3, 8).view(3, 3, 8), rtol=0, atol=0)
    assert torch.equal(whole[4, :, :4], whole[0, :, :4]) and torch.equal(whole[:, 2, 4:], whole[:, 0, 4:])
