"""Other projects' language models as training scripts leave them: wrappers, prefixes, shards, variants, sizes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_masked_lm_checkpoints import TOLERANCE, edit, gpt2, llada_checkpoint, llama, ours, qwen2, tokens

from fastdiff.models import MaskedDiffusionLM, MaskedDiffusionLMConfig

BUILT = {
    "gpt2": (gpt2, dict(mask_token_id=9)),
    "llama": (llama, dict(mask_token_id=9)),
    "qwen2": (qwen2, dict(mask_token_id=9)),
    "tied qwen2": (lambda: qwen2(tie_word_embeddings=True), dict(mask_token_id=9)),
    "llada": (None, {}),
}
HIDDEN_LAYERS = {"gpt2": "n_layer", "llada": "n_layers"}


def write(kind, folder):
    """A folder of this layout; options to load it with."""
    make, options = BUILT[kind]
    llada_checkpoint(folder) if make is None else make().save_pretrained(folder)
    return options


def state_in(folder):
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def rewrite(folder, content):
    """Puts `content` into the folder's weights, as a PyTorch file."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin")


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 1},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "ema_model": lambda state: {"ema_model": state, "model": {n: torch.zeros_like(t) for n, t in state.items()}},
    "module": lambda state: {"module": prefixed(state, "module.")},
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "Lightning": lambda state: {"state_dict": prefixed(state, "model.")},
    "net": lambda state: prefixed(state, "net."),
}


@pytest.mark.parametrize("kind", BUILT)
def test_every_wrapper_and_prefix_gives_the_same_logits(tmp_path, kind):
    options = write(kind, tmp_path)
    expected, state = ours(MaskedDiffusionLM.from_pretrained(tmp_path, **options), tokens()), state_in(tmp_path)
    for name, wrap in WRAPPED.items():
        rewrite(tmp_path, wrap(state))
        found = ours(MaskedDiffusionLM.from_pretrained(tmp_path, **options), tokens())
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["gpt2", "tied qwen2"])
def test_a_model_saved_without_its_head(tmp_path, kind):
    make, options = BUILT[kind]
    module = make()
    module.save_pretrained(tmp_path / "whole")
    getattr(module, module.base_model_prefix).save_pretrained(tmp_path / "base")
    whole, base = (MaskedDiffusionLM.from_pretrained(tmp_path / name, **options) for name in ("whole", "base"))
    torch.testing.assert_close(ours(base, tokens()), ours(whole, tokens()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_shards_and_variants_of_either_kind(tmp_path, kind, variant, safe):
    make, options = BUILT[kind]
    module, folder = make(), tmp_path / "sharded"
    expected = ours(MaskedDiffusionLM.from_pretrained(_saved(module, tmp_path / "whole"), **options), tokens())
    module.save_pretrained(folder, variant=variant, max_shard_size="10KB")
    index = next(folder.glob("*.index*.json"))
    if not safe:  # as older versions of transformers wrote them
        shards = json.loads(index.read_text())["weight_map"]
        renamed = {s: s.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin") for s in shards.values()}
        for old, new in renamed.items():
            torch.save(load_file(folder / old), folder / new)
            (folder / old).unlink()
        index.unlink()
        index = folder / (
            "pytorch_model.bin.index.json" if variant is None else f"pytorch_model.bin.index.{variant}.json"
        )
        index.write_text(json.dumps({"weight_map": {name: renamed[shard] for name, shard in shards.items()}}))
    assert len(list(folder.iterdir())) > 3
    for given in ({}, {"variant": variant}):
        found = MaskedDiffusionLM.from_pretrained(folder, **options, **given)
        torch.testing.assert_close(ours(found, tokens()), expected, rtol=0, atol=0)


def _saved(module, folder):
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", BUILT)
def test_dtypes_by_name(tmp_path, kind):
    options = write(kind, tmp_path)
    for dtype, expected in (("bfloat16", torch.bfloat16), ("auto", torch.float32), (None, torch.float32)):
        model = MaskedDiffusionLM.from_pretrained(tmp_path, dtype=dtype, **options)
        assert {p.dtype for p in model.parameters()} == {expected} and model.config.dtype == expected
    with pytest.raises(ValueError, match="dtype: got 'int8'; expected float32, bfloat16 or float16"):
        MaskedDiffusionLM.from_pretrained(tmp_path, dtype="int8", **options)


@pytest.mark.parametrize("kind", [*BUILT, "ours"])
def test_unknown_missing_and_numbers_that_are_no_weights(tmp_path, kind):
    if kind == "ours":
        options = {}
        own = dict(vocab_size=60, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
        MaskedDiffusionLM(MaskedDiffusionLMConfig(**own)).save_pretrained(tmp_path)
    else:
        options = write(kind, tmp_path)
    state = state_in(tmp_path)
    name = next(n for n in sorted(state) if state[n].ndim == 2 and ("mlp" in n or "ff_proj" in n))
    for change, message in (
        ({"extra.lora_A.weight": torch.ones(2)}, "extra.lora_A.weight is unknown"),
        ({name + "_scale": torch.ones(1)}, "scale"),
        ({name: None}, " is missing"),
        ({name: state[name].to(torch.int8)}, " has dtype torch.int8, expected float32, bfloat16 or float16"),
        ({name: state[name].to(torch.float8_e4m3fn)}, " has dtype torch.float8_e4m3fn"),
    ):
        kept = {n: t.contiguous() for n, t in {**state, **change}.items() if t is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError) as caught:
            MaskedDiffusionLM.from_pretrained(tmp_path, **options)
        assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_weights_of_our_own_in_a_pytorch_file(tmp_path):
    MaskedDiffusionLM(MaskedDiffusionLMConfig.from_size("tiny", vocab_size=60, num_hidden_layers=1)).save_pretrained(
        tmp_path
    )
    rewrite(tmp_path, state_in(tmp_path) | {"extra.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="extra.weight is unknown"):
        MaskedDiffusionLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llada"])
def test_a_head_of_its_own_that_is_missing(tmp_path, kind):
    """It was taken for tied to the embeddings, in silence."""
    options = write(kind, tmp_path)
    state = state_in(tmp_path)
    head = "lm_head.weight" if kind != "llada" else "model.transformer.ff_out.weight"
    del state[head]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is missing"):
        MaskedDiffusionLM.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("kind", [*BUILT, "ours"])
def test_sizes_are_compared_before_anything_is_built(tmp_path, kind):
    if kind == "ours":
        options = {}
        own = dict(vocab_size=60, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
        MaskedDiffusionLM(MaskedDiffusionLMConfig(**own)).save_pretrained(tmp_path)
    else:
        options = write(kind, tmp_path)
    whole = (tmp_path / "config.json").read_text()
    layers = HIDDEN_LAYERS.get(kind, "num_hidden_layers")
    inner = {"gpt2": "n_inner", "llada": "mlp_hidden_size"}.get(kind, "intermediate_size")
    for change, message in (
        ({layers: 1e7}, f"{layers}: got 10000000.0 with "),
        ({layers: 10**7}, f"{layers}: got 10000000 with "),
        ({layers: 3}, "is missing"),
        ({inner: 1 << 40}, "has shape"),
        ({inner: "wide"}, str(tmp_path)),
        ({"num_labels": 10**9}, "num_labels: got 1000000000"),
    ):
        edit(tmp_path, **change)
        with pytest.raises(ValueError) as caught:
            MaskedDiffusionLM.from_pretrained(tmp_path, **options)
        assert message in str(caught.value) and "\n" not in str(caught.value), (change, str(caught.value))
        (tmp_path / "config.json").write_text(whole)
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ValueError, match="config.json: not a JSON file"):
        MaskedDiffusionLM.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation", "attn_implementation"])
def test_our_own_configuration_names_no_code(tmp_path, key, monkeypatch):
    own = dict(vocab_size=60, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
    model = MaskedDiffusionLM(MaskedDiffusionLMConfig(**own)).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    value = {"AutoModel": "evil.Evil"} if key == "auto_map" else "stranger/evil-kernel"
    edit(tmp_path, **{key: value})
    try:
        again = MaskedDiffusionLM.from_pretrained(tmp_path)
    except ValueError as error:
        assert "attn_implementation: got 'stranger/evil-kernel'; expected 'sdpa'" in str(error) and key != "auto_map"
    else:
        torch.testing.assert_close(ours(again, tokens()), ours(model, tokens()), **TOLERANCE)


def test_a_variant_of_our_own(tmp_path):
    own = dict(vocab_size=60, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
    model = MaskedDiffusionLM(MaskedDiffusionLMConfig(**own)).eval()
    model.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "model.safetensors").exists()
    for options in ({}, {"variant": "fp16"}):
        again = MaskedDiffusionLM.from_pretrained(tmp_path, **options)
        torch.testing.assert_close(ours(again, tokens()), ours(model, tokens()), rtol=0, atol=0)


def test_an_index_of_a_stranger(tmp_path):
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for weight_map, message in (
        (["a"], "weight_map: got list; expected names of shards by tensor"),
        ({"w": "../x.safetensors"}, "got the shard '../x.safetensors'"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError) as caught:
            MaskedDiffusionLM.from_pretrained(tmp_path, mask_token_id=9)
        assert message in str(caught.value) and "index.json" in str(caught.value)
