"""Generation of transformers' causal models with attn_implementation="qgfd", with caches and without."""

import warnings

import pytest
import torch
from integrations.tiny_models import CAUSAL, LENGTH, SETTINGS, build, close, first, inputs, padding
from transformers import DynamicCache, EncoderDecoderCache

from fastdiff.integrations.transformers import QGFDCache

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
    first(model, **inputs(name), use_cache=True)  # one forward pass is not a generation
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
        (lambda cache: cache.crop(-1), lambda x: x[:, :-1]),
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
