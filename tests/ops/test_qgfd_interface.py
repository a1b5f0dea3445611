"""QGFD attention as torch sees it (compile, export, opcheck, autocast), dropout, the dense path, bad input."""

import importlib
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import BackendError, backends, use_backend
from fastdiff.ops import _native, _qgfd_backends, qgfd_attention, qgfd_attention_dense, qgfd_values
from ops.harness import A_DEVICE, BF16, F32, NATIVE, ROWS, check_operators, check_schemas

rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)
public = importlib.import_module("fastdiff.ops.qgfd_attention")  # the module; the name is the function's


def randn(*shape: int, dtype=F32, device="cpu", seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def qkv(*shape: int, **settings) -> list[Tensor]:
    return [randn(*shape, seed=seed, **settings).requires_grad_() for seed in range(3)]


# ------------------------------------------------------------------------------------------------- as torch sees it


@native
@pytest.mark.parametrize("masks", ["varlen", "key-mask"])
def test_other_options_compile_without_a_graph_break(row, masks):
    torch._dynamo.reset()
    q, k, v = qkv(1, 2, 20, 8, device=row.device)
    if masks == "varlen":
        given = {"cu_seqlens": torch.tensor([0, 7, 20], device=row.device), "is_causal": True}
    else:
        given = {"key_mask": randn(1, 20, device=row.device) > -1, "prefix_length": 3}

    def run(q, k, v):
        options = {"steps": 2, "sink_isolation": True, **given}
        w = qgfd_values(k, v, temperature=0.5, **options)
        out = qgfd_attention(q, k, w, transition="key", recurrence="restart", **options)
        return out + qgfd_attention(q, k, v, temperature=2.0, **given)

    with row.active():
        eager, fast = run(q, k, v), torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
        assert torch.equal(eager, fast)
        for a, b in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (eager, fast)), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():

            class Module(torch.nn.Module):
                def forward(self, q, k, v):
                    return run(q, k, v)

            program = torch.export.export(Module(), (q, k, v))
            assert torch.equal(program.module()(q, k, v), eager)


def operator_calls(device: str) -> dict[str, tuple]:
    """Arguments of the operators with every mask, heads that lie apart, a mixed last hop, and grouped heads."""
    query = randn(2, 5, 4, 8, device=device).transpose(1, 2)
    key, value = (randn(2, 5, 2, 8, device=device, seed=s).transpose(1, 2) for s in (1, 2))
    key_mask = torch.tensor([[True] * 5, [False, True, True, True, False]], device=device)
    begin = torch.tensor([[0, 0, 1, 2, 3]], dtype=torch.int32, device=device)
    end = torch.tensor([[1, 2, 3, 4, 5], [5] * 5], dtype=torch.int32, device=device)
    matrix = (key_mask, begin, end, 0.3, 3, 2, 3, 0.6)
    saved = (randn(2, 5, 4, 8, device=device), randn(2, 4, 5, device=device), randn(3, 2, 4, 5, 8, device=device))
    return {
        "qgfd_forward": (query, key, value, *matrix),
        "qgfd_forward_saved": (query, key, value, *matrix),
        "qgfd_backward": (randn(2, 4, 5, 8, device=device, seed=4), query, key, value, *saved, *matrix),
    }


@pytest.mark.parametrize("row", A_DEVICE, ids=lambda r: r.name)
def test_opcheck(row):
    calls = operator_calls(row.device)
    check_operators(_qgfd_backends.SCHEMAS, calls)


def test_schemas_in_python_and_cpp_are_the_same():
    check_schemas(_qgfd_backends.SCHEMAS)


MANGLED = {
    "three-dimensions": ("query", lambda t: t[0]),
    "last-dimension-apart": ("query", lambda t: t.mT.contiguous().mT),
    "another-dtype": ("key", lambda t: t.bfloat16()),
    "another-head-size": ("key", lambda t: t[..., :4]),
    "another-batch": ("key", lambda t: t[:1]),
    "heads-that-do-not-divide": ("key", lambda t: torch.cat([t, t[:, :1]], 1)),
    "another-length-of-value": ("value", lambda t: t[:, :, :3]),
    "key_mask-short": ("key_mask", lambda t: t[:, :3].contiguous()),
    "key_mask-apart": ("key_mask", lambda t: t.t().contiguous().t()),
    "row_begin-short": ("row_begin", lambda t: t[:, :3].contiguous()),
    "row_end-int64": ("row_end", lambda t: t.long()),
    "scale-zero": ("scale", lambda x: 0.0),
    "no-hops": ("hops", lambda x: 0),
    "mixed-beyond-the-last": ("last_mixed", lambda x: 4),
    "more-hops-than-a-rectangle-has": ("query", lambda t: t[:, :, :3]),
}


@pytest.mark.parametrize("what", MANGLED)
def test_a_direct_call_does_not_read_out_of_bounds(what):
    if _native.cpu_missing:
        pytest.skip(f"NOT TESTED: {_native.cpu_missing}")
    names = "query key value key_mask row_begin row_end scale hops first_mixed last_mixed alpha".split()
    arguments = dict(zip(names, operator_calls("cpu")["qgfd_forward"], strict=True))
    name, mangle = MANGLED[what]
    arguments[name] = mangle(arguments[name])
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.fastdiff.qgfd_forward(**arguments)


@native
def test_float64_torch_func_and_forward_mode_take_the_reference(row):
    q, k, v = (t.detach() for t in qkv(1, 2, 6, 4, device=row.device))
    tangent = randn(1, 2, 6, 4, seed=5, device=row.device)
    gradient = torch.func.grad(lambda t: qgfd_attention(t, k, v).square().sum())(q)
    _, derivative = torch.func.jvp(lambda t: qgfd_attention(t, k, v).square().sum(), (q,), (tangent,))
    torch.testing.assert_close(derivative, (gradient * tangent).sum(), rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(lambda t: qgfd_attention(t, k, v))(torch.stack([q, tangent]))
    torch.testing.assert_close(each[1], qgfd_attention(tangent, k, v), rtol=1e-5, atol=1e-6)
    with use_backend(row.backend), pytest.raises(BackendError, match="torch.func"):
        torch.func.grad(lambda t: qgfd_attention(t, k, v).sum())(q)
    with use_backend(row.backend), pytest.raises(BackendError, match="not float64"):
        qgfd_attention(q.double(), k.double(), v.double())


@rows
def test_autocast_is_that_of_torchs_attention(row):
    q, k, v = qkv(2, 2, 9, 16, device=row.device)
    for options in ({}, {"steps": 0}, {"transition": "key"}):
        with row.active(), torch.autocast(row.device, BF16):
            out = qgfd_attention(q, k, v.bfloat16(), **options)
        with row.active():
            expected = qgfd_attention(*(t.bfloat16() for t in (q, k, v)), **options)
        assert out.dtype == BF16 and torch.equal(out, expected)
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        assert all(g.dtype == F32 for g in grads)
    with row.active(), torch.autocast(row.device, BF16):
        assert qgfd_values(k, v).dtype == BF16


# ---------------------------------------------------------------------------------------------------------- dropout


def mean_and_error(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean, and by how much it may be off: five standard deviations of it."""
    stack = torch.stack(samples).double()
    return stack.mean(0), 5 * stack.std(0) / len(samples) ** 0.5 + 1e-6


@pytest.mark.parametrize("recurrence", ["power", "restart"])
def test_hop_dropout_keeps_the_mean(recurrence):
    q, k, v = (t.detach() for t in qkv(1, 4, 6, 4))
    key_mask = torch.tensor([[True, True, False, True, True, True]])
    options = {"steps": 2, "alpha": 0.7, "recurrence": recurrence, "key_mask": key_mask, "enable_gqa": True}
    with use_backend("reference"):
        exact = qgfd_attention(q, k[:, :2], v[:, :2], **options)
        none = qgfd_attention(q, k[:, :2], v[:, :2], hop_dropout_p=0.0, **options)
        torch.manual_seed(0)
        samples = [qgfd_attention(q, k[:, :2], v[:, :2], hop_dropout_p=0.3, **options) for _ in range(400)]
    assert torch.equal(none, exact)
    mean, error = mean_and_error(samples)
    assert not torch.equal(samples[0], samples[1]) and ((mean - exact).abs() <= error).all()


def test_dropout_of_the_mixed_matrix_drops_its_weights_and_keeps_the_mean():
    q, k, _ = (t.detach() for t in qkv(1, 2, 6, 6))
    eye = torch.eye(6).expand(1, 2, 6, 6)  # the output is W itself
    whole = qgfd_attention_dense(q, k, eye, steps=2)
    torch.manual_seed(0)
    samples = [qgfd_attention_dense(q, k, eye, steps=2, dropout_p=0.25) for _ in range(400)]
    for sample in samples[:3]:
        kept = sample != 0
        assert not kept.all() and kept.any()
        torch.testing.assert_close(sample[kept], (whole / 0.75)[kept])
    mean, error = mean_and_error(samples)
    assert ((mean - whole).abs() <= error).all()
    q.requires_grad_()
    torch.autograd.grad(qgfd_attention_dense(q, k, eye, dropout_p=0.25).sum(), q)


# ---------------------------------------------------------------------------------------------------- the dense path


def test_masks_that_are_not_closed_warn_once_and_do_leak(monkeypatch):
    monkeypatch.setattr(public, "_warned", False)
    q, k, v = (t.detach() for t in qkv(1, 1, 9, 4))
    i = torch.arange(9)
    window = (i[:, None] - i).abs() <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for closed in ({"is_causal": True}, {"key_mask": torch.ones(1, 9) > 0}, {"prefix_length": 2}):
            qgfd_attention_dense(q, k, v, **closed)
        qgfd_attention_dense(q, k, v, attn_mask=window, steps=0)
    with pytest.warns(UserWarning, match="hops reach keys that attn_mask hides"):
        out = qgfd_attention_dense(q, k, v, attn_mask=window, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = qgfd_attention_dense(q, k, v + (i == 3)[:, None], attn_mask=window, steps=2)
    reached = ((out - other).abs() > 1e-6).any(-1)[0, 0]
    assert reached.tolist() == [abs(j - 3) <= 3 for j in range(9)], "three hops of a window of one"


def test_the_dense_path_equals_torchs_attention_for_one_step_of_any_mask(monkeypatch):
    monkeypatch.setattr(public, "_warned", True)
    q, k, v = (t.detach() for t in qkv(2, 3, 9, 4))
    mask = (randn(2, 1, 9, 9) > -0.5) | torch.eye(9, dtype=torch.bool)
    once = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    twice = 0.5 * F.scaled_dot_product_attention(q, k, once, attn_mask=mask) + 0.5 * once
    out = qgfd_attention_dense(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, twice, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- backends


def test_a_head_size_that_a_backend_cannot_do_goes_to_another_or_is_an_error_by_name(monkeypatch):
    refuses = _qgfd_backends.refuses_head_size
    entry = backends.Backend(None, _native.refuses_nothing)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._registry["qgfd_attention"], name, entry)
    monkeypatch.setitem(backends._AUTO_ORDER, "cpu", ("cuda", "triton", "reference"))

    def selected(dim: int) -> str:
        return backends.select("qgfd_attention", "cpu", (F32,), lambda backend: refuses(backend, dim))

    with use_backend("auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reference is slow
            assert [selected(dim) for dim in (64, 256, 33, 257, 264)] == ["cuda", "cuda", "triton", *["reference"] * 2]
    for name, dim, reason in (("cuda", 33, "multiples of 8 up to 256, not 33"), ("triton", 300, "up to 256, not 300")):
        with use_backend(name), pytest.raises(BackendError, match=f"qgfd_attention: backend '{name}'.*{reason}"):
            qgfd_attention(*qkv(1, 1, 3, dim))


def test_numbers_of_numpy_are_numbers():
    q, k, v = qkv(1, 2, 6, 8)
    out = qgfd_attention(q, k, v, steps=np.int64(2), alpha=np.float32(0.25), temperature=np.float64(2.0))
    assert torch.equal(out, qgfd_attention(q, k, v, steps=2, alpha=0.25, temperature=2.0))


def test_plain_attention_compiles_for_any_length():
    compiled = torch.compile(
        lambda q, k, v: qgfd_attention(q, k, v, steps=0), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (5, 9, 6):
        q, k, v = qkv(1, 2, length, 8)
        torch.testing.assert_close(compiled(q, k, v), qgfd_attention(q, k, v, steps=0))


@native
def test_rows_beyond_cu_seqlens_that_nobody_could_check_see_nothing(row):
    q, k, v = qkv(1, 2, 9, 8)
    compiled = torch.compile(lambda ends: qgfd_attention(q, k, v, cu_seqlens=ends), fullgraph=True, backend="aot_eager")
    with row.active():
        out = compiled(ids(0, 4, 6))
        expected = qgfd_attention(q[:, :, :6], k[:, :, :6], v[:, :, :6], cu_seqlens=ids(0, 4, 6))
    torch.testing.assert_close(out[:, :, :6], expected)
    assert not out[:, :, 6:].any()


# -------------------------------------------------------------------------------------------------------- bad input

Q = torch.zeros(2, 4, 5, 8)
SHORT = Q[:, :, :3]
MASK = torch.ones(2, 5, dtype=torch.bool)
ONE = Q[:1]
INF, NAN = float("inf"), float("nan")


def call(query=Q, key=Q, value=None, **options):
    return qgfd_attention(query, key, key if value is None else value, **options)


def dense(query=Q, key=Q, **options):
    return qgfd_attention_dense(query, key, key, **options)


def ids(*numbers: int, dtype=torch.int64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


BAD = {
    "query-list": (TypeError, "query: got a list; expected a torch.Tensor", lambda: call([1.0])),
    "query-dtype": (ValueError, "query: got torch.int64; expected float32", lambda: call(Q.long())),
    "query-3d": (ValueError, r"query: got shape \[4, 5, 8\]", lambda: call(Q[0])),
    "query-5d": (ValueError, r"query: got shape \[1, 2, .*expected \[B, H, L, d\]", lambda: call(Q[None])),
    "key-no-dim": (ValueError, r"key: got shape .*expected \[B, H, L, d\] with d > 0", lambda: call(key=Q[..., :0])),
    "key-device": (ValueError, "key: got .*meta", lambda: call(key=Q.to("meta"), value=Q)),
    "value-dtype": (ValueError, "value: got torch.float16, with torch.float32 of query", lambda: call(value=Q.half())),
    "key-dim": (ValueError, r"key: got shape \[2, 4, 5, 4\].*\[2, H_kv, L_k, 8\]", lambda: call(key=Q[..., :4])),
    "key-batch": (ValueError, r"key: got shape \[1, .*expected \[2, H_kv", lambda: call(key=ONE)),
    "value-shape": (ValueError, r"and value \[2, 4, 3, 8\]; expected", lambda: call(value=SHORT)),
    "heads-differ": (
        ValueError,
        "key: got 2 heads, with 4 of query; expected as many, or enable_gqa",
        lambda: call(key=Q[:, :2]),
    ),
    "heads-do-not-divide": (
        ValueError,
        "key: got 3 heads, with 4 of query; expected a divisor",
        lambda: call(key=Q[:, :3], enable_gqa=True),
    ),
    "lengths-differ": (ValueError, "query: got 5 rows, with 3 of key.*transition='key'", lambda: call(key=SHORT)),
    "steps-below": (ValueError, "steps: got -1; expected an int from 0", lambda: call(steps=-1)),
    "steps-float": (ValueError, "steps: got 1.5; expected an int", lambda: call(steps=1.5)),
    "steps-bool": (ValueError, "steps: got True; expected an int", lambda: call(steps=True)),
    "alpha-above": (ValueError, r"alpha: got 1.5; expected a number in \[0, 1\]", lambda: call(alpha=1.5)),
    "alpha-below": (ValueError, "alpha: got -0.1", lambda: call(alpha=-0.1)),
    "alpha-nan": (ValueError, "alpha: got nan", lambda: call(alpha=NAN)),
    "alpha-type": (ValueError, "alpha: got 'a'", lambda: call(alpha="a")),
    "transition": (
        ValueError,
        "transition: got 'query'; expected 'attention' or 'key'",
        lambda: call(transition="query"),
    ),
    "recurrence": (ValueError, "recurrence: got 1; expected 'power' or 'restart'", lambda: call(recurrence=1)),
    "temperature-zero": (ValueError, "temperature: got 0; expected a number > 0", lambda: call(temperature=0)),
    "temperature-tiny": (ValueError, "temperature: got 1e-45; expected", lambda: call(temperature=1e-45)),
    "alpha-tensor": (ValueError, "alpha: got a Tensor; .*without gradient", lambda: call(alpha=torch.tensor(0.5))),
    "causal-tensor": (TypeError, "is_causal: got a Tensor; expected True", lambda: call(is_causal=MASK)),
    "causal-text": (TypeError, "is_causal: got 'no'; expected True or False", lambda: call(is_causal="no")),
    "sink-text": (TypeError, "sink_isolation: got 'no'", lambda: call(sink_isolation="no", transition="key")),
    "gqa-number": (TypeError, "enable_gqa: got 1; expected True", lambda: call(enable_gqa=1)),
    "prefix-negative": (ValueError, "prefix_length: got -3", lambda: call(prefix_length=ids(-3, 2))),
    "key_mask-4d": (ValueError, r"key_mask: got .*mask\[:, 0, 0\]", lambda: call(key_mask=MASK[:, None, None])),
    "temperature-inf": (ValueError, "temperature: got inf", lambda: call(temperature=INF)),
    "temperature-none": (ValueError, "temperature: got None", lambda: call(temperature=None)),
    "scale-below": (ValueError, "scale: got -1.0; expected a number > 0", lambda: call(scale=-1.0)),
    "scale-nan": (ValueError, "scale: got nan", lambda: call(scale=NAN)),
    "sink": (ValueError, "sink_isolation: got True .*transition='key'", lambda: call(sink_isolation=True)),
    "hop_dropout-one": (
        ValueError,
        r"hop_dropout_p: got 1; expected a number in \[0, 1\)",
        lambda: call(hop_dropout_p=1),
    ),
    "hop_dropout-key": (
        ValueError,
        "hop_dropout_p: got 0.1; expected 0 with transition 'key'",
        lambda: call(hop_dropout_p=0.1, transition="key"),
    ),
    "hop_dropout-temperature": (
        ValueError,
        "hop_dropout_p: got 0.1; expected 0",
        lambda: call(hop_dropout_p=0.1, temperature=2.0),
    ),
    "hop_dropout-prefix": (ValueError, "hop_dropout_p: got 0.1", lambda: call(hop_dropout_p=0.1, prefix_length=2)),
    "hop_dropout-plain": (  # nothing is diffused, and the mask would go unseen
        ValueError,
        "hop_dropout_p: got 0.1; expected 0",
        lambda: call(ONE, ONE, hop_dropout_p=0.1, steps=0, cu_seqlens=ids(0, 2, 5)),
    ),
    "dropout-one": (ValueError, r"dropout_p: got 1.0; expected a number in \[0, 1\)", lambda: dense(dropout_p=1.0)),
    "key_mask-type": (TypeError, "key_mask: got a list; expected a bool", lambda: call(key_mask=[True])),
    "key_mask-dtype": (TypeError, "key_mask: got torch.float32; expected a bool", lambda: call(key_mask=MASK.float())),
    "key_mask-shape": (ValueError, r"key_mask: got shape \[5\]; expected \[2, 5\]", lambda: call(key_mask=MASK[0])),
    "key_mask-device": (ValueError, "key_mask: got one on meta, query on cpu", lambda: call(key_mask=MASK.to("meta"))),
    "prefix-below": (ValueError, "prefix_length: got -1; expected an int >= 0", lambda: call(prefix_length=-1)),
    "prefix-float": (ValueError, "prefix_length: got 2.0; expected an int", lambda: call(prefix_length=2.0)),
    "prefix-dtype": (ValueError, "prefix_length: got torch.float32", lambda: call(prefix_length=ids(1, 2).float())),
    "prefix-shape": (ValueError, r"prefix_length: got .*\[3\].*\[2\]", lambda: call(prefix_length=ids(1, 2, 3))),
    "cu_seqlens-type": (
        TypeError,
        "cu_seqlens: got a list; expected an int32 or int64",
        lambda: call(cu_seqlens=[0, 5]),
    ),
    "cu_seqlens-dtype": (TypeError, "cu_seqlens: got torch.float32", lambda: call(cu_seqlens=ids(0, 5).float())),
    "cu_seqlens-short": (ValueError, r"cu_seqlens: got shape \[1\]", lambda: call(ONE, ONE, cu_seqlens=ids(0))),
    "cu_seqlens-batch": (ValueError, "cu_seqlens: got it with B = 2", lambda: call(cu_seqlens=ids(0, 5))),
    "cu_seqlens-end": (
        ValueError,
        r"\[0, 4\]; expected ascending .* 0 to 5",
        lambda: call(ONE, ONE, cu_seqlens=ids(0, 4)),
    ),
    "cu_seqlens-start": (ValueError, r"cu_seqlens: got \[1, 5\]", lambda: call(ONE, ONE, cu_seqlens=ids(1, 5))),
    "cu_seqlens-order": (ValueError, r"\[0, 4, 2, 5\]", lambda: call(ONE, ONE, cu_seqlens=ids(0, 4, 2, 5))),
    "cu_seqlens-lengths": (
        ValueError,
        "cu_seqlens: got it with B = 1, L_q = 5, L_k = 3",
        lambda: call(ONE, SHORT[:1], transition="key", cu_seqlens=ids(0, 3)),
    ),
    "attn_mask-dtype": (TypeError, "attn_mask: got torch.float32; expected a bool", lambda: dense(attn_mask=Q[0, 0])),
    "attn_mask-shape": (
        ValueError,
        r"attn_mask: got shape \[4, 5\]; expected what broadcasts to \[2, 4, 5, 5\]",
        lambda: dense(attn_mask=Q[0, :, :, 0] > 0),
    ),
    "attn_mask-lengths": (
        ValueError,
        "attn_mask: got L_q = 5, L_k = 3",
        lambda: dense(key=SHORT, attn_mask=Q[0, 0, :, :3] > 0, transition="key"),
    ),
    "values-lengths": (ValueError, r"and value \[2, 4, 3, 8\]", lambda: qgfd_values(Q, SHORT)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_was_given_and_expected_in_one_line(name):
    error, match, bad = BAD[name]
    with pytest.raises(error, match=match) as caught:
        bad()
    assert "\n" not in str(caught.value)
    assert caught.traceback[-1].path.name != "test_qgfd_interface.py"
