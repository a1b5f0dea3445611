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

ARCHITECTURES = (80, 87, 90, 100, 110, 120)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
POINTER = {F32: "*fp32", BF16: "*bf16", F16: "*fp16"}
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


@dataclass(frozen=True)
class Case:
    """One way of calling the operator on [2, tokens, dim], forward and backward."""

    dim: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # stream, branch and modulation, output
    gated: bool = True
    rms: bool = False
    affine: bool = True
    per_token: bool = False

    def __str__(self) -> str:
        names = {F32: "f32", BF16: "bf16", F16: "f16"}
        words = [f"D={self.dim}", "/".join(names[t] for t in dict.fromkeys(self.dtypes))]
        words += [word for word in ("gated", "rms", "affine", "per_token") if getattr(self, word)]
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
    return cases


def adaln_variants(case: Case, tokens: int = 64) -> list[Variant]:
    """The kernels that a training step and a forward pass without gradient launch in this case."""
    stream, other, output = case.dtypes

    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, dim = 2, case.dim
    x, branch = tensor(batch, tokens, dim, dtype=stream), tensor(batch, tokens, dim, dtype=other)
    grad_out = tensor(batch, tokens, dim, dtype=output)
    m = tensor(batch, tokens, dim, dtype=other) if case.per_token else tensor(batch, dim, dtype=other)
    affine = [tensor(dim, dtype=F32)] * 2 if case.affine else [None, None]
    common = (m, m, *affine, case.rms)
    with recorded_launches() as variants:
        if case.gated:
            _, _, mean, rstd = triton_kernels.gated_residual_adaln_forward_stats(x, branch, m, *common, 1e-6, output)
            triton_kernels.gated_residual_adaln_backward(
                grad_out, x, x, mean, rstd, branch, m, *common, True, case.affine
            )
        else:
            triton_kernels.adaln_forward(x, *common, 1e-6, output)
            _, mean, rstd = triton_kernels.adaln_forward_stats(x, *common, 1e-6, output)
            triton_kernels.adaln_backward(grad_out, x, mean, rstd, *common, True, case.affine)
    return variants


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> list[dict[str, object]]:
    """Compiles every variant for every target, in as many processes as there are cores.

    Returns a row each with backend, kernel, arch, registers, stack, spill_bytes, shared_bytes, threads.
    Raises RuntimeError where TRITON_INTERPRET is set, and Triton's own errors where a kernel does not compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled; unset it")
    labels: dict[Variant, str] = {}
    for case in adaln_cases():
        for variant in adaln_variants(case):
            constants = dict(variant.constants)
            tile = f"{constants.get('ROWS', 1)}x{constants['BLOCK']}"
            labels.setdefault(variant, f"adaln.{variant.kernel}<{tile}> {case}")
    jobs = list(itertools.product(labels.items(), architectures))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(_compile_job, jobs, chunksize=8))


def _compile_job(job: tuple[tuple[Variant, str], int]) -> dict[str, object]:
    (variant, label), arch = job
    return compile_variant(variant, label, arch)


if __name__ == "__main__":
    for row in compile_all():
        print(*row.values(), sep="\t")
