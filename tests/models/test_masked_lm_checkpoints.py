"""Foreign checkpoints of masked diffusion LMs: each layout written with random weights, loaded, and compared."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastdiff.models import MaskedDiffusionLM, MaskedDiffusionLMConfig
from fastdiff.nn import annealed_attention_mask

TOLERANCE = dict(rtol=0, atol=2e-5)  # seen: 3e-6 (fp32, logits of size 1 to 10)
LENGTH = 11


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def gpt2(**options):
    fields = dict(vocab_size=60, n_positions=16, n_embd=24, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2)
    return randomised(GPT2LMHeadModel(GPT2Config(**{**fields, **options})))


LLAMA = dict(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def llama(**options):
    return randomised(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **options})))


def qwen2(**options):
    return randomised(Qwen2ForCausalLM(Qwen2Config(**{**LLAMA, **options})))


def tokens():
    return torch.randint(4, 60, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def theirs_bidirectional(module, input_ids, causal=False):
    """Their logits with a mask of four dimensions, which transformers takes as it is: bidirectional, or causal."""
    mask = torch.ones(len(input_ids), 1, LENGTH, LENGTH, dtype=torch.bool)
    with torch.no_grad():
        return module(input_ids, attention_mask=mask.tril() if causal else mask, use_cache=False).logits


def ours(model, input_ids, mask=None):
    """Our logits before the shift is undone: those of the same hidden state as theirs."""
    with torch.no_grad():
        return model.hidden_states(input_ids, mask) @ model.head_weight.T


def edit(folder, **changes):
    """Changes config.json; None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# ------------------------------------------------------------------------------------------------ GPT-2, DiffuGPT
@pytest.mark.parametrize("source", ["module", "folder", "from_pretrained"])
def test_gpt2_made_bidirectional_has_transformers_logits(tmp_path, source):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    if source == "from_pretrained":
        model = MaskedDiffusionLM.from_pretrained(tmp_path, mask_token_id=9)
    else:
        model = MaskedDiffusionLM.from_gpt2(theirs if source == "module" else tmp_path, mask_token_id=9)
    assert not model.training and model.config.logit_shift and model.config.architecture == "gpt2"
    assert (model.config.mask_token_id, model.config.pad_token_id, model.config.eos_token_id) == (9, 60, 2)
    expected = theirs_bidirectional(theirs, tokens())
    torch.testing.assert_close(ours(model, tokens())[..., :60], expected, **TOLERANCE)
    causal = theirs_bidirectional(theirs, tokens(), causal=True)
    torch.testing.assert_close(
        ours(model, tokens(), annealed_attention_mask(LENGTH, 0.0))[..., :60], causal, **TOLERANCE
    )
    with torch.no_grad():
        torch.testing.assert_close(causal, theirs(tokens()).logits, **TOLERANCE)  # the four-dimensional mask means it
        shifted = model(tokens()).logits[..., :60]
    assert (expected - causal).abs().max() > 0.1
    torch.testing.assert_close(shifted[:, 1:], expected[:, :-1], **TOLERANCE)
    torch.testing.assert_close(shifted[:, 0], expected[:, 0], **TOLERANCE)


def test_gpt2_gets_a_pad_token_that_is_the_mean_and_tied(tmp_path):
    theirs = gpt2()
    model = MaskedDiffusionLM.from_gpt2(theirs, mask_token_id=9, dropout=0.1, length_format="pad_fill")
    embeddings = theirs.transformer.wte.weight
    assert model.config.vocab_size == 61 and model.config.dropout == 0.1
    assert model.head_weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.head_weight[60], embeddings.mean(0), rtol=0, atol=1e-7)
    assert torch.equal(model.head_weight[:60], embeddings)
    model.head_weight.data.add_(1)
    assert torch.equal(embeddings, theirs.transformer.wte.weight)  # theirs is not touched
    model.save_pretrained(tmp_path)
    again = MaskedDiffusionLM.from_pretrained(tmp_path)
    assert again.config.length_format == "pad_fill" and again.config.pad_token_id == 60
    torch.testing.assert_close(ours(again, tokens()), ours(model, tokens()), rtol=0, atol=0)


def test_gpt2_takes_diffugpts_mask_token():
    theirs = gpt2(vocab_size=10600, n_layer=1)
    assert MaskedDiffusionLM.from_gpt2(theirs).config.mask_token_id == 10541
    with pytest.raises(ValueError, match="neither configuration nor tokenizer has a mask token: pass mask_token_id="):
        MaskedDiffusionLM.from_gpt2(gpt2())


@pytest.mark.parametrize("kept", ["both", "embed_tokens.weight", "lm_head.weight"])
def test_diffugpt_layout(tmp_path, kept):
    """As published: the transformer under denoise_model, the embedding beside it, one of two tied tensors perhaps."""
    theirs = gpt2()
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name == "transformer.wte.weight":
            name = "embed_tokens.weight"
        state[name.replace("transformer.", "denoise_model.")] = tensor.clone()
    if kept != "both":
        state = {k: v for k, v in state.items() if k not in ("embed_tokens.weight", "lm_head.weight") or k == kept}
    save_file(state, tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<mask>" if i == 17 else f"w{i}": i for i in range(60)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, mask_token="<mask>").save_pretrained(tmp_path)
    model = MaskedDiffusionLM.from_pretrained(tmp_path, pad_token_id=0)
    assert model.config.mask_token_id == 17 and model.config.vocab_size == 60 and model.config.logit_shift
    torch.testing.assert_close(ours(model, tokens()), theirs_bidirectional(theirs, tokens()), **TOLERANCE)


# ------------------------------------------------------------------------------------- Llama, DiffuLLaMA, Qwen2, Dream
@pytest.mark.parametrize("options", [{}, dict(attention_bias=True, mlp_bias=True, head_dim=6), dict(rope_theta=5e3)])
@pytest.mark.parametrize("prefixed", [False, True])
def test_diffullama_layout(tmp_path, options, prefixed):
    theirs = llama(**options)
    theirs.save_pretrained(tmp_path)
    if prefixed:  # as its training code writes it
        state = load_file(tmp_path / "model.safetensors")
        state = {k.replace("model.embed_", "embed_").replace("model.", "denoise_model."): v for k, v in state.items()}
        save_file(state, tmp_path / "model.safetensors")
    model = MaskedDiffusionLM.from_pretrained(tmp_path, mask_token_id=3)
    assert model.config.architecture == "llama" and model.config.logit_shift and model.config.pad_token_id is None
    torch.testing.assert_close(ours(model, tokens()), theirs_bidirectional(theirs, tokens()), **TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
def test_dream_layout(tmp_path, tied):
    theirs = qwen2(tie_word_embeddings=tied, rope_theta=1e6)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert list(tmp_path.glob("*.index.json"))
    edit(
        tmp_path, model_type="Dream", architectures=["DreamModel"], mask_token_id=58, pad_token_id=57, rope_theta=1e6,
        rope_parameters=None, layer_types=None, auto_map={"AutoModel": "modeling_dream.DreamModel"},
    )  # fmt: skip
    model = MaskedDiffusionLM.from_pretrained(tmp_path)
    assert (model.config.architecture, model.config.mask_token_id, model.config.pad_token_id) == ("dream", 58, 57)
    assert model.config.logit_shift and (model.head_weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(ours(model, tokens()), theirs_bidirectional(theirs, tokens()), **TOLERANCE)
    with torch.no_grad():
        expected = theirs_bidirectional(theirs, tokens())
        torch.testing.assert_close(model(tokens()).logits[:, 1:], expected[:, :-1], **TOLERANCE)


@pytest.mark.parametrize("weights", ["*.safetensors", "pytorch_model*.bin"])
def test_a_hub_repository_gives_safetensors_or_else_pickles(tmp_path, monkeypatch, weights):
    """The hub itself is out of reach: two functions of huggingface_hub are replaced by a folder."""
    theirs, asked = llama(), []
    theirs.save_pretrained(tmp_path)
    if weights.endswith("bin"):
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()

    def snapshot_download(repository, allow_patterns, **options):
        asked.append((repository, allow_patterns[-1], options))
        return str(tmp_path)

    checkpoints = "fastdiff.models.masked_lm_checkpoints."
    monkeypatch.setattr(checkpoints + "hf_hub_download", lambda repository, name, **options: str(tmp_path / name))
    monkeypatch.setattr(checkpoints + "snapshot_download", snapshot_download)
    model = MaskedDiffusionLM.from_pretrained("a/b", mask_token_id=3, revision="v1")
    assert asked[-1] == ("a/b", weights, {"revision": "v1"}) and len(asked) == 1 + weights.endswith("bin")
    torch.testing.assert_close(ours(model, tokens()), theirs_bidirectional(theirs, tokens()), **TOLERANCE)


def test_qwen2_becomes_a_dream_with_a_new_mask_token(tmp_path):
    theirs = qwen2()
    theirs.save_pretrained(tmp_path)
    model = MaskedDiffusionLM.from_pretrained(tmp_path, mask_token_id=60)
    assert model.config.vocab_size == 61
    torch.testing.assert_close(ours(model, tokens())[..., :60], theirs_bidirectional(theirs, tokens()), **TOLERANCE)


# ------------------------------------------------------------------------------------------------ LLaDA
LLADA = dict(
    model_type="llada", architectures=["LLaDAModelLM"], d_model=24, n_heads=6, n_kv_heads=3, n_layers=2,
    mlp_hidden_size=40, mlp_ratio=4, vocab_size=60, embedding_size=60, max_sequence_length=16, rope_theta=5e5,
    rms_norm_eps=1e-5, mask_token_id=58, eos_token_id=57, pad_token_id=57, weight_tying=False, activation_type="silu",
    block_type="llama", block_group_size=1, layer_norm_type="rms", include_bias=False, include_qkv_bias=False,
    attention_layer_norm=False, rope=True, alibi=False, scale_logits=False, input_emb_norm=False,
    multi_query_attention=None, clip_qkv=None,
)  # fmt: skip


def llada_checkpoint(folder, **changes):
    config = {**LLADA, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    width, inner, kv = 24, 40, 12
    shapes = {"wte": (60, width), "ln_f": (width,), "ff_out": (60, width)}
    for i in range(2):
        block = dict(
            attn_norm=(width,), ff_norm=(width,), q_proj=(width, width), k_proj=(kv, width), v_proj=(kv, width),
            attn_out=(width, width), ff_proj=(inner, width), up_proj=(inner, width), ff_out=(width, inner),
        )  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    state = {
        f"model.transformer.{name}.weight": torch.randn(shape, generator=generator) * (0.25 if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }
    save_file(state, folder / "model.safetensors")
    return {name.removeprefix("model.transformer."): tensor.double() for name, tensor in state.items()}


def plain_llada(weights, input_ids):
    """LLaDA's forward pass in float64, with loops where the model has tensors."""

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotated(vector, position):
        turned, half = vector.clone(), len(vector) // 2
        for i in range(half):
            angle = position * 5e5 ** (-2 * i / len(vector))
            a, b = vector[i], vector[i + half]
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    logits = []
    for row in input_ids:
        x = weights["wte.weight"][row]
        for layer in range(2):
            w = {name.split(".")[2]: t for name, t in weights.items() if name.startswith(f"blocks.{layer}.")}
            h, attended = norm(x, w["attn_norm"]), []
            for head in range(6):
                q, k, v = (h @ w[f"{n}_proj"].T for n in "qkv")
                q = q[:, head * 4 : head * 4 + 4]
                k, v = (t[:, head // 2 * 4 : head // 2 * 4 + 4] for t in (k, v))  # two heads share keys and values
                q, k = (torch.stack([rotated(vector, p) for p, vector in enumerate(t)]) for t in (q, k))
                attended.append((q @ k.T / 2).softmax(-1) @ v)
            x = x + torch.cat(attended, dim=1) @ w["attn_out"].T
            h = norm(x, w["ff_norm"])
            gate = h @ w["ff_proj"].T
            x = x + (gate * gate.sigmoid() * (h @ w["up_proj"].T)) @ w["ff_out"].T
        logits.append(norm(x, weights["ln_f.weight"]) @ weights["ff_out.weight"].T)
    return torch.stack(logits)


def test_llada_layout(tmp_path):
    weights = llada_checkpoint(tmp_path)
    model = MaskedDiffusionLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert model.config.architecture == "llada" and not model.config.logit_shift
    assert (model.config.mask_token_id, model.config.eos_token_id, model.config.pad_token_id) == (58, 57, 57)
    with torch.no_grad():
        logits = model(tokens()).logits
    # seen: 3e-7, from the angles, which are float32 as LLaDA's own
    torch.testing.assert_close(logits, plain_llada(weights, tokens()), rtol=0, atol=3e-6)
    model = MaskedDiffusionLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    torch.testing.assert_close(ours(model, tokens()).double(), logits, **TOLERANCE)
    assert MaskedDiffusionLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_llada_round_trip_in_our_own_format(tmp_path):
    llada_checkpoint(tmp_path / "theirs")
    model = MaskedDiffusionLM.from_pretrained(tmp_path / "theirs", length_format="eos_fill")
    model.save_pretrained(tmp_path / "ours")
    again = MaskedDiffusionLM.from_pretrained(tmp_path / "ours")
    assert isinstance(again.config, MaskedDiffusionLMConfig) and again.config.length_format == "eos_fill"
    torch.testing.assert_close(ours(again, tokens()), ours(model, tokens()), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what cannot be loaded
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="bert"), "a model of type 'bert'; expected one of fastdiff_masked_lm, gpt2 .GPT-2, DiffuGPT."),
        (dict(block_type="sequential"), "not a llada checkpoint .*block_type: got 'sequential'; expected 'llama'"),
        (dict(clip_qkv=8.0), "clip_qkv: got 8.0"),
        (dict(d_model=None), "'d_model' is missing"),
        (dict(mask_token_id=57), "mask_token_id: got 57, which is pad_token_id too"),
        (dict(mask_token_id=60), "mask_token_id: got 60; expected 0 to 59"),
        (dict(mask_token_id=None), "neither configuration nor tokenizer has a mask token"),
        (dict(n_kv_heads=6), r"layers\.0\.self_attn\.k_proj\.weight has shape \[12, 24\], expected \[24, 24\]"),
        (dict(quantization_config={"bits": 4}), "its weights are quantised"),
    ],
)
def test_a_foreign_checkpoint_that_does_not_fit_is_named(tmp_path, changes, message):
    llada_checkpoint(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        MaskedDiffusionLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such folder in .*; name one that is there"):
        MaskedDiffusionLM.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="^nobody/nothing: not a local folder, and could not be") as caught:
        MaskedDiffusionLM.from_pretrained("nobody/nothing", local_files_only=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no config.json in it"):
        MaskedDiffusionLM.from_pretrained(tmp_path)
    llada_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors: a file; expected the folder"):
        MaskedDiffusionLM.from_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="hidden_szie: not an option for a checkpoint of type 'llada'"):
        MaskedDiffusionLM.from_pretrained(tmp_path, hidden_szie=3)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model.safetensors: cut short, damaged"):
        MaskedDiffusionLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in it; expected model.safetensors or pytorch_model.bin"):
        MaskedDiffusionLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not a JSON file"):
        MaskedDiffusionLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["missing tensor", "cut short", "no file"])
def test_our_own_checkpoint_never_falls_back_to_random_weights(tmp_path, damage):
    MaskedDiffusionLM(MaskedDiffusionLMConfig.from_size("tiny", vocab_size=60, num_hidden_layers=1)).save_pretrained(
        tmp_path
    )
    path = tmp_path / "model.safetensors"
    if damage == "missing tensor":
        state = load_file(path)
        del state["model.layers.0.mlp.up_proj.weight"]
        save_file(state, path, metadata={"format": "pt"})
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    message = "up_proj.weight missing" if damage == "missing tensor" else "weights missing, cut short or damaged"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        MaskedDiffusionLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_gpt2_options_that_do_not_exist_here_are_named():
    with pytest.raises(ValueError, match="reorder_and_upcast_attn: got True; expected False"):
        MaskedDiffusionLM.from_gpt2(gpt2(reorder_and_upcast_attn=True), mask_token_id=9)
    with pytest.raises(ValueError, match="activation_function: got 'relu'; expected gelu_new"):
        MaskedDiffusionLM.from_gpt2(gpt2(activation_function="relu"), mask_token_id=9)
    with pytest.raises(ValueError, match="from_gpt2: got a model of type 'llama'; expected gpt2"):
        MaskedDiffusionLM.from_gpt2(llama(), mask_token_id=9)
    with pytest.raises(ValueError, match=r"special tokens \[70, 71\] are beyond its 60 ids"):
        MaskedDiffusionLM.from_gpt2(gpt2(), mask_token_id=70, pad_token_id=71)
