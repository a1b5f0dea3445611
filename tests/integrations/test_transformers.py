"""transformers' models with attn_implementation="qgfd": random, two layers, built from configs."""

import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import sdpa_mask

import fastdiff.integrations.transformers as qgfd
from fastdiff.integrations.transformers import QGFDCache, mark_cross_attention

TOLERANCE = 1e-5  # of 1 + the largest output (gradients: ratio of norms); observed: 2.9e-6, fp32 on an AVX-512 machine
LENGTH, VOCAB = 9, 50
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64}
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | TOKENS | {"num_key_value_heads": 2}
NAMES = ["bert", "vit", "gpt2", "llama"]
CAUSAL = ["gpt2", "llama"]
SETTINGS = [
    {"steps": 1},
    {"steps": 2, "alpha": 0.8, "recurrence": "restart", "temperature": 2.0},
    {"steps": 2, "transition": "key", "temperature": 0.5},
    {"steps": 1, "transition": "key", "sink_isolation": True},
]


def build(name, settings=None, implementation="qgfd", **changes):
    config, kind = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "vit": (transformers.ViTConfig, transformers.ViTModel),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        "t5": (transformers.T5Config, transformers.T5Model),
        "qformer": (transformers.Blip2QFormerConfig, transformers.Blip2QFormerModel),
    }[name]
    given = {
        "bert": SIZES | {"vocab_size": VOCAB},
        "vit": SIZES | {"image_size": 12, "patch_size": 4},
        "gpt2": GPT2 | TOKENS,
        "llama": LLAMA,
        "mistral": LLAMA | {"sliding_window": 4},
        "bart": TOKENS
        | {"d_model": 32, "max_position_embeddings": 64}
        | {
            f"{side}_{what}": n
            for side in ("encoder", "decoder")
            for what, n in (("layers", 2), ("attention_heads", 4))
        }
        | {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
        "t5": {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "qformer": SIZES | {"encoder_hidden_size": 20, "cross_attention_frequency": 1},
    }[name]
    torch.manual_seed(0)
    model = kind(config(**(given | changes))).eval()
    for parameter in model.parameters():  # sharp attention, so that hops change something
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation(implementation)
    if settings is not None:
        model.config.qgfd = settings
    return model


def inputs(name, batch=3):
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 12, 12)}
    return {"input_ids": torch.randint(3, VOCAB, (batch, LENGTH))}


def padding(side):
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, :1] = 0
    return mask if side == "left" else mask.flip(1)


def first(model, **given):
    return model(**given)[0]


def close(got, wanted):
    scale = 1 + wanted.abs().max()
    assert (got - wanted).abs().max() <= TOLERANCE * scale, f"off by {(got - wanted).abs().max() / scale:.2e}"


def definition(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """Attention as QGFD is defined, with L x L matrices; attention_mask is bool [B, 1, L, L]."""
    settings = {"steps": 1, "alpha": 0.5, "transition": "attention", "recurrence": "power", "temperature": 1.0}
    settings |= module.config.qgfd
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    mask = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask

    def weights(scores):
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)

    a, p = weights(query @ key.mT * scaling), weights(query @ key.mT * scaling / settings["temperature"])
    if settings["transition"] == "key":
        unit = key / key.norm(dim=-1, keepdim=True)
        p = weights(unit @ unit.mT / settings["temperature"])
        if settings.get("sink_isolation"):
            rows = mask.expand(len(query), -1, -1, -1).any(-2)[:, 0].int().argmax(-1)
            for sample, row in enumerate(rows.tolist()):
                p[sample, :, row] = torch.eye(p.shape[-1])[row]
    mixed = a
    for step in range(1, settings["steps"] + 1):
        mixed = mixed @ p
        if settings["recurrence"] == "restart" or step == settings["steps"]:
            mixed = settings["alpha"] * mixed + (1 - settings["alpha"]) * a
    return (mixed @ value).transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def _definition():
    """attn_implementation="by_definition"."""
    AttentionInterface.register("by_definition", definition)

    def mask(*args, **given):
        return sdpa_mask(*args, **(given | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))

    AttentionMaskInterface.register("by_definition", mask)


@pytest.fixture
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{"steps": 0}, {"alpha": 0}])
def test_nothing_diffused_is_sdpa(name, settings):
    ours, theirs = build(name, settings), build(name, implementation="sdpa")
    given = inputs(name)
    for mask in [{}] if name == "vit" else [{}, {"attention_mask": padding("left")}]:
        assert torch.equal(first(ours, **given, **mask), first(theirs, **given, **mask))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.usefixtures("_no_warning")
def test_values_are_those_of_the_definition(name, settings):
    ours, theirs = build(name, settings), build(name, settings, "by_definition")
    given = inputs(name)
    masks = [{}] if name == "vit" else [{}, {"attention_mask": padding("left")}, {"attention_mask": padding("right")}]
    for mask in masks:
        seen = mask.get("attention_mask", torch.ones(3, LENGTH)).bool() if mask else ...
        close(first(ours, **given, **mask)[seen], first(theirs, **given, **mask)[seen])
    plain = build(name, {"steps": 0})
    assert (first(ours, **given) - first(plain, **given)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_padded_batch_is_its_samples_alone(name, settings):
    model, ids = build(name, settings), inputs(name)["input_ids"]
    side = "right" if name == "bert" else "left"
    mask = padding(side)
    positions = {} if name == "bert" else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    padded = first(model, input_ids=ids, attention_mask=mask, **positions)
    for row in range(3):
        seen = mask[row].bool()
        close(padded[row, seen], first(model, input_ids=ids[row : row + 1, seen])[0])


def test_settings_of_system_001_without_a_config():
    named = build("bert", {"steps": 1, "alpha": 0.5})
    assert torch.equal(first(build("bert"), **inputs("bert")), first(named, **inputs("bert")))


@pytest.mark.usefixtures("_no_warning")
def test_masks_of_padding_stay_vectors():
    seen = []
    original = AttentionInterface()["qgfd"]

    def record(module, query, key, value, attention_mask, **others):
        seen.append(None if attention_mask is None else tuple(attention_mask.shape))
        return original(module, query, key, value, attention_mask, **others)

    AttentionInterface.register("qgfd", record)
    try:
        for name in ("bert", "llama"):
            build(name)(**inputs(name), attention_mask=padding("left"))
            build(name)(**inputs(name), attention_mask=torch.ones(3, LENGTH, dtype=torch.int64))
    finally:
        qgfd.register()
    assert seen == [(3, 1, 1, LENGTH)] * 2 + [None] * 2 + [(3, LENGTH)] * 2 + [None] * 2
    assert AttentionInterface()["qgfd"] is original


@pytest.mark.filterwarnings("ignore:QGFD's hops reach keys")
@pytest.mark.parametrize("settings", SETTINGS[::2])
def test_other_masks_are_dense(settings):
    ids = inputs("llama")["input_ids"]
    window = [build("mistral", settings, implementation) for implementation in ("qgfd", "by_definition")]
    close(*(first(model, input_ids=ids, use_cache=False) for model in window))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(3, -1)
    models = [build("llama", settings, implementation) for implementation in ("qgfd", "by_definition")]
    close(*(first(model, input_ids=ids, position_ids=packed, use_cache=False) for model in models))
    whole = first(models[0], input_ids=ids, position_ids=packed, use_cache=False)
    close(whole[:, 4:7], first(models[0], input_ids=ids[:, 4:7]))  # sequences apart from each other
    custom = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    custom[:, :, 3:, 1] = False
    floats = torch.zeros(custom.shape).masked_fill(~custom, torch.finfo(torch.float32).min)
    for model, mask in zip(models * 2, (custom, custom, floats, custom), strict=True):
        close(first(model, input_ids=ids, attention_mask=mask), first(models[1], input_ids=ids, attention_mask=custom))
    with pytest.raises(ValueError, match="attention_mask has values other than 0 and -inf"):
        models[0](input_ids=ids, attention_mask=floats + 0.5)


def test_a_window_longer_than_the_sequence_is_causal(_no_warning):
    settings, given = {"steps": 2}, inputs("llama") | {"attention_mask": padding("left")}
    models = [build("mistral", settings, how, sliding_window=30) for how in ("qgfd", "by_definition")]
    close(*(first(model, **given)[padding("left").bool()] for model in models))


# ------------------------------------------------------------------------------------------ cross-attention


def test_cross_attention_is_plain():
    ids = inputs("bart")["input_ids"]
    mask = {"attention_mask": padding("right")}
    ours, plain = build("bart", {"steps": 1}), build("bart", {"steps": 0})
    for length in (4, LENGTH):  # as long as the encoder's, too
        given = {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :length], **mask}
        assert (first(ours, **given) - first(plain, **given)).abs().max() > 1e-2
        for module in (*ours.model.encoder.layers, *ours.model.decoder.layers):
            module.self_attn.config = plain.config
        assert torch.equal(first(ours, **given), first(plain, **given))
        for module in (*ours.model.encoder.layers, *ours.model.decoder.layers):
            module.self_attn.config = ours.config
    theirs = build("gpt2", {"steps": 1}, add_cross_attention=True)
    theirs.transformer.h[0].attn.config = theirs.transformer.h[1].attn.config = build("gpt2", {"steps": 0}).config
    undiffused = build("gpt2", {"steps": 0}, add_cross_attention=True)
    context = {"encoder_hidden_states": torch.randn(3, LENGTH, 32)}
    assert torch.equal(first(theirs, input_ids=ids, **context), first(undiffused, input_ids=ids, **context))


def test_classes_that_serve_as_both_are_to_be_marked():
    model, plain = build("qformer", {"steps": 1}), build("qformer", {"steps": 0})
    queries, context = torch.randn(2, 5, 32), torch.randn(2, 6, 20)
    with pytest.raises(ValueError, match=r"Blip2QFormerMultiHeadAttention may attend .*mark_cross_attention\(model\)"):
        model(queries, encoder_hidden_states=context)
    model.config._attn_implementation = "sdpa"
    qgfd.use_qgfd(model, steps=1)
    assert mark_cross_attention(model) == []  # done
    found = [name for name, module in model.named_modules() if getattr(module, "is_cross_attention", False) is True]
    assert found and model.config._attn_implementation == "qgfd" and all("crossattention" in name for name in found)
    assert (first(model, query_embeds=queries, encoder_hidden_states=context)
            - first(plain, query_embeds=queries, encoder_hidden_states=context)).abs().max() > 1e-2  # fmt: skip
    for module in model.modules():
        if getattr(module, "is_cross_attention", None) is False:
            module.config = plain.config
    square = {"query_embeds": queries, "encoder_hidden_states": torch.randn(2, 5, 20)}  # lengths equal by chance
    assert torch.equal(first(model, **square), first(plain, **square))


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", SETTINGS[::2])
def test_gradients_are_those_of_the_definition_and_of_checkpointing(name, settings):
    gradients = []
    for implementation, checkpointing in (("by_definition", False), ("qgfd", False), ("qgfd", True)):
        changes = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
        changes["bert"] = changes["vit"] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = build(name, settings, implementation, **changes.get(name, {})).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        first(model, **inputs(name), **({"use_cache": False} if name in CAUSAL else {})).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    wanted, ours, again = gradients
    assert wanted.isfinite().all() and (ours - wanted).norm() <= TOLERANCE * wanted.norm()
    assert torch.equal(ours, again)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiles_without_a_break(name):
    model, given = build(name, {"steps": 1}), inputs(name) | {"attention_mask": padding("right")}
    given |= {"use_cache": False} if name in CAUSAL else {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(first(compiled, **given), first(model, **given))


def test_dropout_in_training_takes_the_dense_path(monkeypatch):
    import fastdiff.nn.qgfd as modules

    calls = []
    for name in ("qgfd_attention", "qgfd_attention_dense"):
        original = getattr(modules, name)

        def record(*args, _original=original, _name=name, **given):
            calls.append((_name, given.get("dropout_p"), given.get("hop_dropout_p")))
            return _original(*args, **given)

        monkeypatch.setattr(modules, name, record)
    mixed = {"attention_probs_dropout_prob": 0.25, "hidden_dropout_prob": 0.0}
    for settings, training in (({}, True), ({"dropout_kind": "hop"}, True), ({}, False)):
        model = build("bert", settings, **mixed).train(training)
        first(model, **inputs("bert"), attention_mask=padding("right"))
    pairs = [("qgfd_attention_dense", 0.25, None), ("qgfd_attention", None, 0.25), ("qgfd_attention", None, 0.0)]
    assert calls == [call for call in pairs for _ in range(2)]


def test_settings_survive_saving(tmp_path):
    settings = {"steps": 2, "alpha": 0.25, "transition": "key", "recurrence": "restart", "sink_isolation": True}
    model, given = build("llama", settings), inputs("llama")
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="qgfd").eval()
    assert loaded.config.qgfd == settings and loaded.config._attn_implementation == "qgfd"
    assert torch.equal(first(loaded, **given), first(model, **given))


# ------------------------------------------------------------------------------------------ generation

KEY = SETTINGS[2:]


def generate(model, mask=None, **given):
    ids = inputs("llama")["input_ids"]
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    out = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, do_sample=False, **options, **given)
    return out.sequences, torch.stack(out.logits) if given.get("num_beams", 1) == 1 else out.logits[-1]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("settings", KEY)
@pytest.mark.parametrize(("kind", "beams"), [(QGFDCache, 1), (QGFDCache, 3), (DynamicCache, 1)])
def test_generation_with_a_cache_is_generation_without(name, settings, kind, beams):
    model = build(name, settings)
    for mask in (None, padding("left")):
        wanted, logits = generate(model, mask, num_beams=beams, use_cache=False)
        cache = kind(config=model.config)
        got, ours = generate(model, mask, num_beams=beams, past_key_values=cache)
        assert torch.equal(got, wanted)
        close(ours, logits)
        if kind is QGFDCache:
            assert all(layer.diffused.length == layer.get_seq_length() > LENGTH for layer in cache.layers)


@pytest.mark.parametrize("settings", SETTINGS)
def test_left_padding_changes_no_token(settings):
    model, mask = build("llama", settings), padding("left")
    batch, _ = generate(model, mask, use_cache=False)
    for row in range(3):
        ids = inputs("llama")["input_ids"][row : row + 1, mask[row].bool()]
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        alone = model.generate(ids, use_cache=False, **given)
        assert torch.equal(alone[0, ids.shape[1] :], batch[row, LENGTH:][: alone.shape[1] - ids.shape[1]])


@pytest.mark.parametrize("name", CAUSAL)
def test_transition_attention_refuses_a_cache(name):
    model = build(name, {"steps": 1})
    first(model, **inputs(name), use_cache=True)  # one forward is no generation
    generate(model, use_cache=False)
    for given in ({}, {"past_key_values": QGFDCache(model.config)}):
        with pytest.raises(ValueError, match="transition 'attention' with a KV cache .* expected use_cache=False"):
            generate(model, **given)
    model.config.qgfd = {"steps": 0}
    generate(model)


def test_an_operation_on_the_cache_is_one_on_the_diffused_values():
    model, ids = build("llama", KEY[0]), inputs("llama")["input_ids"]
    order = torch.tensor([2, 0, 0])

    def after(cache, rows):  # logits of two more tokens
        return first(model, input_ids=ids[rows, :2], past_key_values=cache)

    operations = [
        (lambda cache: cache.reorder_cache(order), lambda x: x[order]),
        (lambda cache: cache.batch_select_indices(order[:2]), lambda x: x[order[:2]]),
        (lambda cache: cache.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
        (lambda cache: cache.crop(-3), lambda x: x[:, :-3]),
    ]
    for operate, same in operations:
        cache = QGFDCache(model.config)
        model(input_ids=ids, past_key_values=cache)
        operate(cache)
        prompt = same(ids)
        more = ids[: len(prompt), :2] if len(prompt) <= 3 else ids.repeat(2, 1)[: len(prompt), :2]
        got = first(model, input_ids=more, past_key_values=cache)
        wanted = first(model, input_ids=torch.cat([prompt, more], 1), use_cache=False)[:, -2:]
        close(got, wanted)
    cache.reset()
    close(first(model, input_ids=ids, past_key_values=cache), first(model, input_ids=ids, use_cache=False))


def test_chunks_of_a_prompt_and_no_config():
    model, ids = build("llama", KEY[1]), inputs("llama")["input_ids"]
    cache = QGFDCache()
    parts = [first(model, input_ids=part, past_key_values=cache) for part in ids.split([4, 3, 2], dim=1)]
    close(torch.cat(parts, 1), first(model, input_ids=ids, use_cache=False))
    undiffused = build("llama", {"steps": 0})
    cache = DynamicCache()
    parts = [first(undiffused, input_ids=part, past_key_values=cache) for part in ids.split([4, 3, 2], dim=1)]
    close(torch.cat(parts, 1), first(undiffused, input_ids=ids, use_cache=False))


def test_encoder_decoders_generate():
    model = build("bart", KEY[0])
    ids = inputs("bart")["input_ids"]
    given = {"attention_mask": padding("right"), "max_new_tokens": 5, "num_beams": 1, "do_sample": False}
    wanted = model.generate(ids, use_cache=False, **given)
    cache = EncoderDecoderCache(QGFDCache(), DynamicCache())
    assert torch.equal(model.generate(ids, past_key_values=cache, **given), wanted)
    assert torch.equal(model.generate(ids, **given), wanted)


def test_windows_and_static_caches_are_refused():
    ids = inputs("llama")["input_ids"]
    for model, given in (
        (build("mistral", KEY[0]), {}),
        (build("llama", KEY[0]), {"cache_implementation": "static"}),
    ):
        with pytest.raises(ValueError, match="a mask that is not causal over all keys"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, disable_compile=True, **given)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"step": 1, "alhpa": 0.1},
            r"config.qgfd has unknown keys \['step', 'alhpa'\]; expected some of steps, alpha, ",
        ),
        ({"alpha": 1.5}, r"config.qgfd: alpha is 1.5; expected a number in \[0, 1\]"),
        ({"steps": "two"}, "config.qgfd: steps is 'two'; expected an int >= 0"),
        ({"transition": "keys"}, "config.qgfd: transition is 'keys'; expected 'attention' or 'key'"),
        ([1], r"config.qgfd is \[1\]; expected a dict"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        build("bert", settings)(**inputs("bert"))
    if isinstance(settings, dict):
        with pytest.raises(ValueError, match=message.replace("config.qgfd", "use_qgfd")):
            qgfd.use_qgfd(build("bert"), **settings)
    assert "\n" not in str(raised.value)


def test_arguments_that_change_attention_are_refused():
    ids = inputs("t5")["input_ids"]
    with pytest.raises(ValueError, match='gives its attention position_bias, which "qgfd" has not'):
        build("t5", {"steps": 1})(input_ids=ids, decoder_input_ids=ids)
    plain, given = build("t5"), {"input_ids": ids, "decoder_input_ids": ids}
    qgfd.use_qgfd(plain, steps=0)  # T5's encoder and decoder have copies of the config
    assert torch.equal(first(plain, **given), first(build("t5", implementation="sdpa"), **given))
    module = build("bert").encoder.layer[0].attention.self
    states = torch.randn(1, 4, 5, 8)
    for name in ("softcap", "s_aux", "head_mask"):
        with pytest.raises(ValueError, match=f"gives its attention {name}, which"):
            qgfd.qgfd_attention_forward(module, states, states, states, None, **{name: torch.ones(4)})
    with pytest.raises(ValueError, match='output_attentions is True; .* attn_implementation="eager"'):
        qgfd.qgfd_attention_forward(module, states, states, states, None, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask is torch.int64 .* with is_causal=False"):
        qgfd.qgfd_attention_forward(module, states, states, states, torch.ones(1, 5, dtype=torch.int64))


def test_registering_twice_is_registering_once():
    qgfd.register()
    qgfd.register()
    assert AttentionInterface()["qgfd"] is qgfd.qgfd_attention_forward
    assert AttentionMaskInterface()["qgfd"] is qgfd.qgfd_mask
