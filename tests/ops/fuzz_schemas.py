"""Calls every raw operator torch.ops.fastdiff.* with right and wrong operands, for hours if asked; it may not crash.

    python tests/ops/fuzz_schemas.py LIBRARY --calls 50000 --seed 0

LIBRARY is the built module: fastdiff/_C.*.so, or the one that `make fuzz` builds with AddressSanitizer and UBSan. It is
loaded without the package, so that nothing but the checks in csrc stands between a call and a kernel. Half of the calls
are right and must succeed. In the others one to three operands are wrong, and the call must end in a value or in one
line. A call is drawn from (seed, index) alone: --only INDEX makes it again. The last line is a JSON object of counts.
"""

import argparse
import json
import mmap
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
EXTREMES = (0, -1, 1, 2**31 - 1, -(2**31), 2**58 + 1, 2**63 - 1, -(2**63))
NUMBERS = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e300, 5e-324)
# how torch refuses a call before any kernel sees it, in several lines
DISPATCHER = ("Declaration: ", "Could not run", "There were no tensor arguments")
Operands = dict[str, Any]


def floats(rng: random.Random, *shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.empty(shape, dtype=dtype).uniform_(-3, 3, generator=_GENERATOR)
    if x.numel() and rng.random() < 0.1:  # what a diverged model computes
        x.view(-1)[rng.randrange(x.numel())] = rng.choice((float("nan"), float("inf"), -float("inf")))
    return x


def whole(rng: random.Random, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, shape, dtype=dtype, generator=_GENERATOR)


def some_ids(rng: random.Random, vocab: int, most: int) -> Tensor:
    return torch.tensor(sorted(rng.sample(range(vocab), rng.randint(0, min(most, vocab - 1)))), dtype=torch.int64)


def maybe(rng: random.Random, make: Callable[[], Tensor]) -> Tensor | None:
    return make() if rng.random() < 0.6 else None


_GENERATOR = torch.Generator()


# ---------------------------------------------------------------------------------------------- right operands
def adaln(rng: random.Random) -> Operands:
    batch, frames, dim = rng.randint(0, 3), rng.randint(1, 3), rng.randint(1, 70)
    tokens = frames * rng.randint(0, 4)
    wide = rng.random() < 0.2
    dtype = torch.float64 if wide else rng.choice(FLOATS)
    compute = torch.float64 if wide else torch.float32

    def other() -> torch.dtype:
        return dtype if wide else rng.choice(FLOATS)

    def stream(of: torch.dtype) -> Tensor:
        return floats(rng, batch, tokens, dim, dtype=of)

    def modulation() -> Tensor:
        shape = rng.choice(
            ((dim,), (1, dim), (batch, dim), (batch, frames, dim), (1, tokens, dim), (batch, tokens, dim))
        )
        return floats(rng, *shape, dtype=other())

    def vector() -> Tensor:
        return floats(rng, dim, dtype=compute)

    x, branch, out_dtype = stream(dtype), stream(other()), other()
    return {
        "x": x, "residual": x, "residual_out": stream(dtype), "branch": branch, "out": stream(out_dtype),
        "grad_out": stream(other()), "grad_residual_out": maybe(rng, lambda: stream(dtype)), "gate": modulation(),
        "shift": maybe(rng, modulation), "scale": maybe(rng, modulation), "weight": maybe(rng, vector),
        "bias": maybe(rng, vector), "mean": floats(rng, batch * tokens, dtype=compute),
        "rstd": floats(rng, batch * tokens, dtype=compute), "rms": rng.random() < 0.5, "eps": 1e-6,
        "out_dtype": rng.choice((None, out_dtype)), "need_modulation": rng.random() < 0.7,
        "need_affine": rng.random() < 0.7, "saturate": rng.random() < 0.3,
        "residual_in": maybe(rng, lambda: stream(dtype)) if dtype == torch.float16 else None,
    }  # fmt: skip


def scale_shift(rng: random.Random) -> Operands:
    batch, tokens, dim, dtype = rng.randint(0, 3), rng.randint(0, 5), rng.randint(0, 70), rng.choice(FLOATS)
    make = {"x": (batch, tokens, dim), "scale": (batch, dim), "shift": (batch, dim)}
    return {name: floats(rng, *shape, dtype=dtype) for name, shape in make.items()}


def self_attention(rng: random.Random) -> Operands:
    batch, tokens, heads, dim = rng.randint(0, 2), rng.choice((0, 1, 7, 65)), rng.randint(0, 2), rng.choice((1, 8, 33))
    make = {"qkv": (batch, tokens, 3, heads, dim), "out": (batch, tokens, heads, dim)}
    dtype = rng.choice(FLOATS)
    tensors: Operands = {name: floats(rng, *shape, dtype=dtype) for name, shape in make.items()}
    lse = floats(rng, batch, heads, tokens, dtype=torch.float32)
    return tensors | {"grad_out": floats(rng, *make["out"], dtype=dtype), "lse": lse, "scale": 0.5}


def conv_activation(rng: random.Random) -> Operands:
    shape = rng.randint(0, 2), rng.randint(0, 5), rng.randint(0, 9), rng.choice((0, 1, 16, 33, 70))
    dtype = rng.choice(FLOATS)
    x, grad_out = (floats(rng, *shape, dtype=dtype) for _ in range(2))
    bias, x_bias = (maybe(rng, lambda: floats(rng, shape[-1], dtype=torch.float32)) for _ in range(2))
    return {
        "x": x, "grad_out": grad_out, "weight": floats(rng, 9, shape[-1], dtype=torch.float32), "bias": bias,
        "x_bias": x_bias, "activation": rng.randint(0, 2), "need_parameters": rng.random() < 0.7,
    }  # fmt: skip


def qk_norm_rotary(rng: random.Random) -> Operands:
    batch, tokens, heads, dim = rng.randint(0, 2), rng.choice((0, 1, 7, 65)), rng.randint(0, 2), rng.choice((2, 8, 34))
    dtype, turns = rng.choice(FLOATS), rng.random() < 0.7
    qkv, grad_out = (floats(rng, batch, tokens, 3, heads, dim, dtype=dtype) for _ in range(2))
    weight, bias = (floats(rng, 2, heads * dim, dtype=torch.float32) for _ in range(2))
    cosine, sine = (floats(rng, tokens, dim // 2, dtype=torch.float32) if turns else None for _ in range(2))
    return {
        "qkv": qkv, "grad_out": grad_out, "weight": weight, "bias": bias, "cosine": cosine, "sine": sine,
        "stats": floats(rng, batch * tokens, 4, dtype=torch.float32), "eps": 1e-5,
        "need_parameters": rng.random() < 0.7,
    }  # fmt: skip


def bias_activation(rng: random.Random) -> Operands:
    shape = [rng.randint(0, 5) for _ in range(rng.randint(0, 2))] + [rng.randint(0, 70)]
    dtype = rng.choice((*FLOATS, torch.float64))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x, up, grad_out, out = (floats(rng, *shape, dtype=dtype) for _ in range(4))
    gated = rng.random() < 0.5
    bias, up_bias = (maybe(rng, lambda: floats(rng, shape[-1], dtype=compute)) for _ in range(2))
    return {
        "x": x, "bias": bias, "up": up if gated else None, "up_bias": up_bias if gated else None,
        "activation": rng.randint(0, 2), "grad_out": grad_out, "need_bias": rng.random() < 0.7,
        "out": rng.choice((out, x)),
    }  # fmt: skip


def qgfd(rng: random.Random) -> Operands:
    batch, kv_heads, group, dim = (
        rng.randint(0, 2),
        rng.randint(1, 2),
        rng.randint(1, 2),
        rng.choice((1, 8, 16, 33, 64)),
    )
    heads, queries, dtype = kv_heads * group, rng.choice((0, 1, 5, 17, 40)), rng.choice(FLOATS)
    square = rng.random() < 0.7
    keys = queries if square else rng.choice((0, 1, 9, 33))
    hops = rng.randint(1, 4) if keys == queries else 1
    mixes = keys == queries and rng.random() < 0.5
    last = rng.randint(1, hops) if mixes else 0
    saved = hops if mixes and last == hops else hops - 1

    def bounds() -> Tensor:
        return whole(rng, rng.choice((1, batch)), queries, low=-3, high=keys + 3, dtype=torch.int32)

    def grid(of_heads: int, rows: int) -> Tensor:
        packed = floats(rng, batch, rows, of_heads, dim, dtype=dtype)
        return packed.transpose(1, 2) if rng.random() < 0.5 else packed.transpose(1, 2).contiguous()

    return {
        "query": grid(heads, queries), "key": grid(kv_heads, keys), "value": grid(kv_heads, keys),
        "grad_out": grid(heads, queries), "out": floats(rng, batch, queries, heads, dim, dtype=dtype),
        "lse": floats(rng, batch, heads, queries, dtype=torch.float32),
        "passes": floats(rng, saved, batch, heads, queries, dim, dtype=dtype),
        "key_mask": maybe(rng, lambda: whole(rng, batch, keys, low=0, high=2).bool()),
        "row_begin": maybe(rng, bounds), "row_end": maybe(rng, bounds), "scale": 0.2, "hops": hops,
        "first_mixed": 1, "last_mixed": last, "alpha": rng.random(),
    }  # fmt: skip


def sampling(rng: random.Random) -> Operands:
    batch, length, dim = rng.randint(0, 2), rng.randint(0, 4), rng.randint(0, 40)
    vocab, dtype = rng.choice((1, 2, 10, 257, 1024, 1100, 2300)), rng.choice(FLOATS)
    rows = batch * length

    def number() -> Tensor:
        return whole(rng, 1, low=-(2**40), high=2**40)

    def per_row() -> Tensor:
        return whole(rng, rows, low=0, high=2**40)

    return {
        "logits": floats(rng, batch, length, vocab, dtype=dtype),
        "hidden": floats(rng, batch, length, dim, dtype=dtype),
        "weight": floats(rng, vocab, dim, dtype=dtype), "bias": maybe(rng, lambda: floats(rng, vocab, dtype=dtype)),
        "temperatures": maybe(rng, lambda: torch.rand(rows, generator=_GENERATOR).mul(2).round(decimals=1)),
        "temperature": rng.choice((0.0, 1.0, 0.3)), "top_k": rng.choice((0, 1, 5, 5000)),
        "top_p": rng.choice((1.0, 0.9, 0.1)),
        "suppress_tokens": maybe(rng, lambda: some_ids(rng, vocab, 5)),
        "end_token_ids": some_ids(rng, vocab, 3), "excluded_ids": some_ids(rng, vocab, 3),
        "seeds": maybe(rng, number), "seed": rng.randint(-(2**40), 2**40), "steps": maybe(rng, number),
        "step": rng.randint(0, 2**40), "sequence_ids": maybe(rng, per_row), "positions": maybe(rng, per_row),
    }  # fmt: skip


def unmask(rng: random.Random) -> Operands:
    batch, length, mask = rng.randint(0, 3), rng.randint(0, 40), 7
    rows = None
    if rng.random() < 0.4:
        count = rng.randint(0, batch * length)
        rows = torch.tensor(sorted(rng.sample(range(batch * length), count)), dtype=torch.int64)
    entries = batch * length if rows is None else len(rows)

    def per_row() -> Tensor:
        return whole(rng, batch, low=-2, high=length + 3)

    def number() -> Tensor:
        return whole(rng, 1, low=0, high=2**40)

    return {
        "token_ids": whole(rng, batch, length, low=mask - 1, high=mask + 1),
        "token": whole(rng, entries, low=0, high=9),
        **{name: floats(rng, entries, dtype=torch.float32) for name in ("log_prob", "entropy", "margin")},
        "rows": rows, "block_start": maybe(rng, per_row), "block_end": maybe(rng, per_row),
        "active": maybe(rng, lambda: whole(rng, batch, low=0, high=2).bool()), "rule": rng.randint(0, 4),
        "order": rng.randint(0, 3), "values": maybe(rng, lambda: floats(rng, batch, dtype=torch.float32)),
        "value": rng.choice((0.0, 1.0, 3.0, 0.5)), "mask_token_id": mask, "seeds": maybe(rng, number),
        "seed": rng.randint(0, 2**40), "steps": maybe(rng, number), "step": rng.randint(0, 2**40),
        "sequence_ids": maybe(rng, per_row),
    }  # fmt: skip


def cross_entropy(rng: random.Random) -> Operands:
    rows, vocab = rng.randint(0, 6), rng.choice((1, 2, 33, 1024, 2100))
    return {
        "logits": floats(rng, rows, vocab, dtype=rng.choice(FLOATS)),
        "targets": whole(rng, rows, low=-3, high=vocab + 3),
        "row_weight": maybe(rng, lambda: floats(rng, rows, dtype=torch.float32)),
        "suppress_tokens": maybe(rng, lambda: some_ids(rng, vocab, 3)), "label_smoothing": rng.choice((0.0, 0.1)),
        "want_grad": rng.random() < 0.5,
    }  # fmt: skip


def product(rng: random.Random) -> Operands:
    m, n, k, dtype = rng.randint(0, 9), rng.randint(0, 40), rng.randint(0, 20), rng.choice(FLOATS)
    sizes = {"out": (m, n), "a": (m, k), "b": (k, n)}
    tensors: Operands = {name: floats(rng, *size, dtype=dtype) for name, size in sizes.items()}
    plus = maybe(rng, lambda: floats(rng, n, dtype=dtype))
    return tensors | {"input": plus, "beta": 1.0, "alpha": 1.0, "tile": rng.choice((1, 7, 64))}


def adamw_ema(rng: random.Random) -> Operands:
    sizes = [rng.choice((1, 3, 64, 5000)) for _ in range(rng.randint(1, 3))]
    lists = {name: [torch.rand(size, generator=_GENERATOR) for size in sizes]
             for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages")}  # fmt: skip
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": rng.choice((0.0, 0.1))}
    return {**lists, "steps": [torch.zeros(()) for _ in sizes], **numbers, "grad_scale": 1.0, "average_weight": 0.1}


FAMILIES: dict[str, Callable[[random.Random], Operands]] = {
    "adaln": adaln, "gated": adaln, "bias_activation": bias_activation, "scale_shift": scale_shift,
    "self_attention": self_attention, "qgfd": qgfd, "adamw_ema": adamw_ema, "gradient_norm": adamw_ema,
    "sample_tokens": sampling, "lm_head_sample": sampling, "eos_log_prob": sampling, "unmask": unmask,
    "cross_entropy": cross_entropy, "tiled": product, "conv_activation": conv_activation,
    "qk_norm_rotary": qk_norm_rotary,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- wrong operands
def wrong_tensor(rng: random.Random, t: Tensor, others: list[Tensor]) -> Any:
    """Some of what callers get wrong: dtype, shape, strides, place in memory, contents, device."""
    kind = rng.randrange(11)
    if kind == 0:
        return t.to(rng.choice(DTYPES))
    if kind == 1 and t.dim():  # one size more or less
        dim = rng.randrange(t.dim())
        return t.narrow(dim, 0, t.shape[dim] - 1) if t.shape[dim] and rng.random() < 0.5 else torch.cat([t, t], dim)
    if kind == 2:
        return t.unsqueeze(0) if rng.random() < 0.5 else t.flatten()
    if kind == 3 and t.dim():  # one row for all, without memory of its own
        dim = rng.randrange(t.dim())
        return t.narrow(dim, 0, 1).expand(t.shape) if t.shape[dim] else t
    if kind == 4 and t.dim() > 1:
        return t.transpose(*rng.sample(range(t.dim()), 2))
    if kind == 5 and t.dim():  # a step in the last dimension
        return torch.cat([t, t], -1)[..., ::2]
    if kind == 6 and not t.is_complex() and t.dtype != torch.bool:  # begins between two elements
        size = t.element_size()
        memory = torch.zeros(t.numel() * size + size, dtype=torch.uint8)
        shifted = torch.frombuffer(memory.numpy(), dtype=t.dtype, offset=1, count=t.numel()) if t.numel() else t
        return shifted.view(t.shape)
    if kind == 7 and others:  # another operand's memory
        other = rng.choice(others)
        fits = other.dtype == t.dtype and other.numel() >= t.numel()
        return other.reshape(-1)[other.numel() - t.numel() :].view(t.shape) if fits else other
    if kind == 8:
        return t.to("meta")
    if kind == 9:
        return None
    values = EXTREMES if not t.dtype.is_floating_point else NUMBERS
    if t.dtype in (torch.int32, torch.uint8, torch.bool):
        values = (0, 1) if t.dtype != torch.int32 else EXTREMES[:5]
    value = rng.choice(values)
    if t.dtype in FLOATS and abs(value) == 1e300:
        value = torch.finfo(t.dtype).max
    return torch.full_like(t, value)


def wrong(rng: random.Random, value: Any, others: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return wrong_tensor(rng, value, others)
    if isinstance(value, list):
        place, tensor = rng.randrange(len(value)), wrong_tensor(rng, rng.choice(value), value)
        return value[:place] + ([] if tensor is None else [tensor]) + value[place + 1 :]
    if value is None:
        return rng.choice(others) if others else None
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(EXTREMES)
    return rng.choice(NUMBERS) if isinstance(value, float) else rng.choice(DTYPES)


# ---------------------------------------------------------------------------------------------- the run
def operators() -> dict[str, Any]:
    names = sorted(
        n.removeprefix("fastdiff::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastdiff::")
    )
    return {name: getattr(torch.ops.fastdiff, name).default for name in names}


def family(name: str) -> Callable[[random.Random], Operands]:
    """Raises KeyError for an operator that nobody has taught the fuzzer."""
    return next((make for prefix, make in FAMILIES.items() if name.startswith(prefix)), None) or FAMILIES[name]


def draw(ops: dict[str, Any], seed: int, index: int) -> tuple[str, list[Any], bool]:
    """An operator's name, its arguments, and whether they are right."""
    rng = random.Random(f"{seed} {index}")
    _GENERATOR.manual_seed(rng.getrandbits(40))
    name = rng.choice(list(ops))
    made = family(name)(rng)
    arguments = [made[argument.name] for argument in ops[name]._schema.arguments]
    is_right = rng.random() < 0.5
    if not is_right:
        for place in rng.sample(range(len(arguments)), min(len(arguments), rng.randint(1, 3))):
            tensors = [a for i, a in enumerate(arguments) if isinstance(a, Tensor) and i != place]
            arguments[place] = wrong(rng, arguments[place], tensors)
    return name, arguments, is_right


def describe(name: str, arguments: list[Any]) -> str:
    def word(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        return f"{value.dtype}{list(value.shape)}/{list(value.stride())}@{value.device}"

    return f"{name}({', '.join(map(word, arguments))})"


def run(calls: int, seed: int, first: int = 0, place: mmap.mmap | None = None) -> Counter:
    """Raises AssertionError where a right call is refused, or a refusal is not a line of text."""
    ops, counts = operators(), Counter()
    for index in range(first, first + calls):
        if place is not None:  # for whoever finds this process dead
            place[:20] = str(index).ljust(20).encode()
        name, arguments, is_right = draw(ops, seed, index)
        try:
            ops[name](*arguments)
            counts[f"{name}: value"] += 1
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            assert not is_right, f"call {index}, {describe(name, arguments)} is right and was refused: {error}"
            words = str(error).partition("\nException raised from")[0].strip()
            is_torchs = any(start in words for start in DISPATCHER)
            is_line = is_torchs or (words and "\n" not in words)
            assert is_line, f"call {index}, {describe(name, arguments)}: refused with {error}"
            counts[f"{name}: refused"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the index of one call, which is shown and made")
    parser.add_argument("--place", type=Path, help="a file that holds the index of the call that is being made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.ops.load_library(options.library.resolve())
    if options.only is not None:
        print(describe(*draw(operators(), options.seed, options.only)[:2]), flush=True)
        print(dict(run(1, options.seed, options.only)))
        return
    place = None
    if options.place is not None:
        options.place.write_bytes(b" " * 20)
        with options.place.open("r+b") as file:
            place = mmap.mmap(file.fileno(), 20)
    counts: Counter = Counter()
    for first in range(0, options.calls, 10_000):
        counts += run(min(10_000, options.calls - first), options.seed, first, place)
        print(f"{min(first + 10_000, options.calls)} of {options.calls} calls", file=sys.stderr, flush=True)
    print(json.dumps({"calls": counts.total(), "seed": options.seed, **dict(sorted(counts.items()))}))


if __name__ == "__main__":
    main()
