"""What is the masked loss's own: certainty, row weights, gradients made in advance, autocast, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import BackendError, use_backend
from fastdiff.ops import _masked_linear_cross_entropy_backends as backends
from fastdiff.ops import masked_linear_cross_entropy
from ops.harness import A_DEVICE, BF16, F16, F32, NATIVE, ROWS, across_threads

rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)


def randn(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(count=40, dim=16, vocab=53, dtype=F32, device="cpu", seed=0, masked=0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, generator=generator) < masked
    targets = torch.randint(vocab, (count,), generator=generator)
    tensors = {
        "hidden": randn(count, dim, dtype=dtype, seed=seed + 1).requires_grad_(),
        "weight": (randn(vocab, dim, seed=seed + 2) / dim**0.5).to(dtype).requires_grad_(),
        "targets": torch.where(mask, targets, -100),
        "mask": mask,
        "bias": randn(vocab, dtype=dtype, seed=seed + 3).requires_grad_(),
    }
    return {k: t.detach().to(device).requires_grad_(t.requires_grad) for k, t in tensors.items()}


def leaves(o: dict[str, Tensor]) -> list[Tensor]:
    return [o["hidden"], o["weight"], o["bias"]]


def doubled(o: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().cpu().double().requires_grad_() if t.is_floating_point() else t.cpu() for k, t in o.items()}


def plain(o: dict[str, Tensor], row_weight: Tensor | None = None, **options) -> Tensor:
    """torch's own functions on the gathered rows."""
    logits = F.linear(o["hidden"][o["mask"]], o["weight"], o["bias"])
    losses = F.cross_entropy(logits, o["targets"][o["mask"]], reduction="none", **options)
    return (losses if row_weight is None else losses * row_weight[o["mask"]]).sum()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()).item()


@rows
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("count", "vocab"), [(60, 53), (1500, 1009)])
def test_equals_plain_pytorch_in_float64(row, count, vocab, label_smoothing):
    o = operands(count, 16, vocab, device=row.device)
    row_weight = torch.rand(count, generator=torch.Generator().manual_seed(9))
    with row.active():
        loss, row_loss = masked_linear_cross_entropy(
            **o, row_weight=row_weight.to(row.device), label_smoothing=label_smoothing
        )
        grads = torch.autograd.grad(loss, leaves(o))
    d = doubled(o)
    truth = plain(d, row_weight.double(), label_smoothing=label_smoothing)
    # seen: 6.4e-8 (loss), 3.3e-7 (gradients; the products' own rounding)
    assert relative(loss, truth) <= 1e-6
    for grad, exact in zip(grads, torch.autograd.grad(truth, leaves(d)), strict=True):
        assert relative(grad, exact) <= 1e-6
    assert row_loss.dtype == F32 and not row_loss.requires_grad and not row_loss[~o["mask"]].any()
    logits = F.linear(d["hidden"], d["weight"], d["bias"])
    each = F.cross_entropy(logits, d["targets"].clamp_min(0), reduction="none", label_smoothing=label_smoothing)
    torch.testing.assert_close(row_loss.double().cpu(), (each * d["mask"]).detach(), rtol=1e-5, atol=1e-6)


@rows
def test_suppressed_ids_are_as_if_the_vocabulary_had_not_got_them(row):
    o = operands(device=row.device, vocab=53)
    kept = [i for i in range(53) if i not in (3, 4, 52)]
    o["targets"] = torch.where(o["mask"], torch.tensor(kept, device=row.device)[o["targets"].clamp_min(0) % 50], -7)
    places = torch.tensor([kept.index(t) if t >= 0 else 0 for t in o["targets"].tolist()], device=row.device)
    with row.active():
        for smoothing in (0.0, 0.2):
            small = dict(o, weight=o["weight"][kept], bias=o["bias"][kept], targets=places)
            a = masked_linear_cross_entropy(**o, suppress_tokens=(52, 3, 4), label_smoothing=smoothing)
            b = masked_linear_cross_entropy(**small, label_smoothing=smoothing)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            ours, without = (torch.autograd.grad(loss, leaves(o)) for loss, _ in (a, b))
            torch.testing.assert_close(ours, without, rtol=1e-5, atol=1e-6)
            assert not ours[1][[3, 4, 52]].any() and not ours[2][[3, 4, 52]].any()
        ids = torch.tensor([4, 52, 3, 3], device=row.device)
        same, _ = masked_linear_cross_entropy(**o, suppress_tokens=ids, label_smoothing=0.2)
        assert torch.equal(same, a[0]), "a tensor of ids does as well as a tuple"


@native
def test_no_masked_rows_give_zero_with_zero_gradients(row):
    for count in (5, 0):
        o = operands(count, device=row.device, masked=-1.0)
        with row.active():
            loss, row_loss = masked_linear_cross_entropy(**o)
            grads = torch.autograd.grad(loss, leaves(o))
        assert loss == 0 and not row_loss.any() and row_loss.shape == (count,)
        for grad, leaf in zip(grads, leaves(o), strict=True):
            assert grad.shape == leaf.shape and not grad.any()


@native
def test_rows_that_are_not_masked_do_not_matter(row):
    o = operands(device=row.device)
    hidden = torch.where(o["mask"][:, None], o["hidden"].detach(), torch.nan).requires_grad_()
    with row.active():
        loss, _ = masked_linear_cross_entropy(**dict(o, hidden=hidden))
        assert torch.equal(loss, masked_linear_cross_entropy(**o)[0])
        grad = torch.autograd.grad(loss, hidden)[0]
    assert not grad[~o["mask"]].any() and grad[o["mask"]].isfinite().all()


@native
def test_row_weights_broadcast_and_zero_removes_a_row(row):
    o = operands(12, device=row.device, masked=2.0)
    shaped = dict(o, hidden=o["hidden"].view(3, 4, 16), targets=o["targets"].view(3, 4), mask=o["mask"].view(3, 4))
    per_sample = torch.tensor([[1.0], [0.0], [2.5]], device=row.device)
    with row.active():
        loss, row_loss = masked_linear_cross_entropy(**shaped, row_weight=per_sample)
        torch.testing.assert_close(loss, (row_loss * per_sample).sum())
        grad = torch.autograd.grad(loss, o["hidden"])[0].view(3, 4, 16)
        assert not grad[1].any() and grad[2].any()
        one = masked_linear_cross_entropy(**shaped, row_weight=torch.tensor(2.0, device=row.device))[0]
        torch.testing.assert_close(one, 2 * masked_linear_cross_entropy(**shaped)[0])
        learned = torch.ones(3, 1, device=row.device, requires_grad=True)
        loss, _ = masked_linear_cross_entropy(**shaped, row_weight=learned)
        assert torch.autograd.grad(loss, [learned], allow_unused=True)[0] is None


@native
@pytest.mark.parametrize("weight", [1e-7, 1.0, 1e3])
def test_float16_gradients_keep_their_digits_at_any_row_weight(row, weight):
    o = operands(700, 24, 211, F16, row.device)
    row_weight = torch.rand(700, generator=torch.Generator().manual_seed(5)) * weight
    # fp16 goes down to 6e-8: the gradients are brought into its range by the loss scale, as GradScaler would
    scale = 1.0 / weight
    with row.active():
        loss, _ = masked_linear_cross_entropy(**o, row_weight=row_weight.to(row.device))
    d = doubled(o)
    truth = torch.autograd.grad(plain(d, row_weight.double()) * scale, leaves(d))
    if weight >= 1:
        grads = torch.autograd.grad(loss * scale, leaves(o))
        for grad, exact in zip(grads, truth, strict=True):
            assert relative(grad, exact) <= 8e-4  # seen: 3.8e-4
    else:  # the gradients themselves are below fp16's range, those of the logits were not
        assert torch.autograd.grad(loss, o["hidden"])[0].isfinite().all()


@native
def test_sixteen_bit_sums_over_many_chunks_are_kept_in_float32(row, monkeypatch):
    o = operands(4000, 16, 101, BF16, row.device, masked=2.0)
    monkeypatch.setattr(backends.Plan, "of", staticmethod(lambda device: backends.Plan(64, 64, 64, 64)))
    exact = torch.autograd.grad(plain(d := doubled(o)), d["weight"])[0]
    errors = {}
    for most in (4, 10**9):
        monkeypatch.setattr(backends, "MAX_ADDITIONS", most)
        with row.active():
            loss, _ = masked_linear_cross_entropy(**o)
            errors[most] = relative(torch.autograd.grad(loss, o["weight"])[0], exact)
    # seen: 1.9e-3, and 8.2e-3 where 63 chunks are added up in bf16
    assert errors[4] <= 4e-3 < errors[10**9]


# the sum over ids is what MKL's own product of several threads splits at such sizes; the last two are one tile each
@native
@pytest.mark.parametrize(
    ("count", "dim", "vocab"), [(64, 64, 1000), (360, 24, 263), (700, 24, 4001), (9, 16, 5), (3, 2000, 16)]
)
def test_no_product_depends_on_threads(row, count, dim, vocab):
    o = operands(count, dim, vocab, device=row.device, masked=2.0)

    def results() -> list[Tensor]:
        with row.active():
            loss, row_loss = masked_linear_cross_entropy(**o)
            return [loss, row_loss, *torch.autograd.grad(loss, leaves(o))]

    first, *others = across_threads(results)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@native
def test_gradients_scale_with_what_comes_in(row):
    o = operands(device=row.device)
    with row.active():
        (loss, _), (again, _) = masked_linear_cross_entropy(**o), masked_linear_cross_entropy(**o)
        one = torch.autograd.grad(loss, leaves(o))
        other = torch.autograd.grad(again * -0.25, leaves(o))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a * -0.25, b)


@native
def test_backward_twice_through_one_graph(row):
    o = operands(device=row.device)
    with row.active():
        loss, _ = masked_linear_cross_entropy(**o)
        first = torch.autograd.grad(loss * 3, leaves(o), retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, leaves(o), retain_graph=True)
        third = torch.autograd.grad(loss * 3, leaves(o))
        for a, b, c, d in zip(first, kept, second, third, strict=True):
            assert torch.equal(a, b) and torch.equal(a, d), "a later pass leaves what was handed out alone"
            torch.testing.assert_close(a, 3 * c)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, leaves(o))


@native
def test_a_second_pass_after_the_weight_was_changed_is_refused(row):
    o = operands(device=row.device)
    with row.active():
        loss, _ = masked_linear_cross_entropy(**o)
        loss.backward(retain_graph=True)
        with torch.no_grad():
            o["weight"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def watched(monkeypatch, backend: str, note) -> None:
    """Calls note(arguments, results) of every call of a backend."""
    whole = backends.IMPLEMENTATIONS[backend]

    def run(*arguments):
        results = whole(*arguments)
        note(arguments, results)
        return results

    monkeypatch.setitem(backends.IMPLEMENTATIONS, backend, run)


@native
def test_the_weights_gradient_is_never_copied(row, monkeypatch):
    o, addresses = operands(device=row.device), []
    watched(monkeypatch, row.backend, lambda _, results: addresses.append(results[3].data_ptr()))
    with row.active():
        loss, _ = masked_linear_cross_entropy(**o)
    (loss * 0.5).backward()
    assert [o["weight"].grad.data_ptr()] == addresses


@native
def test_only_wanted_gradients_are_made(row, monkeypatch):
    o, asked = operands(device=row.device), []
    watched(monkeypatch, row.backend, lambda arguments, _: asked.append(arguments[8:11]))
    with row.active():
        masked_linear_cross_entropy(**o)
        masked_linear_cross_entropy(**dict(o, weight=o["weight"].detach()))
        masked_linear_cross_entropy(**dict(o, hidden=o["hidden"].detach(), bias=None))
        masked_linear_cross_entropy(**{k: t.detach() for k, t in o.items()})
        with torch.no_grad():
            loss, _ = masked_linear_cross_entropy(**o)
        with torch.inference_mode():
            assert torch.equal(masked_linear_cross_entropy(**o)[0], loss)
    wanted = [(True, True, True), (True, False, True), (False, True, False), *[(False, False, False)] * 3]
    assert asked == wanted and not loss.requires_grad
    with row.active(), pytest.raises(RuntimeError, match="once_differentiable"):
        loss, _ = masked_linear_cross_entropy(**o)
        torch.autograd.grad(loss * loss, o["hidden"], create_graph=True)[0].sum().backward()


@native
def test_autocast_is_that_of_a_linear_layer(row):
    o = operands(90, 24, 211, device=row.device)
    with row.active(), torch.autocast(row.device, BF16):
        loss, row_loss = masked_linear_cross_entropy(**o)
    assert loss.dtype == row_loss.dtype == F32
    grads = torch.autograd.grad(loss, leaves(o))
    with torch.autocast(row.device, BF16):
        expected = plain(o)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for grad, usual in zip(grads, torch.autograd.grad(expected, leaves(o)), strict=True):
        assert grad.dtype == F32
        assert relative(grad, usual.double()) <= 4e-3  # seen: 1.6e-3, of two results that are both rounded


@native
def test_leading_shapes_and_layouts(row):
    o = operands(24, device=row.device)
    with row.active():
        flat, per_row = masked_linear_cross_entropy(**o)
        lead = (2, 3, 4)
        shaped = dict(o, hidden=o["hidden"].view(*lead, 16), targets=o["targets"].view(lead), mask=o["mask"].view(lead))
        loss, row_loss = masked_linear_cross_entropy(**shaped)
        assert torch.equal(loss, flat) and torch.equal(row_loss, per_row.view(lead))
        turned = dict(
            o, hidden=o["hidden"].detach().t().contiguous().t(), weight=o["weight"].detach().t().contiguous().t()
        )
        assert not turned["hidden"].is_contiguous()
        torch.testing.assert_close(masked_linear_cross_entropy(**turned)[0], flat)
        one = {k: t[0] if k in ("hidden", "targets", "mask") else t for k, t in o.items()}
        assert masked_linear_cross_entropy(**one)[1].shape == ()
        tied = o["weight"].detach().requires_grad_()  # hidden and weight may be one tensor
        square = dict(o, hidden=tied, weight=tied, bias=None)
        square["targets"], square["mask"] = torch.arange(53, device=row.device), torch.ones(53, device=row.device) > 0
        assert torch.autograd.grad(masked_linear_cross_entropy(**square)[0], tied)[0].isfinite().all()


def test_float64_goes_through_the_reference_and_passes_gradcheck():
    o = doubled(operands(7, 5, 11))
    weight = torch.rand(7)

    def loss(hidden, w, bias):
        options = {"row_weight": weight, "suppress_tokens": (0,), "label_smoothing": 0.1}
        targets = torch.where(o["targets"] == 0, 1, o["targets"])
        return masked_linear_cross_entropy(hidden, w, targets, o["mask"], bias=bias, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves(o))
    with use_backend("cpu"), pytest.raises(BackendError, match="not float64"):
        loss(*leaves(o))


def test_torch_func_and_forward_mode_take_the_reference():
    o = operands()
    tangent = randn(40, 16, seed=8)

    def loss(hidden):
        return masked_linear_cross_entropy(hidden, o["weight"].detach(), o["targets"], o["mask"])[0]

    grad = torch.func.grad(loss)(o["hidden"].detach())
    torch.testing.assert_close(grad, torch.autograd.grad(loss(o["hidden"]), o["hidden"])[0], rtol=1e-4, atol=1e-5)
    _, derivative = torch.func.jvp(loss, (o["hidden"].detach(),), (tangent,))
    torch.testing.assert_close(derivative, (grad * tangent).sum(), rtol=1e-4, atol=1e-4)
    with use_backend("cpu"), pytest.raises(BackendError, match="torch.func"):
        torch.func.grad(loss)(o["hidden"].detach())


@pytest.mark.parametrize("row", A_DEVICE, ids=lambda r: r.name)
def test_opcheck(row):
    o = operands(device=row.device)
    suppress, weight = torch.tensor([3, 9], device=row.device), torch.rand(40, device=row.device)
    logits, targets = randn(40, 53).to(row.device), o["targets"].clamp_min(10)
    operator = torch.ops.fastdiff.cross_entropy_rows_.default
    torch.library.opcheck(operator, (logits, targets, weight, suppress, 0.1, True))
    torch.library.opcheck(operator, (logits, targets, None, None, 0.0, False))
    whole = torch.ops.fastdiff_masked_linear_cross_entropy.native.default
    inputs = (o["hidden"].detach(), o["weight"].detach(), o["bias"].detach(), o["targets"], o["mask"])
    torch.library.opcheck(whole, (*inputs, weight, None, 0.1, True, True, True, BF16))
    torch.library.opcheck(whole, (*inputs, None, None, 0.0, True, False, False, F32))


@native
def test_compiled_calls_see_a_nan_where_a_target_is_wrong(row):
    torch._dynamo.reset()
    o = operands(device=row.device, masked=2.0)
    o["targets"][5] = 53
    with row.active(), torch.no_grad():
        compiled = torch.compile(masked_linear_cross_entropy, fullgraph=True, backend="aot_eager")
        loss, row_loss = compiled(**o, suppress_tokens=(52,))
    assert loss.isnan() and row_loss.isnan()[5]


@native
def test_another_number_of_masked_rows_does_not_compile_again(row):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_linear_cross_entropy, fullgraph=True, backend=counter)
    with row.active():
        for masked in (0.5, 0.2, 2.0, -1.0):
            o = operands(device=row.device, masked=masked)
            loss, _ = compiled(**o)
            grads = torch.autograd.grad(loss * 2, leaves(o))
            expected = torch.autograd.grad(masked_linear_cross_entropy(**o)[0] * 2, leaves(o))
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert counter.frame_count == 1


H, W, T, M = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3) > 0
ONE_WRONG = torch.tensor([[0, 1, 2], [3, 7, 4]])


def call(hidden=H, weight=W, targets=T, mask=M, **options):
    return masked_linear_cross_entropy(hidden, weight, targets, mask, **options)


BAD = {
    "hidden-list": (TypeError, "hidden: got a list; expected a torch.Tensor", lambda: call([1.0])),
    "hidden-dtype": (ValueError, "hidden: got torch.int64; expected float32", lambda: call(H.long())),
    "hidden-number": (ValueError, r"hidden: got shape \[\]", lambda: call(torch.tensor(1.0))),
    "weight-shape": (ValueError, r"weight: got shape \[5, 7\]; expected \[V, 8\]", lambda: call(weight=W[:, :7])),
    "weight-dtype": (
        ValueError,
        "weight: got torch.bfloat16, with torch.float32 of hidden",
        lambda: call(weight=W.bfloat16()),
    ),
    "weight-empty": (ValueError, "with V > 0", lambda: call(weight=W[:0])),
    "bias-shape": (ValueError, r"bias: got shape \[4\]; expected \[5\]", lambda: call(bias=torch.zeros(4))),
    "targets-dtype": (ValueError, "targets: got torch.int32; expected int64", lambda: call(targets=T.int())),
    "targets-shape": (ValueError, r"targets: got shape \[3, 2\].*\[2, 3\]", lambda: call(targets=T.reshape(3, 2))),
    "targets-device": (ValueError, "targets: got one on meta", lambda: call(targets=T.to("meta"))),
    "target-out": (
        ValueError,
        r"targets\[1, 1\]: got 7 in a masked row; expected.*0 to 4",
        lambda: call(targets=ONE_WRONG),
    ),
    "target-below": (ValueError, r"targets\[0, 0\]: got -100 in a masked row", lambda: call(targets=T - 100)),
    "target-suppressed": (
        ValueError,
        r"targets\[0, 2\]: got 2 in a masked row; an id that suppress_tokens names",
        lambda: call(targets=ONE_WRONG.clamp_max(4), suppress_tokens=(2,)),
    ),
    "mask-dtype": (TypeError, "mask: got torch.float32; expected a bool", lambda: call(mask=M.float())),
    "mask-type": (TypeError, "mask: got a list; expected a bool", lambda: call(mask=[True])),
    "mask-shape": (ValueError, r"mask: got shape \[3\]", lambda: call(mask=M[0])),
    "row_weight-shape": (
        ValueError,
        r"row_weight: got shape \[2\]; expected what broadcasts to \[2, 3\]",
        lambda: call(row_weight=torch.ones(2)),
    ),
    "row_weight-more": (ValueError, "row_weight: got shape", lambda: call(row_weight=torch.ones(4, 2, 3))),
    "row_weight-dtype": (ValueError, "row_weight: got torch.int64", lambda: call(row_weight=T)),
    "row_weight-number": (TypeError, "row_weight: got a float", lambda: call(row_weight=0.5)),
    "suppress-range": (
        ValueError,
        "suppress_tokens: got 5; expected ids from 0 to 4",
        lambda: call(suppress_tokens=(5,)),
    ),
    "suppress-type": (TypeError, "suppress_tokens: got an element of type float", lambda: call(suppress_tokens=(1.0,))),
    "suppress-all": (ValueError, "suppress_tokens: got all 5 ids", lambda: call(suppress_tokens=range(5))),
    "smoothing-one": (
        ValueError,
        r"label_smoothing: got 1.0; expected a number in \[0, 1\)",
        lambda: call(label_smoothing=1.0),
    ),
    "smoothing-below": (ValueError, "label_smoothing: got -0.1", lambda: call(label_smoothing=-0.1)),
    "smoothing-type": (ValueError, "label_smoothing: got 'a'", lambda: call(label_smoothing="a")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_was_given_and_expected_in_one_line(name):
    error, match, bad = BAD[name]
    with pytest.raises(error, match=match) as caught:
        bad()
    assert "\n" not in str(caught.value)
