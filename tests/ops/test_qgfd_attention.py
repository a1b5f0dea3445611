"""What QGFD attention means: its definition, masks, recurrences, gradients, on every backend."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import BackendError, use_backend
from fastdiff.ops import qgfd_attention, qgfd_attention_dense, qgfd_values
from ops.harness import BF16, F32, NATIVE, ROWS

rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)
F64 = torch.float64
# fp32 results and gradients against fp32 or fp64 ones of another order of sums, elements near 1; largest seen: 9.6e-7
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def make(batch=2, heads=2, length=11, dim=8, kv_heads=None, keys=None, dtype=F32, device="cpu", seed=0) -> list[Tensor]:
    """query, key, value as leaves."""
    generator = torch.Generator().manual_seed(seed)
    other = (batch, kv_heads or heads, length if keys is None else keys, dim)
    shapes = ((batch, heads, length, dim), other, other)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def by_definition(
    query, key, value, steps, alpha, mask=None, transition="attention", recurrence="power", temperature=1.0
) -> Tensor:
    """W·V with torch.matrix_power; `mask` [L, L] leaves every row a key. Restart in closed form."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if transition == "key":
        p = key @ key.mT / (key.norm(dim=-1)[..., None] * key.norm(dim=-1)[..., None, :]) / temperature
    else:
        p = scores / temperature
    if mask is not None:
        scores, p = (t.masked_fill(~mask, -torch.inf) for t in (scores, p))
    a, p = scores.softmax(-1), p.softmax(-1)
    powers = [torch.linalg.matrix_power(p, j) for j in range(steps + 1)]
    if recurrence == "power":
        return (alpha * a @ powers[steps] + (1 - alpha) * a) @ value
    walk = alpha**steps * powers[steps] + (1 - alpha) * sum(alpha**j * powers[j] for j in range(steps))
    return a @ walk @ value


@rows
@pytest.mark.parametrize("recurrence", ["power", "restart"])
@pytest.mark.parametrize(("transition", "temperature"), [("attention", 1.0), ("attention", 4.0), ("key", 0.25)])
def test_equals_the_definition_written_out(row, transition, temperature, recurrence):
    q, k, v = make(device=row.device)
    options = {"transition": transition, "temperature": temperature, "recurrence": recurrence}
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    for steps, alpha, mask in ((1, 0.5, None), (2, 0.9, causal), (5, 1.0, None), (3, 0.02, causal)):
        with row.active():
            out = qgfd_attention(q, k, v, steps=steps, alpha=alpha, is_causal=mask is not None, **options)
        exact = by_definition(*(t.double().cpu() for t in (q, k, v)), steps, alpha, mask, **options)
        torch.testing.assert_close(out.double().cpu(), exact, **CLOSE)
        dense = qgfd_attention_dense(q, k, v, steps=steps, alpha=alpha, is_causal=mask is not None, **options)
        torch.testing.assert_close(dense.double().cpu(), exact, **CLOSE)


@rows
def test_one_step_is_two_calls_of_torchs_attention(row):
    q, k, v = make(length=33, dim=16, device=row.device)
    with row.active():
        out = qgfd_attention(q, k, v, alpha=0.3)
    once = F.scaled_dot_product_attention(q, k, v)
    twice = 0.3 * F.scaled_dot_product_attention(q, k, once) + 0.7 * once
    torch.testing.assert_close(out, twice, **CLOSE)
    for a, b in zip(grads_of(out, (q, k, v)), grads_of(twice, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def grads_of(out: Tensor, leaves, seed: int = 7) -> tuple[Tensor, ...]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.autograd.grad(out, leaves, cotangent.to(out.device, out.dtype))


@rows
@pytest.mark.parametrize("transition", ["attention", "key"])
@pytest.mark.parametrize("nothing", [{"steps": 0}, {"alpha": 0.0}, {"alpha": 0}])
def test_nothing_diffused_is_plain_attention(row, nothing, transition):
    q, k, v = make(keys=14, kv_heads=1, device=row.device)
    key_mask = torch.rand(2, 14, generator=torch.Generator().manual_seed(1)).to(row.device) < 0.6
    lower = torch.ones(11, 14, dtype=torch.bool, device=row.device).tril(3)
    options = {"transition": transition, "enable_gqa": True, **nothing}
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    with row.active():
        for masks, mask in (
            ({}, None),
            ({"is_causal": True}, lower),
            ({"key_mask": key_mask}, key_mask[:, None, None]),
            ({"key_mask": key_mask, "is_causal": True}, key_mask[:, None, None] & lower),
            ({"prefix_length": 5}, lower | (torch.arange(14, device=row.device) < 5)),
        ):
            expected = F.scaled_dot_product_attention(q, *wide, attn_mask=mask)
            torch.testing.assert_close(qgfd_attention(q, k, v, **masks, **options), expected, **CLOSE)
        assert torch.equal(qgfd_values(k, v, **nothing), v)


@rows
@pytest.mark.parametrize("transition", ["attention", "key"])
@pytest.mark.parametrize("steps", [0, 2])
def test_rows_that_attend_to_nothing_give_zeros_and_get_zero_gradients(row, steps, transition):
    leaves = make(3, length=9, device=row.device)
    key_mask = torch.ones(3, 9, dtype=torch.bool, device=row.device)
    key_mask[1] = False
    key_mask[2, :4] = False  # with a causal mask the first four queries see nothing
    for causal in (False, True):
        with row.active():
            out = qgfd_attention(*leaves, steps=steps, transition=transition, key_mask=key_mask, is_causal=causal)
        grads = grads_of(out, leaves)
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
        assert not out[1].any() and out[0].all() and not any(g[1].any() for g in grads)
        assert out[2, :, 4:].all() and out[2, :, :4].any().item() is not causal
        assert not any(g[2, :, :4].any() for g in grads[1:]) and grads[0][2, :, :4].any().item() is not causal


@rows
def test_no_keys_give_zeros(row):
    q, k, v = make(keys=0, device=row.device)
    with row.active():
        for options in ({"steps": 0}, {"transition": "key"}, {"steps": 0, "is_causal": True}):
            out = qgfd_attention(q, k, v, **options)
            assert out.shape == q.shape and not out.any()
            assert not torch.autograd.grad(out.sum(), q, allow_unused=True, materialize_grads=True)[0].any()


@rows
@pytest.mark.parametrize("transition", ["attention", "key"])
@pytest.mark.parametrize("masks", [{"is_causal": True}, {"prefix_length": 4}], ids=["causal", "prefix"])
def test_a_later_key_changes_nothing_before_it(row, masks, transition):
    q, k, v = make(length=21, device=row.device)
    options = {"steps": 3, "transition": transition, **masks}
    with row.active():
        out = qgfd_attention(q, k, v, **options)
        later = torch.arange(21, device=row.device)[:, None] >= 13
        changed = [torch.where(later, t.detach() * 2 - 3, t.detach()) for t in (k, v)]
        other = qgfd_attention(q, *changed, **options)
    assert torch.equal(out[:, :, :13], other[:, :, :13]) and not torch.equal(out[:, :, 13:], other[:, :, 13:])
    for grad in torch.autograd.grad(out[:, :, :13].square().sum(), (k, v)):
        assert not grad[:, :, 13:].any() and grad[:, :, :13].any()


@rows
@pytest.mark.parametrize("transition", ["attention", "key"])
@pytest.mark.parametrize("masks", [{}, {"is_causal": True}, {"prefix_length": [2, 0, 9, 3]}], ids=str)
def test_sequences_one_after_the_other_are_the_sequences_one_by_one(row, masks, transition):
    ends = [0, 7, 8, 8, 29]
    q, k, v = make(1, length=29, device=row.device)
    options = {"steps": 2, "transition": transition, "sink_isolation": transition == "key"}
    prefixes = masks.get("prefix_length")
    packed = {name: torch.tensor(v, device=row.device) if v is prefixes else v for name, v in masks.items()}
    with row.active():
        out = qgfd_attention(q, k, v, cu_seqlens=torch.tensor(ends, device=row.device), **packed, **options)
        parts = []
        for s, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
            own = masks if prefixes is None else {"prefix_length": prefixes[s]}
            parts.append(qgfd_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], **own, **options))
    apart = torch.cat(parts, 2)
    torch.testing.assert_close(out, apart, **CLOSE)
    for a, b in zip(grads_of(out, (q, k, v)), grads_of(apart, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@rows
def test_prefixes_by_the_dense_mask(row):
    q, k, v = make(3, length=12, device=row.device)
    i = torch.arange(12)
    prefixes = [0, 5, 99]
    masks = torch.stack([(i <= i[:, None]) | (i < n) for n in prefixes])
    with row.active():
        out = qgfd_attention(q, k, v, steps=2, prefix_length=torch.tensor(prefixes, device=row.device))
        number = qgfd_attention(q, k, v, steps=2, prefix_length=5)
    exact = [by_definition(*(t[b].double().cpu() for t in (q, k, v)), 2, 0.5, masks[b]) for b in range(3)]
    torch.testing.assert_close(out.double().cpu(), torch.stack(exact), **CLOSE)
    assert torch.equal(number[1], out[1])


@rows
@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"transition": "key"}], ids=str)
def test_grouped_heads_are_repeated_heads(row, options):
    q, k, v = make(heads=6, kv_heads=2, device=row.device)
    with row.active():
        out = qgfd_attention(q, k, v, steps=2, enable_gqa=True, **options)
        wide = [t.repeat_interleave(3, 1) for t in (k, v)]
        repeated = qgfd_attention(q, *wide, steps=2, **options)
    torch.testing.assert_close(out, repeated, **CLOSE)
    # the gradient of a shared head is the sum of those of its group
    for a, b in zip(grads_of(out, (q, k, v)), grads_of(repeated, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@rows
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("recurrence", ["power", "restart"])
def test_diffused_values_make_it_plain_attention(row, recurrence, sink):
    q, k, v = make(length=5, keys=13, device=row.device)
    key_mask = torch.ones(2, 13, dtype=torch.bool, device=row.device)
    key_mask[1, :3] = False
    options = {"steps": 2, "temperature": 0.5, "sink_isolation": sink, "recurrence": recurrence, "key_mask": key_mask}
    with row.active():
        out = qgfd_attention(q, k, v, transition="key", **options)
        w = qgfd_values(k, v, **options)
    expected = F.scaled_dot_product_attention(q, k, w, attn_mask=key_mask[:, None, None])
    torch.testing.assert_close(out, expected, **CLOSE)
    first = torch.tensor([0, 3], device=row.device)  # the sinks: what they hold stays, up to rounding
    at = [w[b, :, first[b]] - v[b, :, first[b]] for b in range(2)]
    assert (max(t.abs().max() for t in at) <= 1e-6) == sink


@rows
def test_diffused_values_of_a_causal_mask_grow_row_by_row(row):
    _, k, v = make(length=13, device=row.device)
    with row.active():
        whole = qgfd_values(k, v, steps=3, is_causal=True, sink_isolation=True)
        part = qgfd_values(k[:, :, :9], v[:, :, :9], steps=3, is_causal=True, sink_isolation=True)
    torch.testing.assert_close(whole[:, :, :9], part, **CLOSE)


@rows
@pytest.mark.parametrize("dim", [1, 33, 77, 300])
def test_head_sizes_that_no_vector_divides(row, dim):
    if row.device == "cuda" or (row.backend == "triton" and dim > 256):
        pytest.skip(f"{row.name} refuses some of them")
    leaves = make(1, length=6, dim=dim, device=row.device)
    with row.active():
        out = qgfd_attention(*leaves, steps=2)
        grads = grads_of(out, leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = by_definition(*doubles, 2, 0.5)
    torch.testing.assert_close(out.double(), exact, **CLOSE)
    for a, b in zip(grads, grads_of(exact, doubles), strict=True):
        torch.testing.assert_close(a.double(), b, **CLOSE)


@rows
def test_large_scores_overflow_nothing(row):
    q, k, v = make(length=40, device=row.device)
    scaled = [(q * 100).detach().requires_grad_(), (k * 100).detach().requires_grad_(), v]
    with row.active():
        out = qgfd_attention(*scaled, steps=2)
        grads = grads_of(out, scaled)
    exact = by_definition(*(t.double().cpu() for t in scaled), 2, 0.5)
    torch.testing.assert_close(out.double().cpu(), exact, rtol=1e-3, atol=1e-3)  # scores of 1e5 have steps of 8e-3
    assert all(g.isfinite().all() for g in grads)


@rows
@pytest.mark.parametrize("length", [40, 300])
def test_scores_beyond_what_differences_of_floats_can_tell(row, length):
    q, k, v = make(length=length, device=row.device)
    huge = [(q * 1e10).detach().requires_grad_(), (k * 1e10).detach().requires_grad_(), v]
    with row.active():
        out = qgfd_attention(*huge, steps=2)
        grads = grads_of(out, huge)
        hard = qgfd_attention(q, k, v, temperature=1e-9)
    assert all(t.isfinite().all() for t in (out, hard, *grads))
    largest = (q @ k.mT).argmax(-1)  # each query's one key, to all purposes
    chosen = v.gather(2, largest[..., None].expand_as(v))
    torch.testing.assert_close(qgfd_attention(*huge, steps=0), chosen, rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize("steps", [1, 3])
def test_blocks_of_masked_keys_are_as_if_cut_off(row, steps):
    """The keys that are left lie in the second of three blocks, and end within it."""
    q, k, v = make(length=400, device=row.device)
    key_mask = torch.zeros(len(q), 400, dtype=torch.bool, device=row.device)
    key_mask[:, 140:230] = True
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with row.active():
        out = qgfd_attention(*leaves, steps=steps, key_mask=key_mask)
        grads = grads_of(out, leaves)
        cut = [t[:, :, 140:230].detach().requires_grad_() for t in (q, k, v)]
        alone = qgfd_attention(*cut, steps=steps)
    torch.testing.assert_close(out[:, :, 140:230], alone, **CLOSE)
    assert not grads[1][:, :, :140].any() and not grads[1][:, :, 230:].any() and all(g.isfinite().all() for g in grads)


@functools.cache
def long_heads(heads: int, length: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, a mask of keys, and what two steps of them give under a causal mask in float64."""
    q, k, v = (t.detach() for t in make(1, heads, length, 8, dtype=dtype))
    key_mask = torch.rand(1, length, generator=torch.Generator().manual_seed(1)) < 0.8
    key_mask[0, :200] = False  # a whole block of keys; the first queries see none
    mask = torch.ones(length, length, dtype=torch.bool).tril() & key_mask[0]
    out = torch.empty(1, heads, length, 8, dtype=F64)
    for h in range(heads):
        matrix = (q[0, h].double() @ k[0, h].double().mT / 8**0.5).masked_fill_(~mask, -torch.inf)
        matrix = matrix.softmax(-1).nan_to_num_(0.0)
        w = matrix @ (matrix @ v[0, h].double())
        out[0, h] = matrix @ (0.5 * w + 0.5 * v[0, h].double())
    return [q, k, v], key_mask, out


@native
@pytest.mark.parametrize(("heads", "length", "dtype"), [(5, 1100, F32), (3, 1500, BF16), (1, 4200, F32)])
def test_long_heads(row, heads, length, dtype):
    """On a CPU: weights of several heads kept at once, also in 16 bits, and weights too many to be kept."""
    operands, key_mask, exact = long_heads(heads, length, dtype)
    operands = [t.to(row.device) for t in operands]
    threads = torch.get_num_threads()
    try:
        outs = []
        for n in (1, 3):
            torch.set_num_threads(n)
            with row.active():
                outs.append(qgfd_attention(*operands, steps=2, key_mask=key_mask.to(row.device), is_causal=True).cpu())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs)
    # the largest seen: 3.5e-7, 1.9e-3
    assert (outs[0].double() - exact).norm() <= (1e-6 if dtype == F32 else 5e-3) * exact.norm()


@native
def test_sixteen_bit_hops_stay_close_over_many_steps(row):
    q, k, v = make(length=64, dim=32, dtype=BF16, device=row.device)
    with row.active():
        out = qgfd_attention(q, k, v, steps=16, alpha=1.0)
    exact = by_definition(*(t.double().cpu() for t in (q, k, v)), 16, 1.0)
    assert (out.double().cpu() - exact).norm() <= 4e-3 * exact.norm()  # seen, after 17 roundings: 1.9e-3


MASKS = {
    "none": {},
    "causal-key-mask": {"is_causal": True, "key_mask": torch.tensor([[False, True, True, True, False]])},
    "varlen-prefix": {"cu_seqlens": torch.tensor([0, 2, 5]), "prefix_length": torch.tensor([0, 2])},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("recurrence", ["power", "restart"])
@pytest.mark.parametrize("transition", ["attention", "key"])
def test_gradients_in_float64(transition, recurrence, masks):
    leaves = make(1, heads=2, length=5, dim=3, kv_heads=1, dtype=F64)
    options = {"transition": transition, "recurrence": recurrence, "temperature": 0.8, **MASKS[masks]}

    def run(*qkv):
        return qgfd_attention(*qkv, steps=2, alpha=0.6, enable_gqa=True, **options)

    assert torch.autograd.gradcheck(run, leaves)
    with use_backend("cpu"), pytest.raises(BackendError, match="not float64"):
        run(*leaves)


@native
@pytest.mark.parametrize("options", [{}, {"transition": "key"}, {"temperature": 2.0}], ids=str)
def test_what_is_saved_is_linear_in_the_length(row, options):
    def saved(length: int) -> int:
        """Bytes of the distinct storages that the graph holds."""
        storages = {}

        def note(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        leaves = make(1, 1, length, 8, device=row.device)
        with row.active(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            qgfd_attention(*leaves, steps=2, **options)
        return sum(storages.values())

    assert saved(512) <= 2.2 * saved(256) < 4 * 256 * 256


@native
def test_with_and_without_gradients_the_result_is_the_same(row):
    leaves = make(device=row.device)
    with row.active():
        recorded = qgfd_attention(*leaves, steps=3)
        with torch.no_grad():
            plain = qgfd_attention(*leaves, steps=3)
        with torch.inference_mode():
            assert torch.equal(qgfd_attention(*leaves, steps=3), plain)
    assert torch.equal(recorded, plain) and not plain.requires_grad
    with row.active():
        for wanted in ([0], [1], [2], [0, 2]):
            part = grads_of(qgfd_attention(*leaves, steps=3), [leaves[i] for i in wanted])
            whole = grads_of(qgfd_attention(*leaves, steps=3), leaves)
            assert all(torch.equal(g, whole[i]) for g, i in zip(part, wanted, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad,) = torch.autograd.grad(recorded.square().sum(), leaves[0], create_graph=True)
        grad.sum().backward()


@rows
def test_one_tensor_may_be_query_key_and_value(row):
    (x,) = make(device=row.device)[:1]
    with row.active():
        (grad,) = grads_of(qgfd_attention(x, x, x), [x])
    apart = [x.detach().clone().requires_grad_() for _ in range(3)]
    with row.active():
        expected = grads_of(qgfd_attention(*apart), apart)
    torch.testing.assert_close(grad, sum(expected), **CLOSE)


HOPS = [{"steps": 0}, {"steps": 1}, {"steps": 2, "recurrence": "restart"}, {"steps": 1, "temperature": 2.0},
        {"steps": 2, "transition": "key", "sink_isolation": True}, {"steps": 1, "is_causal": True}]  # fmt: skip


@rows
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", HOPS, ids=str)
def test_what_hidden_keys_and_values_hold_does_not_matter(row, options, what):
    row.skip_unless_runnable("qgfd_attention")
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, 9:], mask[1, 4] = False, False
    hidden, mask = ~mask[:, None, :, None], mask.to(row.device)
    # the queries make the chain of transition "attention": there their own hidden rows must not matter to others either
    chain = options["steps"] > 0 and options.get("transition") != "key"
    results = []
    for places in ("", "kv", "qkv" if chain else "kv"):
        operands = [
            t.detach().masked_fill(hidden, what if name in places else 0).to(row.device).requires_grad_()
            for name, t in zip("qkv", make(length=13), strict=True)
        ]
        with row.active():
            out = qgfd_attention(*operands, key_mask=mask, **options)
            seen = out.masked_fill(hidden.to(out.device), 0)
            results.append([seen, *torch.autograd.grad(seen.square().sum(), operands)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not results[0][2][hidden.expand(2, 2, 13, 8).to(row.device)].any()
