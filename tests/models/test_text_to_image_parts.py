"""Text-to-image models, Q-Formers and cross-attention: rows alone and in a batch, saved, and calls that do not fit."""

import pytest
import torch
from models.random_weights import random_weights

from fastdiff.diffusion import Diffusion, DiffusionConfig, sample_prompts
from fastdiff.models import DiT, DiTConfig, TextToImage, TextToImageConfig
from fastdiff.nn import CrossAttention, QFormer, QFormerConfig, StateMix


def small(conditioning="q_former", **overrides):
    dit = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4)
    if conditioning == "cross_attention":
        dit |= dict(conditioning=conditioning, num_classes=0, null_label=False, class_dropout_prob=0.0)
    q_former = QFormerConfig(hidden_size=16, num_heads=2) if conditioning == "q_former" else None
    config = TextToImageConfig(
        **{"dit": DiTConfig(**dit), "text_dim": 12, "conditioning": conditioning, "q_former": q_former} | overrides
    )
    torch.manual_seed(0)
    return random_weights(TextToImage(config))


@pytest.mark.parametrize("conditioning", ["q_former", "cross_attention"])
@pytest.mark.parametrize("num_states", [1, 3])
def test_padding_rows_and_dropping_change_nothing_for_the_others(conditioning, num_states):
    model = small(conditioning, text_states=num_states)
    states = torch.randn(4, 5, 12) if num_states == 1 else torch.randn(4, 5, num_states, 12)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [1]])
    x, t = torch.randn(4, 3, 8, 8), 1000 * torch.rand(4)
    dropped = torch.tensor([False, False, True, False])
    found = model(x, t, text_states=states, text_mask=mask, dropped=dropped)
    for row in range(4):
        length = int(mask[row].sum())
        one = slice(row, row + 1)
        if dropped[row]:
            condition = model.null_condition(1)
        else:
            condition = model.condition(states[one, :length])
        torch.testing.assert_close(model(x[one], t[one], condition=condition), found[one], rtol=0, atol=2e-5)
    rows = torch.tensor([2, 0, 0, 1])
    by_rows = model(x, t, text_states=states, text_mask=mask, text_rows=rows, dropped=dropped)
    taken = model(x, t, text_states=states[rows], text_mask=mask[rows], dropped=dropped)
    torch.testing.assert_close(by_rows, taken, rtol=0, atol=1e-5)
    found.square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None and p.numel()]
    assert not silent


def test_contexts_of_other_lengths_are_guided_together():
    model = small("cross_attention")
    states, mask = torch.randn(2, 5, 12), torch.arange(5) < torch.tensor([[5], [2]])
    diffusion = Diffusion(DiffusionConfig())
    options = dict(num_inference_steps=3, guidance_scale=2.0, seed=[3, 4])
    with torch.no_grad():
        both = sample_prompts(model, diffusion, model.condition(states, mask), **options)
        alone = sample_prompts(
            model, diffusion, model.condition(states[1:, :2]), **options | dict(seed=[4]), null=model.null_condition(1)
        )
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["q_former", "cross_attention"])
def test_a_saved_model_is_the_same(conditioning, tmp_path):
    model = small(conditioning, text_states=2)
    model.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path, text_dropout_prob=0.5)
    assert again.config.dit == model.config.dit and again.config.q_former == model.config.q_former
    states, x = torch.randn(2, 4, 2, 12), torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x, torch.ones(2), text_states=states), model(x, torch.ones(2), text_states=states))


def test_the_mix_of_states_is_a_learned_mean():
    mix, states = StateMix(3), torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(mix(states), states.mean(2), rtol=0, atol=1e-6)
    with torch.no_grad():
        mix.logits.copy_(torch.tensor([0.0, 50.0, 0.0]))
    torch.testing.assert_close(mix(states), states[:, :, 1], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ cross-attention


@pytest.mark.parametrize("bias", [False, True])
def test_cross_attention_hands_out_the_weights_that_it_uses(bias):
    torch.manual_seed(0)
    attention, kept = CrossAttention(16, 4, context_dim=6, bias=bias, qk_norm=True).eval(), []
    x, context, mask = torch.randn(3, 5, 16), torch.randn(3, 7, 6), torch.rand(3, 7) < 0.6
    mask[0] = False
    expected = attention(x, context, mask)
    attention.capture = kept.append
    torch.testing.assert_close(attention(x, context, mask), expected, rtol=0, atol=1e-5)
    (weights,) = kept
    assert weights.shape == (3, 4, 5, 7) and not weights.masked_select(~mask[:, None, None].expand_as(weights)).any()
    torch.testing.assert_close(weights.sum(-1)[1:], torch.ones(2, 4, 5), rtol=0, atol=1e-5)
    weights.square().sum().backward()  # entropy and other measures of them can be trained on
    assert attention.wk.weight.grad.norm() > 0


def test_early_tokens_are_hidden_in_training_alone_and_never_all_of_a_row():
    torch.manual_seed(0)
    attention, kept = CrossAttention(8, 2), []
    attention.capture, attention.drop_early, attention.early_tokens = kept.append, 0.5, 2
    x, context = torch.randn(400, 1, 8), torch.randn(400, 5, 8)
    mask = torch.ones(400, 5, dtype=torch.bool)
    mask[200:, 2:] = False  # these rows have early tokens alone
    attention.train()(x, context, mask)
    hidden = (kept[-1][:, 0, 0] == 0)[:, :2]
    assert torch.equal(hidden[:, 0], hidden[:, 1]) and not hidden[200:].any()
    assert 0.4 < hidden[:200, 0].float().mean() < 0.6
    attention.leading_keys = 1  # the time of a DiT is never hidden
    attention.train()(x, context)
    hidden = kept[-1][:, 0, 0] == 0
    assert not hidden[:, [0, 3, 4]].any() and hidden[:, 1:3].any()
    attention.eval()(x, context, mask)
    assert (kept[-1][:, 0, 0] > 0).equal(mask)
    model = small(q_former=QFormerConfig(hidden_size=16, num_heads=2, drop_early=0.3, early_tokens=2))
    found = [m for m in model.modules() if isinstance(m, CrossAttention)]
    assert [(m.drop_early, m.early_tokens) for m in found] == [(0.3, 2)] * 2


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(conditioning="adaln"), "TextToImageConfig.conditioning: got 'adaln'; expected 'q_former' or"),
        (dict(conditioning="cross_attention"), "dit.conditioning: got 'adaln' with conditioning 'cross_attention'"),
        (dict(text_dim=0), "TextToImageConfig.text_dim: got 0; expected at least 1"),
        (dict(text_dropout_prob=1.5), "TextToImageConfig.text_dropout_prob: got 1.5; expected 0 to 1"),
        (dict(text_embedding_dim=4), "TextToImageConfig.text_embedding_dim: got 4 with conditioning 'q_former'"),
        (
            dict(dit=DiTConfig(null_label=False, class_dropout_prob=0.0)),
            "text_dropout_prob: got 0.1 with a DiT without",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        TextToImageConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_classes=0), "DiTConfig.null_label: got True with num_classes 0"),
        (dict(mlp_conv=True, mlp_activation="swiglu"), "DiTConfig.mlp_conv: got True with mlp_activation 'swiglu'"),
        (dict(stem="conv", hidden_size=48, num_heads=2), "DiTConfig.hidden_size: got 48 with stem 'conv'"),
        (dict(stem="convolution"), "DiTConfig.stem: got 'convolution'; expected one of none, conv"),
        (dict(cross_attention_heads=4), "DiTConfig.cross_attention_heads: got 4; expected a divisor"),
        (dict(hidden_size=12, num_heads=4, position_embedding="rotary"), "got 4 with position_embedding 'rotary'"),
        (dict(conditioning="cross_attention", embedders_per_block=True), "embedders_per_block: got True"),
        (dict(final_norm_eps=-1.0), "DiTConfig.final_norm_eps: got -1.0"),
    ],
)
def test_options_of_a_dit_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        DiTConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("conditioning", "options", "error", "message"),
    [
        ("q_former", {}, ValueError, "got 0 of them; expected exactly one"),
        ("q_former", dict(text_states=torch.zeros(2, 3, 11)), ValueError, r"text_states: got shape \[2, 3, 11\]"),
        ("q_former", dict(text_states=torch.zeros(2, 3, 12), text_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError,
         r"text_mask: got shape \[2, 4\]; expected \[2, 3\]"),
        ("q_former", dict(text_states=torch.zeros(2, 3, 12), text_mask=torch.ones(2, 3)), TypeError,
         "text_mask: got torch.float32"),
        ("q_former", dict(text_states=torch.zeros(2, 3, 12), dropped=torch.ones(3, dtype=torch.bool)), ValueError,
         r"dropped: got torch.bool \[3\]; expected bool \[2\]"),
        ("q_former", dict(condition={"layer_embedding": torch.zeros(2, 3, 32)}), ValueError,
         r"layer_embedding: got shape \[2, 3, 32\]; expected \[2, 2, 32\]"),
        ("q_former", dict(condition={"context": torch.zeros(2, 1, 32)}), ValueError,
         "context: got one with conditioning 'adaln'"),
        ("cross_attention", dict(condition={"context": torch.zeros(2, 1, 31)}), ValueError,
         r"context: got shape \[2, 1, 31\]; expected \[2, 1, 32\]"),
        ("cross_attention", dict(condition={"layer_embedding": torch.zeros(2, 2, 32)}), ValueError,
         "layer_embedding: got one with conditioning 'cross_attention'"),
        ("cross_attention", dict(modulations=[torch.zeros(2, 64)] * 3), ValueError,
         "modulations: got one with conditioning 'cross_attention'"),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_are_one_line(conditioning, options, error, message):
    model = small(conditioning)
    with pytest.raises(error, match=message) as caught:
        model(torch.zeros(2, 3, 8, 8), torch.zeros(2), **options)
    assert "\n" not in str(caught.value)


def test_a_dit_without_labels_wants_its_condition_and_learned_positions_their_size():
    dit = small("cross_attention").dit
    with pytest.raises(ValueError, match=r"context: got None; this model has no labels \(num_classes 0\): pass one"):
        dit(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="modulations: this model has none"):
        dit.modulations(torch.zeros(1), torch.tensor([0]))
    learned = DiT(DiTConfig(8, 4, 3, 32, 1, 2, position_embedding="learned"))
    with pytest.raises(ValueError, match=r"sample: got height and width \(4, 8\); expected \(8, 8\)"):
        learned(torch.zeros(1, 3, 4, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="layer_embedding: got one beside class_labels"):
        learned(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([1]), layer_embedding=torch.zeros(1, 1, 32))
    with pytest.raises(ValueError, match="got both or neither; expected one of them"):
        learned.modulations(torch.zeros(1))


def test_a_q_former_that_does_not_fit_is_one_line():
    for options, message in (
        (dict(num_queries=0), "QFormerConfig.num_queries: got 0"),
        (dict(hidden_size=10, num_heads=4), "QFormerConfig.num_heads: got 4; expected a divisor of hidden_size = 10"),
        (dict(drop_early=2.0), "QFormerConfig.drop_early: got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            QFormerConfig(**options)
    former = QFormer(6, 2, 8, QFormerConfig(hidden_size=None, num_heads=2))
    assert former.text_proj is None and former(torch.zeros(1, 3, 6)).shape == (1, 2, 8)
    with pytest.raises(ValueError, match=r"text_states: got shape \[1, 3, 7\]; expected \[B, S, 6\]"):
        former(torch.zeros(1, 3, 7))
