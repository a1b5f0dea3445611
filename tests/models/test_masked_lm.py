"""`MaskedDiffusionLM` itself: shapes, masks, shift, loss, conditioning, cache, LoRA, round trips."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastdiff.diffusion import MaskedDiffusion, MaskedDiffusionConfig
from fastdiff.models import MaskedDiffusionLM, MaskedDiffusionLMConfig
from fastdiff.nn import KeyValueCache, annealed_attention_mask

ARCHITECTURES = ["mdlm", "gpt2", "llada", "dream", "llama"]
TOLERANCE = dict(rtol=0, atol=1e-5)  # seen: 7e-7 (fp32, hidden states of size 1)


def model(architecture="mdlm", **options):
    fields = dict(
        architecture=architecture, vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    built = MaskedDiffusionLM(MaskedDiffusionLMConfig(**{**fields, **options}))
    with torch.no_grad():  # biases and norms start at 0 and 1, where errors hide
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval()


def ids(batch=3, length=10, seed=0):
    return torch.randint(5, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_is_exact(tmp_path, architecture):
    built = model(architecture, num_key_value_heads=2, length_format="eos_fill", logit_shift=architecture == "mdlm")
    built.save_pretrained(tmp_path)
    again = MaskedDiffusionLM.from_pretrained(tmp_path)
    assert again.config.to_dict() | {"_name_or_path": ""} == built.config.to_dict() | {
        "architectures": ["MaskedDiffusionLM"]
    }
    assert not again.training and again.config.logit_shift == (architecture == "mdlm")
    tied = architecture in ("mdlm", "gpt2")
    assert (again.head_weight is again.get_input_embeddings().weight) == tied == again.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, built(ids()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_token_sees_every_other(architecture):
    built, tokens = model(architecture), ids(1)
    with torch.no_grad():
        before = built.hidden_states(tokens)
        for position in (0, 9):
            changed = tokens.clone()
            changed[0, position] = 5 + (tokens[0, position] - 4) % 56
            moved = (built.hidden_states(changed) - before).abs().amax(-1)[0]
            assert (moved > 1e-4).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(architecture, side):
    built, short = model(architecture), ids(1, 6)
    fill = torch.zeros(1, 4, dtype=torch.int64)
    real, pads = torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)
    order = (fill, short) if side == "left" else (short, fill)
    mask = torch.cat((pads, real) if side == "left" else (real, pads), dim=1)
    batch = torch.cat([ids(1), torch.cat(order, dim=1)])
    attention_mask = torch.cat([torch.ones(1, 10, dtype=torch.int64), mask])
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = built.hidden_states(batch, attention_mask, position_ids=position_ids)
        torch.testing.assert_close(together[1][mask[0].bool()], built.hidden_states(short)[0], **TOLERANCE)
        torch.testing.assert_close(together[:1], built.hidden_states(batch[:1]), **TOLERANCE)
        nothing = built.hidden_states(batch, torch.zeros(2, 10, dtype=torch.bool))
    assert nothing.isfinite().all()


def test_logits_at_i_predict_token_i_with_and_without_shift():
    for shift in (False, True):
        built = model(logit_shift=shift, head_bias=True)
        with torch.no_grad():
            states = built.hidden_states(ids())
            plain = F.linear(states, built.head_weight, built.head_bias)
            expected = torch.cat([plain[:, :1], plain[:, :-1]], dim=1) if shift else plain
            torch.testing.assert_close(built(ids()).logits, expected, rtol=0, atol=1e-5)  # seen: 0


def test_the_documented_training_step_runs():
    text = (Path(__file__).resolve().parents[2] / "docs/masked_lm.md").read_text()
    names = {}
    exec(next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "backward()" in block), names)
    gradient = names["model"].head_weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["mdlm", "dream"])
def test_loss_is_the_weighted_cross_entropy_of_masked_tokens(architecture):
    built = model(architecture).double()
    process = MaskedDiffusion(MaskedDiffusionConfig(), built.config.mask_token_id)
    generator = torch.Generator().manual_seed(1)
    clean = ids(4, 12)
    masked = process.corrupt(clean, process.sample_times(4, generator), generator=generator)
    labels = clean.masked_fill(~masked.mask, -100)
    out = built(masked.input_ids, labels=labels, row_weight=masked.weight[:, None], loss_normalizer=48.0)
    logits = out.logits.clone()
    logits[..., built.config.mask_token_id] = -torch.inf
    rows = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    expected = (rows.view(4, 12) * masked.weight[:, None]).sum() / 48
    torch.testing.assert_close(out.loss, expected, rtol=1e-13, atol=0)  # seen: 3e-16
    parameters = [p for p in built.parameters() if p.requires_grad]
    for ours, plain in zip(
        torch.autograd.grad(out.loss, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-13)  # seen: 1e-16
    mean = built(masked.input_ids, labels=labels).loss
    torch.testing.assert_close(mean, rows.sum() / masked.mask.sum(), rtol=1e-13, atol=0)  # seen: 3e-16
    built.train()
    assert built(masked.input_ids, labels=labels).logits is None  # never made
    assert built(masked.input_ids, labels=labels, return_logits=True).logits is not None


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its newer name is not in every supported version
def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        built = model("llada").train()
        if checkpointing:
            built.gradient_checkpointing_enable()
            assert built.model.gradient_checkpointing
        built(ids(), labels=ids()).loss.backward()
        grads.append([p.grad for p in built.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-7)  # seen: 0


def test_annealed_attention_goes_from_causal_to_bidirectional():
    assert torch.equal(annealed_attention_mask(5, 0.0)[0], torch.ones(5, 5, dtype=torch.bool).tril())
    assert annealed_attention_mask(5, 1.0, batch_size=3).all()
    generator = torch.Generator().manual_seed(0)
    mask = annealed_attention_mask(100, 0.3, batch_size=4, generator=generator)
    later = mask[:, ~torch.ones(100, 100, dtype=torch.bool).tril()]
    assert mask.shape == (4, 100, 100) and abs(later.float().mean() - 0.3) < 0.0165  # 5 standard deviations
    built, tokens = model("gpt2"), ids(2)
    with torch.no_grad():
        causal = built.hidden_states(tokens, annealed_attention_mask(10, 0.0))
        changed = tokens.clone()
        changed[:, 7] = 5
        moved = (built.hidden_states(changed, annealed_attention_mask(10, 0.0)) - causal).abs().amax((0, 2))
        assert (moved[:7] == 0).all() and (moved[7:] > 1e-4).all()


def test_timesteps_are_needed_and_used():
    built = model(timestep_embedding=True)
    with pytest.raises(ValueError, match="timesteps: got None; this model has a timestep embedding"):
        built.hidden_states(ids())
    with torch.no_grad():
        early, late = (built.hidden_states(ids(), timesteps=torch.full((3,), t)) for t in (0.1, 0.9))
        assert (early - late).abs().amax() > 1e-2
        mixed = built.hidden_states(ids(), timesteps=torch.tensor([0.1, 0.9, 0.1]))
    torch.testing.assert_close(mixed, torch.stack([early[0], late[1], early[2]]), **TOLERANCE)


def test_cross_attention_to_an_encoder():
    config = MaskedDiffusionLMConfig.from_size("tiny", vocab_size=61, num_hidden_layers=2, num_encoder_layers=1)
    fresh = MaskedDiffusionLM(config).eval()
    condition, mask = ids(3, 7, seed=1), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])
    with torch.no_grad():
        states = fresh.encode(condition, mask)
        assert states.shape == (3, 7, 256)
        alone = fresh.hidden_states(ids())
        # the cross-attention starts at zero: a trained denoiser is not disturbed
        assert torch.equal(fresh.hidden_states(ids(), encoder_hidden_states=states), alone)
        built = model(num_encoder_layers=2)
        given = dict(encoder_attention_mask=mask)
        seen = built.hidden_states(ids(), encoder_hidden_states=built.encode(condition, mask), **given)
        assert (seen - built.hidden_states(ids())).abs().amax((1, 2)).min() > 1e-3
        condition[1, 4:] = 9  # padding: nobody looks
        again = built.hidden_states(ids(), encoder_hidden_states=built.encode(condition, mask), **given)
        torch.testing.assert_close(again, seen, **TOLERANCE)
    outside = model(cross_attention_dim=20)
    outside(ids(), labels=ids(), encoder_hidden_states=torch.randn(3, 5, 20)).loss.backward()
    assert outside.model.layers[0].cross_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["gpt2", "llada"])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_cache_stands_in_for_the_columns_left_out(architecture, per_row):
    built = model(architecture, num_key_value_heads=2, num_hidden_layers=1)
    columns = torch.arange(4, 7)
    if per_row:
        columns = torch.stack([torch.arange(start, start + 3) for start in (0, 4, 7)])
    rows, tokens = torch.arange(3)[:, None], ids()
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[2, :2] = False
    with torch.no_grad():
        cache = KeyValueCache()
        whole = built.hidden_states(tokens, mask, cache=cache)
        torch.testing.assert_close(whole, built.hidden_states(tokens, mask), rtol=0, atol=0)
        assert cache.length == 10
        changed = tokens.clone()
        changed[rows, columns] = ids(3, 3, seed=4)
        part = built.hidden_states(changed[rows, columns], mask, cache=cache, cache_columns=columns)
        # with one block the other columns' keys and values follow from their tokens alone: exact, not approximate
        expected = built.hidden_states(changed, mask)[rows, columns]
        torch.testing.assert_close(part, expected, **TOLERANCE)
        again = built.hidden_states(changed, mask, cache=cache)  # a refresh
        torch.testing.assert_close(again[rows, columns], expected, **TOLERANCE)


def test_lora_trains_through_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="NOT TESTED: peft is not installed (the extra 'lora')")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8)
    built = model("dream")
    before = built(ids()).logits.detach()
    adapted = peft.get_peft_model(built, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    masked, losses = ids().masked_fill(ids(seed=2) % 2 == 0, 3), []
    for _ in range(8):
        loss = adapted(masked, labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(ids()).logits
        fresh = peft.PeftModel.from_pretrained(model("dream"), tmp_path)
        torch.testing.assert_close(fresh(ids()).logits, expected, rtol=0, atol=0)
        assert fresh.hidden_states(ids()).shape == (3, 10, 32) and fresh.head_weight.shape == (61, 32)
        merged = fresh.merge_and_unload()
        torch.testing.assert_close(merged(ids()).logits, expected, rtol=0, atol=1e-5)  # seen: 7e-7
        assert (expected - before).abs().max() > 1e-2


def test_hidden_states_compile_into_one_graph():
    built = model("llada")
    compiled = torch.compile(built.hidden_states, fullgraph=True, backend="eager")
    with torch.no_grad():
        mask = torch.ones(3, 10, dtype=torch.bool)
        torch.testing.assert_close(compiled(ids(), mask), built.hidden_states(ids(), mask), **TOLERANCE)


def test_random_weights_have_their_scales():
    config = MaskedDiffusionLMConfig.from_size("tiny", vocab_size=500, cross_attention_dim=64)
    fresh = MaskedDiffusionLM(config)
    layer = fresh.model.layers[1]
    scaled = 0.02 / (2 * 4) ** 0.5
    for weight, std in [
        (fresh.head_weight, 0.02), (layer.self_attn.q_proj.weight, 0.02), (layer.self_attn.o_proj.weight, scaled),
        (layer.mlp.down_proj.weight, scaled), (layer.cross_attn.o_proj.weight, 0.0),
    ]:  # fmt: skip
        assert abs(weight.std().item() - std) <= 0.02 * std
    assert layer.input_layernorm.weight.eq(1).all() and layer.mlp.up_proj.bias.eq(0).all()


def test_sizes_by_name():
    config = MaskedDiffusionLMConfig.from_size("xlarge", mask_token_id=7)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (768, 12, 12)
    assert config.mask_token_id == 7 and config.intermediate_size == 3072
    with torch.device("meta"):
        small = MaskedDiffusionLM(MaskedDiffusionLMConfig.from_size("small"))
    assert 13e6 < sum(p.numel() for p in small.parameters()) < 17e6
    with pytest.raises(ValueError, match="size: got 'huge'; expected one of tiny, small"):
        MaskedDiffusionLMConfig.from_size("huge")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(architecture="bert"), "architecture: got 'bert'; expected one of mdlm, gpt2, llada, dream, llama"),
        (dict(mask_token_id=0), "mask_token_id: got 0, which is pad_token_id too"),
        (dict(mask_token_id=2), "mask_token_id: got 2, which is eos_token_id too"),
        (dict(mask_token_id=61), r"mask_token_id: got 61; expected 0 to 60"),
        (dict(eos_token_id=[2, 99]), "eos_token_id: got 99; expected 0 to 60"),
        (dict(mask_token_id=None), "mask_token_id: got None"),
        (dict(hidden_size=30), "num_attention_heads: got 4; expected a divisor of hidden_size = 30"),
        (dict(num_key_value_heads=3), "num_key_value_heads: got 3"),
        (dict(num_hidden_layers=0), "num_hidden_layers: got 0"),
        (dict(architecture="llada", head_dim=3), "head_dim: got 3; rotary positions need an even one"),
        (dict(length_format="eos"), "length_format: got 'eos'; expected one of None, eos_fill, pad_fill, eos_only"),
        (dict(norm="batch"), "norm: got 'batch'"),
        (dict(dropout=1.0), "dropout: got 1.0"),
        (dict(num_encoder_layers=1, cross_attention_dim=8), "cross_attention_dim: got 8 with an encoder of its own"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        model(**fields)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(ids(1, 25)), "got 25 tokens; expected at most max_position_embeddings = 24: shorten the prompt"),
        (lambda m: m(torch.tensor([[5, 61]])), "input_ids: got ids 5 to 61; expected 0 to 60"),
        (lambda m: m(torch.tensor([[-1, 6]])), "input_ids: got ids -1 to 6"),
        (lambda m: m(torch.zeros(2, 3)), "input_ids: got torch.float32 of shape"),
        (lambda m: m(ids(), torch.ones(3, 9)), r"attention_mask: got shape \[3, 9\]; expected \[3, 10\]"),
        (lambda m: m(ids(), torch.ones(3, 10)), "attention_mask: got torch.float32; expected bool"),
        (lambda m: m(ids(), labels=ids(3, 9)), r"labels: got shape \[3, 9\]"),
        (lambda m: m(ids(), position_ids=torch.full((3, 10), 24)), "position_ids: got 24 to 24; expected 0 to 23"),
        (lambda m: m(ids(), timesteps=torch.zeros(2)), r"timesteps: got shape \[2\]; expected \[3\]"),
        (lambda m: m(ids(), encoder_hidden_states=torch.zeros(3, 2, 8)), "this model has no cross-attention"),
        (lambda m: m.encode(ids()), "this model has no encoder"),
        (lambda m: m(ids(), cache=KeyValueCache(), cache_columns=torch.arange(10)), "there is no filled cache"),
        (lambda m: annealed_attention_mask(4, 1.5), "bidirectional: got 1.5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(model())
