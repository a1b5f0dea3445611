"""Compiles the Triton kernels ahead of time for every target: no GPU needed, only Triton and its own ptxas.

The launch functions themselves are run on meta tensors while the launch is recorded in its place, so that what is
compiled is what a GPU would be given: signature, constants, alignment and warps. Called by tools/kernels.py, in a
process without TRITON_INTERPRET. By hand: python tools/triton_aot.py
"""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastdiff.kernels.adaln import triton_kernels
from fastdiff.kernels.bias_activation import triton_kernels as bias_activation_kernels
from fastdiff.kernels.eos_log_prob import triton_kernels as eos_kernels
from fastdiff.kernels.masked_linear_cross_entropy import triton_kernels as loss_kernels
from fastdiff.kernels.qgfd import triton_kernels as qgfd_kernels
from fastdiff.kernels.scale_shift import triton_kernels as scale_shift_kernels
from fastdiff.kernels.token_sampling import triton_kernels as sampling_kernels
from fastdiff.kernels.unmask import triton_kernels as unmask_kernels

ARCHITECTURES = (80, 87, 90, 100, 110, 120)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT64 = torch.int64
POINTER = {F32: "*fp32", BF16: "*bf16", F16: "*fp16", torch.float64: "*fp64"}
POINTER |= {INT64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1"}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """One kernel as the JIT would specialise it."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]  # arguments that are known to be multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, maxnreg


def _variant(function: JITFunction, arguments: dict[str, object]) -> Variant:
    """What the JIT derives from a launch: types, constants (None, 1, constexpr) and divisibility by 16."""
    signature, constants, aligned = {}, {}, []
    for parameter in function.params:
        name, value = parameter.name, arguments.get(parameter.name)
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            aligned += [name] * (value.storage_offset() * value.element_size() % 16 == 0)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [name] * (specialized and value % 16 == 0)
    key = (tuple(signature.items()), tuple(constants.items()), tuple(aligned))
    options = {name: value for name, value in arguments.items() if name not in function.arg_names}
    return Variant(function.fn.__module__, function.fn.__name__, *key, tuple(options.items()))


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Variant]]:
    """Within the block a launch is appended to the list instead of run."""
    variants: list[Variant] = []

    def record(self, *args, grid, warmup, **kwargs):
        assert not args, "the launch functions name every argument"
        variants.append(_variant(self, kwargs))

    original, JITFunction.run = JITFunction.run, record
    try:
        yield variants
    finally:
        JITFunction.run = original


def _resources(compiled, arch: int) -> dict[str, int]:
    """Registers, stack and spills a thread from the cubin; a kernel without a stack has no spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([BIN / "cuobjdump", "-res-usage", cubin.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "spill_bytes": max(stack, local)}


def compile_variant(variant: Variant, label: str, arch: int) -> dict[str, object]:
    """One row of the table: what `variant` takes on `arch`."""
    function = getattr(importlib.import_module(variant.module), variant.kernel)
    position = {name: i for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={(position[name],): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    return {
        "backend": "triton",
        "kernel": label,
        "arch": arch,
        **_resources(compiled, arch),
        "shared_bytes": compiled.metadata.shared,
        "threads": compiled.metadata.num_warps * 32,
    }


# ------------------------------------------------------------------------------------------- what is to be compiled


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Case:
    """One way of calling the operator on [2, tokens, dim], forward and backward."""

    dim: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # stream, branch and modulation, output
    gated: bool = True
    rms: bool = False
    affine: bool = True
    per_token: bool = False
    saturate: bool = False

    def __str__(self) -> str:
        names = {F32: "f32", BF16: "bf16", F16: "f16"}
        words = [f"D={self.dim}", "/".join(names[t] for t in dict.fromkeys(self.dtypes))]
        words += [word for word in ("gated", "rms", "affine", "per_token", "saturate") if getattr(self, word)]
        return " ".join(words)


def adaln_cases() -> list[Case]:
    """Every tile that the launch functions can pick with every set of dtypes, and the other options at a few sizes."""
    dtype_sets = [(F32,) * 3, (BF16,) * 3, (F16,) * 3, (F32, BF16, BF16)]  # the last is autocast's
    widths = [2**i for i in range(7, 15)]
    assert widths[0] == triton_kernels.MIN_BLOCK and widths[-1] > triton_kernels.FORWARD_MAX_BLOCK
    cases = [Case(dim, dtypes) for dim in widths for dtypes in dtype_sets]
    # odd widths, where nothing is aligned; and every option
    cases += [Case(dim, dtypes) for dim in (1151, 8191, 20001) for dtypes in ((BF16,) * 3, (F32, BF16, BF16))]
    for gated, rms in ((False, False), (False, True), (True, True)):
        cases.append(Case(1152, (F32, BF16, BF16), gated, rms, affine=False))
    cases.append(Case(1152, (BF16,) * 3, affine=False, per_token=True))
    cases += [Case(dim, (F16,) * 3, saturate=True) for dim in (128, 1024, 1151, 4096, 16384)]
    return cases


def adaln_variants(case: Case, tokens: int = 64) -> list[Variant]:
    """The kernels that a training step and a forward pass without gradient launch in this case."""
    stream, other, output = case.dtypes
    batch, dim = 2, case.dim
    x, branch = meta(batch, tokens, dim, dtype=stream), meta(batch, tokens, dim, dtype=other)
    grad_out = meta(batch, tokens, dim, dtype=output)
    m = meta(batch, tokens, dim, dtype=other) if case.per_token else meta(batch, dim, dtype=other)
    affine = [meta(dim, dtype=F32)] * 2 if case.affine else [None, None]
    common = (m, m, *affine, case.rms)
    with recorded_launches() as variants:
        if case.gated:
            _, _, mean, rstd = triton_kernels.gated_residual_adaln_forward_stats(
                x, branch, m, *common, 1e-6, output, case.saturate
            )
            triton_kernels.gated_residual_adaln_backward(
                grad_out, x, x, mean, rstd, branch, m, *common, True, case.affine, x if case.saturate else None
            )
        else:
            triton_kernels.adaln_forward(x, *common, 1e-6, output)
            _, mean, rstd = triton_kernels.adaln_forward_stats(x, *common, 1e-6, output)
            triton_kernels.adaln_backward(grad_out, x, mean, rstd, *common, True, case.affine)
    return variants


@dataclass(frozen=True)
class SamplingCase:
    """One way of calling sample_tokens and lm_head_sample on [2, length, vocab]."""

    vocab: int
    dtype: torch.dtype
    temperature: float | None  # None: one per row
    top: tuple[int, float] = (0, 1.0)
    full: bool = False  # every optional operand

    def __str__(self) -> str:
        words = [f"V={self.vocab}", {F32: "f32", BF16: "bf16", F16: "f16"}[self.dtype], f"T={self.temperature}"]
        words += [f"top_k={self.top[0]} top_p={self.top[1]}"] * (self.top != (0, 1.0)) + ["full"] * self.full
        return " ".join(words)


def sampling_cases() -> list[SamplingCase]:
    """Vocabularies of one block to as many as fit, aligned rows and odd ones, every dtype and option."""
    dtypes, top = (F32, BF16, F16), (50, 0.9)
    cases = [SamplingCase(v, t, 0.7, top, full=True) for v in (50257, 126464) for t in dtypes]
    cases += [SamplingCase(v, t, heat) for v in (50257, 126464) for t in dtypes for heat in (0.0, 1.0, None)]
    cases += [SamplingCase(v, BF16, None, top, full=True) for v in (5, 32000, 262144, sampling_kernels.MAX_VOCAB)]
    return cases + [SamplingCase(126464, BF16, 1.0, t) for t in ((50, 1.0), (0, 0.9))]


def sampling_variants(case: SamplingCase, length: int = 64, dim: int = 4096) -> list[Variant]:
    """The kernels that sample_tokens and lm_head_sample launch in this case."""
    rows = 2 * length
    ids, at, each = (meta(n, dtype=INT64) if case.full else None for n in (2, 1, rows))
    scalar = None if at is None else at[0]
    heat = (meta(rows, dtype=F32), 0.0) if case.temperature is None else (None, case.temperature)
    random = (scalar, 0, scalar, 0, each, each)
    logits, hidden = (meta(2, length, n, dtype=case.dtype) for n in (case.vocab, dim))
    weight = meta(case.vocab, dim, dtype=case.dtype)
    bias = meta(case.vocab, dtype=case.dtype) if case.full else None
    with recorded_launches() as variants:
        sampling_kernels.sample_tokens(logits, *heat, *case.top, ids, ids, *random)
        sampling_kernels.lm_head_sample(hidden, weight, bias, *heat, ids, ids, *random)
    return variants


def unmask_variants(rule: int, order: int, full: bool, length: int = 1024) -> list[Variant]:
    """The kernels that unmask_ launches; full: with every optional operand."""
    batch = 2
    ids = meta(batch, length, dtype=INT64)
    shape = (100,) if full else (batch, length)
    sample = (meta(*shape, dtype=INT64), *(meta(*shape, dtype=F32) for _ in range(3)))
    rows, scalar = (meta(*s, dtype=INT64) if full else None for s in ((100,), ()))
    each, active, values = (meta(batch, dtype=t) if full else None for t in (INT64, torch.bool, F32))
    with recorded_launches() as variants:
        unmask_kernels.unmask_(
            ids, *sample, rows, each, each, active, rule, order, values, 1.0, 5, scalar, 0, scalar, 0, each
        )
    return variants


def cross_entropy_variants(
    vocab: int, dtype: torch.dtype, full: bool, want_grad: bool, rows: int = 64
) -> list[Variant]:
    """The kernel that cross_entropy_rows_ launches; full: weights, suppressed ids, label smoothing."""
    weight, ids = (meta(rows, dtype=F32), meta(2, dtype=INT64)) if full else (None, None)
    logits, targets = meta(rows, vocab, dtype=dtype), meta(rows, dtype=INT64)
    with recorded_launches() as variants:
        loss_kernels.cross_entropy_rows_(logits, targets, weight, ids, 0.1 if full else 0.0, want_grad)
    return variants


def eos_log_prob_variants(vocab: int, dtype: torch.dtype, length: int = 64, dim: int = 768) -> list[Variant]:
    """The kernels that eos_log_prob and eos_log_prob_from_logits launch."""
    ids = meta(2, dtype=INT64)
    logits, hidden, weight = (meta(*s, dtype=dtype) for s in ((2, length, vocab), (2, length, dim), (vocab, dim)))
    with recorded_launches() as variants:
        eos_kernels.eos_log_prob_from_logits(logits, ids, ids)
        eos_kernels.eos_log_prob(hidden, weight, None, ids, ids)
    return variants


@dataclass(frozen=True)
class AttentionCase:
    """One way of calling the operator under qgfd_attention on [2, heads, length, dim], forward and backward."""

    dim: int
    dtype: torch.dtype
    masks: str = "begin end"  # and "keys"
    hops: int = 2

    def __str__(self) -> str:
        return f"d={self.dim} {self.dtype} hops={self.hops} {self.masks}"


def attention_cases() -> list[AttentionCase]:
    """Every tile with every dtype under intervals, which take most; the other masks, one hop, padded head sizes."""
    sizes = sorted(qgfd_kernels.HOP_TILES["fp32"])
    assert sizes[-1] == qgfd_kernels.MAX_DIM
    cases = [AttentionCase(dim, dtype) for dim in sizes for dtype in (F32, BF16, F16)]
    cases += [AttentionCase(64, BF16, masks) for masks in ("", "keys", "end", "begin end keys")]
    return cases + [AttentionCase(64, BF16, hops=1), AttentionCase(40, BF16), AttentionCase(250, F16, "keys")]


def attention_variants(case: AttentionCase, length: int = 1024, heads: int = 12) -> list[Variant]:
    """The kernels that a forward and a backward pass launch in this case."""
    query = meta(2, heads, length, case.dim, dtype=case.dtype)
    grad_out = meta(2, length, heads, case.dim, dtype=case.dtype).transpose(1, 2)
    masks = [meta(2, length, dtype=torch.bool) if "keys" in case.masks else None]
    masks += [meta(1, length, dtype=torch.int32) if name in case.masks else None for name in ("begin", "end")]
    numbers = (0.125, case.hops, case.hops, case.hops, 0.5)  # the last hop is mixed: every launch there is
    with recorded_launches() as variants:
        out, lse, passes = qgfd_kernels.qgfd_forward_saved(query, query, query, *masks, *numbers)
        qgfd_kernels.qgfd_backward(grad_out, query, query, query, out, lse, passes, *masks, *numbers)
    return variants


def scale_shift_variants(dim: int, dtype: torch.dtype, tokens: int = 64) -> list[Variant]:
    """The kernel that scale_shift launches."""
    modulation = meta(2, dim, dtype=dtype)
    with recorded_launches() as variants:
        scale_shift_kernels.scale_shift(meta(2, tokens, dim, dtype=dtype), modulation, modulation)
    return variants


def bias_activation_variants(
    dim: int, dtype: torch.dtype, activation: int, full: bool, rows: int = 64
) -> list[Variant]:
    """The kernels that bias_activation launches, forward and backward; full: with biases and what is gated."""
    x, bias = meta(rows, dim, dtype=dtype), meta(dim, dtype=F32)
    operands = (x, bias, x, bias, activation) if full else (x, None, None, None, activation)
    with recorded_launches() as variants:
        bias_activation_kernels.bias_activation(*operands)
        bias_activation_kernels.bias_activation_backward(x, *operands, True)
    return variants


def labelled_variants() -> dict[Variant, str]:
    """Every kernel variant of every operator that is compiled, with the label of the first case that launches it."""
    labels: dict[Variant, str] = {}

    def add(operator: str, variants: list[Variant], case: object, *names: str) -> None:
        for variant in variants:
            tile = "x".join(str(dict(variant.constants)[name]) for name in names if name in dict(variant.constants))
            labels.setdefault(variant, f"{operator}.{variant.kernel}" + f"<{tile}>" * bool(tile) + f" {case}")

    for case in adaln_cases():
        add("adaln", adaln_variants(case), case, "ROWS", "BLOCK")
    for case in sampling_cases():
        add("token_sampling", sampling_variants(case), case, "NBLOCKS")
    for rule, order in itertools.product(range(5), range(4)):
        add("unmask", unmask_variants(rule, order, full=True), f"rule={rule} order={order} full")
        if order == 0:
            add("unmask", unmask_variants(rule, order, full=False), f"rule={rule} order={order}")
    for vocab, dtype, full, grad in itertools.product((300, 50257, 126464), (F32, BF16, F16), (False, True), (True,)):
        variants = cross_entropy_variants(vocab, dtype, full, grad)
        add("masked_linear_cross_entropy", variants, f"V={vocab} {dtype} full={full}", "TILE")
    variants = cross_entropy_variants(50257, F32, True, False)
    add("masked_linear_cross_entropy", variants, "V=50257 without gradient", "TILE")
    for vocab, dtype in itertools.product((5, 50257, 126464, sampling_kernels.MAX_VOCAB), (F32, BF16, F16)):
        add("eos_log_prob", eos_log_prob_variants(vocab, dtype), f"V={vocab} {dtype}", "NBLOCKS")
    for case in attention_cases():
        add("qgfd", attention_variants(case), case, "ROWS", "KEYS")
    for dim, dtype in itertools.product((64, 1151, 1152), (F32, BF16, F16)):
        add("scale_shift", scale_shift_variants(dim, dtype), f"D={dim} {dtype}", "TILE")
    for dim, dtype, activation, full in itertools.product((32, 77, 3072), (F32, BF16, F16), range(3), (False, True)):
        case = f"D={dim} {dtype} activation={activation} full={full}"
        add("bias_activation", bias_activation_variants(dim, dtype, activation, full), case, "ROWS", "COLS")
    return labels


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> list[dict[str, object]]:
    """Compiles every variant for every target, in as many processes as there are cores.

    Returns a row each with backend, kernel, arch, registers, stack, spill_bytes, shared_bytes, threads.
    Raises RuntimeError where TRITON_INTERPRET is set, and Triton's own errors where a kernel does not compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled; unset it")
    jobs = list(itertools.product(labelled_variants().items(), architectures))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(_compile_job, jobs, chunksize=8))


def _compile_job(job: tuple[tuple[Variant, str], int]) -> dict[str, object]:
    (variant, label), arch = job
    return compile_variant(variant, label, arch)


if __name__ == "__main__":
    for row in compile_all():
        print(*row.values(), sep="\t")
