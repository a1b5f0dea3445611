"""Attention of `MaskedDiffusionLM`: a few columns, caches of a few rows, rows without a condition, flash-attn."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from models.test_masked_lm import ARCHITECTURES, TOLERANCE, ids, model

from fastdiff.models import MaskedDiffusionLM
from fastdiff.nn import KeyValueCache, flash, transformer

COLUMNS = torch.tensor([[0, 3, 4], [9, 9, 1], [5, 2, 7]])  # in any order, twice too


def picked(states, columns=COLUMNS):
    return states[torch.arange(len(columns))[:, None], columns]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_of_a_few_columns_are_those_of_all(architecture):
    built = model(architecture, num_key_value_heads=2, cross_attention_dim=20).double()
    padding = torch.ones(3, 10, dtype=torch.bool)
    padding[2, :2] = False
    condition = torch.randn(3, 5, 20, dtype=torch.float64)
    for mask in (None, padding, torch.ones(3, 10, 10, dtype=torch.bool).tril()):
        given = dict(encoder_hidden_states=condition)
        whole = built.hidden_states(ids(), mask, **given)
        few = built.hidden_states(ids(), mask, output_columns=COLUMNS, **given)
        torch.testing.assert_close(few, picked(whole), rtol=0, atol=1e-12)  # seen: 1e-14
    cache, columns = KeyValueCache(), torch.arange(2, 8)
    built.hidden_states(ids(), padding, cache=cache, output_columns=COLUMNS)
    part = dict(cache=cache, cache_columns=columns)
    changed = ids(seed=1)[:, columns]
    whole = built.hidden_states(changed, padding, **part)
    few = built.hidden_states(changed, padding, output_columns=COLUMNS % 6, **part)
    torch.testing.assert_close(few, picked(whole, COLUMNS % 6), rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["gpt2", "llada"])
def test_some_rows_of_a_cache_go_on_as_all_would(architecture):
    """Row 1 is computed anew in whole, rows 2 and 0 in part; then row 1 leaves, and a column with it."""
    built, new = model(architecture, num_key_value_heads=2).double(), ids(seed=1)
    columns, mask = torch.stack([torch.arange(start, start + 4) for start in (0, 2, 4)]), torch.ones(3, 10).bool()
    mask[0, 9] = mask[2, 9] = False
    some, order = torch.tensor([1]), torch.tensor([2, 0])
    expected = KeyValueCache()
    built.hidden_states(ids(), mask, cache=expected)
    whole = built.hidden_states(ids(), mask, cache=(cache := KeyValueCache()))
    part = built.hidden_states(picked(new, columns), mask, cache=expected, cache_columns=columns)

    ours = built.hidden_states(ids()[some], mask[some], cache=cache, cache_rows=some)
    torch.testing.assert_close(ours, whole[some], rtol=0, atol=1e-12)
    given = dict(cache=cache, cache_rows=order, cache_columns=columns[order])
    ours = built.hidden_states(picked(new, columns)[order], mask[order], **given)
    torch.testing.assert_close(ours, part[order], rtol=0, atol=1e-12)

    other = picked(ids(seed=2), columns)
    expected = built.hidden_states(other, mask, cache=expected, cache_columns=columns)
    cache.keep(order, 9)
    ours = built.hidden_states(other[order], mask[order, :9], cache=cache, cache_columns=columns[order])
    assert cache.length == 9
    torch.testing.assert_close(ours, expected[order], rtol=0, atol=1e-12)


def test_a_row_that_may_attend_to_no_state_is_as_one_without_a_condition():
    built = model(cross_attention_dim=20)
    states, mask = torch.randn(3, 5, 20, requires_grad=True), torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    seen = built.hidden_states(ids(), encoder_hidden_states=states, encoder_attention_mask=mask)
    torch.testing.assert_close(seen[1], built.hidden_states(ids())[1], **TOLERANCE)
    torch.testing.assert_close(seen[0], built.hidden_states(ids(), encoder_hidden_states=states)[0], **TOLERANCE)
    seen.square().sum().backward()
    assert (states.grad[1] == 0).all() and states.grad[[0, 2]].abs().amin((1, 2)).min() > 0
    assert all(p.grad.isfinite().all() for p in built.model.parameters())


@pytest.fixture
def stand_in(monkeypatch):
    """A module flash_attn with its functions' documented signatures, in plain torch; the names of those called."""
    called = []

    def attention(q, k, v, scale, causal):  # [L, H, d], [K, H_kv, d]
        assert not causal and q.dtype in (torch.float16, torch.bfloat16)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).float() for t in (k, v))
        scores = torch.einsum("lhd,khd->hlk", q.float(), k) * (scale or q.shape[-1] ** -0.5)
        return torch.einsum("hlk,khd->lhd", scores.softmax(-1), v).to(q.dtype)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        called.append("dense")
        return torch.stack([attention(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        called.append("ragged")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
        assert int(cu_seqlens_q[-1]) == len(q) and int(cu_seqlens_k[-1]) == len(k) == len(v)
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q and int(cu_seqlens_k.diff().max()) <= max_seqlen_k
        q, k, v = (
            t.tensor_split(ends[1:-1].tolist()) for t, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
        )
        return torch.cat([attention(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "_DEVICES", ("cpu",))
    return called


def test_flash_attn_is_used_where_it_fits(stand_in):
    """float16 without a mask, and with one over keys; a mask of queries, and float32, go through SDPA."""
    built = model("llada", num_key_value_heads=2, cross_attention_dim=20)
    assert built.config._attn_implementation == "flash_attention_2"
    reference = model("llada", num_key_value_heads=2, cross_attention_dim=20)
    reference.set_attn_implementation("sdpa")
    padding = torch.ones(3, 10, dtype=torch.bool)
    padding[1, 6:] = padding[2, :3] = False
    context = dict(encoder_hidden_states=torch.randn(3, 5, 20), encoder_attention_mask=padding[:, -5:])
    cases = [
        (torch.float16, None, {}, ["dense"] * 2),
        (torch.float16, padding, {}, ["ragged"] * 2),
        (torch.float16, padding, dict(output_columns=COLUMNS), ["ragged"] * 2),
        (torch.float16, None, context, ["dense", "ragged"] * 2),
        (torch.float16, torch.ones(3, 10, 10, dtype=torch.bool).tril(), {}, []),
        (torch.float32, None, {}, []),
    ]
    for dtype, mask, inputs, expected in cases:
        stand_in.clear()
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        with torch.no_grad():
            ours = built.to(dtype).hidden_states(ids(), mask, **inputs)
            assert stand_in == expected
            plain = reference.to(dtype).hidden_states(ids(), mask, **inputs)
        assert len(stand_in) == len(expected)  # SDPA was asked for, and used
        torch.testing.assert_close(ours, plain, rtol=0, atol=2e-2)  # seen: 6e-3 (float16, states of size 1)


def test_attention_that_cannot_be_had_is_named(tmp_path):
    model().save_pretrained(tmp_path)
    wanted = dict(attn_implementation="flash_attention_2")
    for call in (
        lambda: MaskedDiffusionLM.from_pretrained(tmp_path, **wanted),
        lambda: model().set_attn_implementation(wanted["attn_implementation"]),
    ):
        with pytest.raises(ImportError, match="flash-attn is not installed; pass 'sdpa'") as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="attn_implementation: got 'eager'; expected 'sdpa', 'flash_attention_2'"):
        MaskedDiffusionLM.from_pretrained(tmp_path, attn_implementation="eager")
    fields = dict(vocab_size=61, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ImportError, match="flash-attn is not installed"):
        MaskedDiffusionLM.from_gpt2(tmp_path / "gpt2", mask_token_id=3, **wanted)
    assert MaskedDiffusionLM.from_gpt2(tmp_path / "gpt2", mask_token_id=3, attn_implementation="sdpa").config
    assert MaskedDiffusionLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (2, 9), (70, 70), (150, 150)])
def test_attention_without_flash_attn_is_torch_s(queries, keys):
    """By plain products or fused, as the lengths have it; a query that may attend to nothing gives 0."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8)
    mask = torch.rand(2, 1, 1, keys) < 0.7
    mask[1] = False
    for seen in (None, mask, mask.expand(-1, -1, queries, -1)):
        expected = F.scaled_dot_product_attention(query, key, key, attn_mask=seen, enable_gqa=True)
        torch.testing.assert_close(
            transformer.attend(query, key, key, seen), expected, rtol=0, atol=2e-6
        )  # seen 9.5e-7
    double = query.double(), key.double(), key.double()
    expected = F.scaled_dot_product_attention(*double, enable_gqa=True)
    assert torch.equal(transformer.attend(*double), expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            dict(output_columns=torch.zeros(2, 3, dtype=torch.int64)),
            r"output_columns: got shape \[2, 3\]; expected \[3",
        ),
        (dict(cache_rows=torch.arange(3)), "there is no filled cache"),
    ],
)
def test_columns_and_rows_that_do_not_fit(inputs, message):
    with pytest.raises(ValueError, match=message):
        model().hidden_states(ids(), **inputs)
