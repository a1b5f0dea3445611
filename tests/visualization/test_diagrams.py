"""Diagrams: what is written in them is the model's own, they are whole SVG files, and nothing overlaps."""

import functools
import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

from fastdiff.diffusion import Diffusion, DiffusionConfig
from fastdiff.diffusion.masked import MaskedDiffusionConfig
from fastdiff.models import DiT, MaskedDiffusionLM, MaskedDiffusionLMConfig
from fastdiff.models.autoencoder import AutoencoderConfig, make_autoencoder
from fastdiff.models.dit_config import preset_config
from fastdiff.models.qgfd.adapters import (
    AudioAdapterConfig,
    ImageAdapterConfig,
    TabularAdapterConfig,
    TextAdapterConfig,
)
from fastdiff.models.qgfd.backbone import QGFDConfig
from fastdiff.models.qgfd.model import QGFDModel, QGFDModelConfig
from fastdiff.models.text_to_image import TextToImage, TextToImageConfig
from fastdiff.nn.q_former import QFormerConfig
from fastdiff.visualization.diagrams import draw_blocks, draw_model, draw_process, mask_process, noise_process, probe
from fastdiff.visualization.diagrams.cards import number
from fastdiff.visualization.diagrams.svg import text_width

SVG = "{http://www.w3.org/2000/svg}"
WORDS = dict(title="A model", subtitle="runs/one · step 3")
SMALL = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=5)


def dit(**options):
    return DiT(preset_config("DiT-tiny", **{**SMALL, **options}))


def text_to_image(**options):
    reader = QFormerConfig(hidden_size=16, num_queries=3, depth=2, num_heads=2)
    config = TextToImageConfig(dit=preset_config("DiT-tiny", **SMALL), text_dim=24, q_former=reader, **options)
    return TextToImage(config)


def crossing():
    options = dict(num_classes=0, null_label=False, class_dropout_prob=0.0, conditioning="cross_attention",
                   position_embedding="learned")  # fmt: skip
    config = preset_config("DiT-tiny", **{**SMALL, **options})
    return TextToImage(TextToImageConfig(dit=config, text_dim=24, text_states=2, conditioning="cross_attention"))


def language_model(**options):
    fields = dict(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=40)
    return MaskedDiffusionLM(MaskedDiffusionLMConfig(**{**fields, **options}))


def qgfd(**options):
    backbone = dict(latent_dim=8, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
    backbone |= options.pop("backbone", {})
    return QGFDModel(QGFDModelConfig(backbone=QGFDConfig(**backbone), **options))


SIDES = dict(hidden_size=8, num_heads=2)
MODELS = {
    "dit": dit,
    "dit, embedders per block": functools.partial(dit, embedders_per_block=True, position_embedding="rotary"),
    "q_former": text_to_image,
    "q_former, states mixed": functools.partial(text_to_image, text_states=2),
    "cross-attention": crossing,
    "lm": language_model,
    "lm, encoder": functools.partial(language_model, num_encoder_layers=2, timestep_embedding=True),
    "lm, context": functools.partial(language_model, cross_attention_dim=20, architecture="llada"),
    "qgfd, adaln": functools.partial(
        qgfd, backbone=dict(time_conditioning="adaln"), image=ImageAdapterConfig(**SIDES, num_classes=3)
    ),
    "qgfd, three": functools.partial(
        qgfd, text=TextAdapterConfig(**SIDES, vocab_size=30), image=ImageAdapterConfig(**SIDES),
        audio=AudioAdapterConfig(**SIDES),
    ),
    "qgfd, table": functools.partial(
        qgfd, tabular=TabularAdapterConfig(**SIDES, num_numbers=2, category_sizes=(3, 4))
    ),
    "autoencoder": lambda: make_autoencoder(AutoencoderConfig(
        in_channels=1, sample_size=16, block_out_channels=[8, 16, 16], norm_num_groups=4)),
}  # fmt: skip


@functools.cache
def drawn(name):
    """A model, and its diagrams, parsed."""
    torch.manual_seed(0)
    model = MODELS[name]()
    trace, sizes = probe(model)
    whole, blocks = (draw(model, trace, sizes, **WORDS) for draw in (draw_model, draw_blocks))
    return model, (whole, blocks), [ElementTree.fromstring(each) for each in (whole, blocks)]


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def tooltips(root):
    """Of each box: its module's path, class, and parameters."""
    found = []
    for group in root.iter(f"{SVG}g"):
        path, kind, count = re.fullmatch(r"(.+?): (.+?), ([\d,]+) parameters", group.find(f"{SVG}title").text).groups()
        found.append((path, kind, int(count.replace(",", ""))))
    return found


def extent(group):
    """Left, top, right, bottom of a box with the cards behind it."""
    places = [[float(rect.get(name)) for name in ("x", "y", "width", "height")] for rect in group.iter(f"{SVG}rect")]
    return (min(x for x, *_ in places), min(y for _, y, *_ in places), max(x + w for x, _, w, _ in places),
            max(y + h for _, y, _, h in places))  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_files_are_small_whole_and_need_nothing(name):
    _, contents, roots = drawn(name)
    for content, root in zip(contents, roots, strict=True):
        assert len(content.encode()) < 60_000
        assert root.find(f"{SVG}title").text.startswith("A model") and root.find(f"{SVG}desc").text
        assert "href" not in content and "url(" not in content and content.count("http") == 1  # the name space
        paper = root.find(f"{SVG}rect")
        assert paper.get("fill") == "#ffffff" and float(paper.get("width")) == float(root.get("width")) - 1


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_is_counted_once(name):
    model, _, (whole, _) = drawn(name)
    total = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    assert sum(count for _, _, count in tooltips(whole)) == total
    assert any(text.startswith(f"{total:,} parameters".replace(",", " ")) for text in texts(whole))


@pytest.mark.parametrize("name", MODELS)
def test_texts_lie_in_the_picture_and_boxes_apart(name):
    for root in drawn(name)[2]:
        width, height = float(root.get("width")), float(root.get("height"))
        for text in root.iter(f"{SVG}text"):
            size, bold = float(text.get("font-size")), text.get("font-weight") == "600"
            wide = text_width(text.text, size, bold)
            left = float(text.get("x")) - {"middle": wide / 2, "end": wide}.get(text.get("text-anchor"), 0)
            assert 0 < left and left + wide < width and size < float(text.get("y")) < height, text.text
        boxes = [extent(group) for group in root.iter(f"{SVG}g")]
        for (x0, y0, x1, y1), (a0, b0, a1, b1) in itertools.combinations(boxes, 2):
            assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0


def test_shapes_are_those_of_a_call():
    model, _, (whole, blocks) = drawn("dit")
    seen = {}
    for path in ("x_embedder", "blocks.2", "t_embedder"):
        model.get_submodule(path).register_forward_hook(
            lambda _, __, output, path=path: seen.update({path: output if torch.is_tensor(output) else output[0]})
        )
    result = model(torch.zeros(7, 1, 8, 8), torch.zeros(7), torch.zeros(7, dtype=torch.long))
    for tensor in (*seen.values(), result):
        assert any(" × ".join(map(str, ("B", *tensor.shape[1:]))) in text for text in texts(whole))
    assert "stream B × 16 × 32" in texts(blocks) and "prediction B × 1 × 8 × 8" in texts(whole)


def test_repeated_blocks_are_one_stack_with_their_number():
    model, _, (whole, _) = drawn("dit")
    (stack,) = [each for each in tooltips(whole) if each[1].startswith("DiTBlock")]
    assert stack == ("blocks.0", "DiTBlock × 3", sum(p.numel() for p in model.blocks.parameters()))
    assert "× 3" in texts(whole) and "DiT block" in texts(whole)
    assert f"each {number(sum(p.numel() for p in model.blocks[0].parameters()))}" in texts(whole)


def test_what_conditions_stands_beside_with_its_own_blocks():
    _, _, (whole, blocks) = drawn("q_former")
    found = [path for path, _, _ in tooltips(whole)]
    assert found[:3] == ["dit.x_embedder", "dit.blocks.0", "dit.final_layer"]  # the column
    assert {"q_former.queries", "q_former.blocks.0", "q_former.text_proj", "dit.t_embedder"} <= set(found)
    assert "text states B × S × 24" in texts(whole)
    assert ["DiT block × 3", "QFormer block × 2"] == [text for text in texts(blocks) if " block × " in text]


def test_a_tied_head_is_not_counted_again_and_names_free_lengths():
    _, _, (whole, _) = drawn("lm, encoder")
    counts = {path: count for path, _, count in tooltips(whole)}
    assert counts["lm_head"] == 0 and counts["model.embed_tokens"] == 60 * 32 and "tied" in texts(whole)
    assert {"token ids B × L", "embedded text B × M", "logits B × L × 60", "B × M × 32"} <= set(texts(whole))


def test_states_from_outside_are_named():
    """A decoder of captions attends to a picture's states, which another model makes."""
    _, _, (whole, blocks) = drawn("lm, context")
    assert "context B × M × 20" in texts(whole) and "B × M × 20" in texts(blocks)
    assert not any(text.startswith("context") for text in texts(drawn("lm, encoder")[2][0]))


@pytest.mark.parametrize(
    ("name", "titles", "gates", "shifts"),
    [
        ("dit", ["LayerNorm", "Self-attention", "LayerNorm", "MLP"], 2, 2),
        ("lm", ["LayerNorm", "Self-attention", "LayerNorm", "MLP"], 0, 0),
        ("lm, context", ["RMSNorm", "Self-attention", "RMSNorm", "Cross-attention", "RMSNorm", "MLP"], 0, 0),
        ("cross-attention", ["LayerNorm", "Self-attention", "LayerNorm", "Cross-attention", "LayerNorm", "MLP"], 0, 0),
        ("autoencoder", ["GroupNorm", "Convolution", "GroupNorm", "Convolution"], 0, 0),
    ],
)
def test_a_block_inside_is_in_the_order_of_its_calls(name, titles, gates, shifts):
    _, _, (_, blocks) = drawn(name)
    known = {"LayerNorm", "RMSNorm", "GroupNorm", "Self-attention", "Cross-attention", "MLP", "Convolution"}
    assert [text for text in texts(blocks) if text in known] == titles
    assert texts(blocks).count("gate") == gates and texts(blocks).count("shift, scale") == shifts


def test_modulation_and_diffused_attention_are_read_from_the_modules():
    """QGFD's adaLN makes shifts and scales, and no gates; heads, hops and α are the attention's own."""
    _, _, (_, blocks) = drawn("qgfd, adaln")
    assert texts(blocks).count("shift, scale") == 3 and "gate" not in texts(blocks)
    assert "2 heads × 8 · 1 hop, α 0.5" in texts(blocks)
    assert "16 → 32 → 16 · GELU" in texts(blocks) and "SiLU · 16 → 96" in texts(blocks)


def test_parts_of_a_block_have_its_parameters():
    model, _, (_, blocks) = drawn("dit")
    count = sum(p.numel() for p in model.blocks[0].parameters())
    assert sum(each for _, _, each in tooltips(blocks)) == count and f"{number(count)} each" in texts(blocks)


def test_attention_says_shared_keys_norms_and_rotary_positions():
    model = language_model(architecture="llada", num_key_value_heads=1)
    root = ElementTree.fromstring(draw_blocks(model, *probe(model), **WORDS))
    assert {"2 heads × 16 · 1 of keys and values", "rotary positions"} <= set(texts(root))


class Unknown(nn.Module):
    """A model whose call nobody knows."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(3, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(8))


def test_a_model_that_is_not_known_is_drawn_without_shapes():
    model = Unknown()
    trace, sizes = probe(model)
    whole = ElementTree.fromstring(draw_model(model, trace, sizes, **WORDS))
    assert sum(count for _, _, count in tooltips(whole)) == sum(p.numel() for p in model.parameters())
    assert "× 4" in texts(whole) and "input" in texts(whole) and not any("B ×" in text for text in texts(whole))
    blocks = ElementTree.fromstring(draw_blocks(model, trace, sizes, **WORDS))
    assert "Self-attention" in texts(blocks)
    assert draw_blocks(nn.Linear(2, 2), *probe(nn.Linear(2, 2)), **WORDS) is None


def test_names_cannot_break_the_file():
    model = dit()
    content = draw_model(model, *probe(model), title="<a> & \x1b\x00 \ud800", subtitle="x" * 900)
    root = ElementTree.fromstring(content.encode())
    assert "<a> & ·· ·" in texts(root)


def test_looking_leaves_the_model_as_it_was():
    model = dit().train()
    probe(model)
    assert model.training and model.blocks.training
    assert not any(module._forward_hooks for module in model.modules())


def test_numbers_have_three_digits():
    assert [number(each) for each in (7, 9999, 10_000, 99_968, 999_499, 999_500, 8_030_000_000)] == [
        "7", "9 999", "10 K", "100 K", "999 K", "1 M", "8.03 B",
    ]  # fmt: skip


@pytest.mark.parametrize("levels", ["linear", "cosine", "logit_normal", "beta", "uniform"])
def test_the_curves_are_those_of_the_schedule(levels):
    prediction = "epsilon" if levels in ("linear", "cosine") else "flow"
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction, noise_levels=levels, num_train_timesteps=200))
    process = noise_process(diffusion)
    for time in (0.25, 0.5, 1.0):
        alpha, sigma = diffusion.alpha_sigma(diffusion.time_at(time))
        assert process.at("α", time) == pytest.approx(float(alpha), abs=0.02)
        assert process.at("σ", time) == pytest.approx(float(sigma), abs=0.02)
    assert bool(process.density) == (levels in ("logit_normal", "beta"))
    if process.density:
        assert sum(process.density) / len(process.density) == pytest.approx(1)
    root = ElementTree.fromstring(draw_process(process, **WORDS))
    assert f"α {process.at('α', 0.5):.2f} · σ {process.at('σ', 0.5):.2f}" in texts(root)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "maskgit_cosine", "polynomial"])
def test_tokens_are_masked_at_the_rate_of_the_schedule(schedule):
    content = draw_process(mask_process(MaskedDiffusionConfig(schedule=schedule), [1, 0.5, 0], ["two steps"]), **WORDS)
    root = ElementTree.fromstring(content)
    rate = {"linear": 50, "cosine": 29, "maskgit_cosine": 71, "polynomial": 25}[schedule]
    assert f"{rate}% masked" in texts(root) and "two steps" in texts(root) and len(content) < 60_000
    words = {"the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"}
    shown = sum(text in words for text in texts(root))
    assert shown == sum(9 - round(9 * r) for r in _rates(schedule))


def _rates(schedule):
    from fastdiff.diffusion.masked import MaskedDiffusion

    process = MaskedDiffusion(MaskedDiffusionConfig(schedule=schedule), 0)
    return process.mask_rate(torch.linspace(0, 1, 65))[::16].tolist()


def test_steps_that_are_not_known_before_are_not_drawn():
    root = ElementTree.fromstring(draw_process(mask_process(MaskedDiffusionConfig()), **WORDS))
    assert "as many steps as the rule needs" in texts(root)
