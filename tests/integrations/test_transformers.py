"""transformers' models with attn_implementation="qgfd"."""

import warnings

import pytest
import torch
import transformers
from integrations.tiny_models import (
    CAUSAL,
    LENGTH,
    NAMES,
    SETTINGS,
    TOLERANCE,
    build,
    close,
    definition,
    first,
    inputs,
    padding,
)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import fastdiff.integrations.transformers as qgfd
from fastdiff.integrations.transformers import mark_cross_attention


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


def test_default_settings_without_a_config():
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
    with pytest.raises(ValueError, match="attention_mask: got values other than 0 and -inf"):
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


def test_compiles_without_a_break():
    model = build("llama", {"steps": 1})
    given = inputs("llama") | {"attention_mask": padding("left"), "use_cache": False}
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
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    qgfd.use_qgfd(again, alpha=0.5)
    assert again.config.qgfd == settings | {"alpha": 0.5}, "settings that a model was saved with stay"


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"step": 1, "alhpa": 0.1},
            r"config.qgfd: got unknown keys \['step', 'alhpa'\]; expected some of steps, alpha, ",
        ),
        ({"alpha": 1.5}, r"config.qgfd.alpha: got 1.5; expected a number in \[0, 1\]"),
        ({"steps": "two"}, "config.qgfd.steps: got 'two'; expected an int from 0"),
        ({"transition": "keys"}, "config.qgfd.transition: got 'keys'; expected 'attention' or 'key'"),
        ([1], r"config.qgfd: got \[1\]; expected a dict"),
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
    with pytest.raises(ValueError, match='gives its attention position_bias, which "qgfd" does not have'):
        build("t5", {"steps": 1})(input_ids=ids, decoder_input_ids=ids)
    plain, given = build("t5"), {"input_ids": ids, "decoder_input_ids": ids}
    qgfd.use_qgfd(plain, steps=0)  # T5's encoder and decoder have copies of the config
    assert torch.equal(first(plain, **given), first(build("t5", implementation="sdpa"), **given))
    module = build("bert").encoder.layer[0].attention.self
    states = torch.randn(1, 4, 5, 8)
    for name in ("softcap", "s_aux", "head_mask"):
        with pytest.raises(ValueError, match=f"gives its attention {name}, which"):
            qgfd.qgfd_attention_forward(module, states, states, states, None, **{name: torch.ones(4)})
    with pytest.raises(ValueError, match='output_attentions: got True; .* attn_implementation="eager"'):
        qgfd.qgfd_attention_forward(module, states, states, states, None, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask: got torch.int64 .* with is_causal=False"):
        qgfd.qgfd_attention_forward(module, states, states, states, torch.ones(1, 5, dtype=torch.int64))


def test_registering_twice_is_registering_once():
    qgfd.register()
    qgfd.register()
    assert AttentionInterface()["qgfd"] is qgfd.qgfd_attention_forward
    assert AttentionMaskInterface()["qgfd"] is qgfd.qgfd_mask
