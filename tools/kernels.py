"""What every GPU kernel takes on every target, without a GPU: python tools/kernels.py (make kernels)

Compiles each kernels/*/*.cu with nvcc and the Triton kernels ahead of time (tools/triton_aot.py), writes the table of
registers, stack, spills and shared memory to build/kernels.md and build/kernels.json, and fails, naming the offender,
on a spill, on a stack, on shared memory above the chip's limit, and on more registers than a block can have.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = (80, 87, 90, 100, 110, 120)
FLAGS = ("-std=c++17", "-O3")
REGISTERS_PER_BLOCK = 65536
# CUDA C++ Programming Guide, technical specifications: KiB of shared memory that one block can have
SHARED_LIMIT_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
COLUMNS = ("backend", "kernel", "arch", "registers", "stack", "spill_bytes", "shared_bytes", "threads")

Row = dict[str, object]  # COLUMNS; threads: the largest block; shared_bytes of CUDA kernels: static

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w?'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_PTX_ENTRY = re.compile(r"\.entry (\w+)\(.*?\)\s*((?:\.\w+ [\d, ]+\s*)*)\{", re.DOTALL)
_MAX_THREADS = re.compile(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?")


class CannotRun(RuntimeError):
    """This machine lacks a tool; the message says which."""


def max_threads(ptx: str) -> dict[str, int]:
    """The largest block of every kernel, from what __launch_bounds__ left in the PTX; 1024 where it has none."""
    threads = {}
    for entry in _PTX_ENTRY.finditer(ptx):
        bound = _MAX_THREADS.search(entry[2])
        threads[entry[1]] = 1024
        if bound:
            threads[entry[1]] = int(bound[1]) * int(bound[2] or 1) * int(bound[3] or 1)
    return threads


def parse_ptxas(log: str, threads: dict[str, int]) -> list[Row]:
    """The rows of a compilation with -Xptxas -v. Raises ValueError where the log has none, or lacks a number."""
    parts = _ENTRY.split(log)[1:]
    rows = []
    for name, arch, text in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
        stack, used, shared = _STACK.search(text), _USED.search(text), _SHARED.search(text)
        if not stack or not used or name not in threads:
            raise ValueError(f"ptxas says nothing of registers or stack for {name} on sm_{arch}: {text[:300]!r}")
        rows.append({
            "backend": "cuda",
            "kernel": name,
            "arch": int(arch),
            "registers": int(used[1]),
            "stack": int(stack[1]),
            "spill_bytes": int(stack[2]) + int(stack[3]),
            "shared_bytes": int(shared[1]) if shared else 0,
            "threads": threads[name],
        })  # fmt: skip
    if not rows:
        raise ValueError("ptxas reported no kernel")
    return rows


def readable(names: Iterable[str]) -> dict[str, str]:
    """C++ names without namespaces and parameters; as they are where c++filt is missing."""
    names = sorted(set(names))
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\w+::|^void ", "", line.split("(")[0]) for line in lines.splitlines()]
    return dict(zip(names, short, strict=True))


def known_targets(nvcc: str, wanted: Iterable[int]) -> list[int]:
    """Those of the wanted architectures that this nvcc can compile for."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(n) for n in re.findall(r"compute_(\d+)", listed)}
    return [arch for arch in wanted if arch in known]


def compile_cuda(source: Path, targets: Iterable[int]) -> list[Row]:
    """Compiles one .cu file for every target. Raises CannotRun without nvcc, RuntimeError with nvcc's words."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        raise CannotRun("no nvcc: install the CUDA toolkit, or put its bin folder on PATH")
    targets = known_targets(nvcc, targets)
    if not targets:
        raise CannotRun(f"{nvcc} compiles for none of the wanted architectures")
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-I{ROOT}", "-Xptxas", "-v", "--keep", "--keep-dir", folder]
        command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
        command += ["-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr[-4000:]}")
        threads: dict[str, int] = {}
        for ptx in Path(folder).glob("*.ptx"):
            threads |= max_threads(ptx.read_text())
    rows = parse_ptxas(done.stdout + done.stderr, threads)
    names = readable(row["kernel"] for row in rows)
    return [row | {"kernel": names[row["kernel"]]} for row in rows]


def problems(rows: Iterable[Row]) -> list[str]:
    """One line for everything that must not be."""
    found = []
    for row in rows:
        who = f"{row['backend']} {row['kernel']} on sm_{row['arch']}"
        if row["spill_bytes"]:
            found.append(f"{who}: {row['spill_bytes']} bytes of register spills")
        elif row["stack"]:
            found.append(f"{who}: a stack of {row['stack']} bytes")
        limit = SHARED_LIMIT_KIB.get(row["arch"])
        if limit is None:
            found.append(f"{who}: the shared memory limit of this chip is not known; add it to SHARED_LIMIT_KIB")
        elif row["shared_bytes"] > limit * 1024:
            found.append(f"{who}: {row['shared_bytes']} bytes of shared memory, the limit is {limit * 1024}")
        registers = -(-row["registers"] // 8) * 8 * row["threads"]  # allocated in eights
        if registers > REGISTERS_PER_BLOCK:
            found.append(f"{who}: {row['registers']} registers x {row['threads']} threads > {REGISTERS_PER_BLOCK}")
    return found


def markdown(rows: list[Row], found: list[str]) -> str:
    """One line a kernel: the worst over the targets, and registers on each of them."""
    targets = sorted({row["arch"] for row in rows})
    heads = ["backend", "kernel", "threads", *(f"sm_{a} registers" for a in targets), "stack", "spills", "shared"]
    lines = ["# GPU kernels, compiled ahead of time", "", "Bytes are the largest over the targets.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    kernels: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        kernels.setdefault((row["backend"], row["kernel"]), {})[row["arch"]] = row
    for (backend, kernel), by_arch in sorted(kernels.items()):
        worst = [str(max(row[key] for row in by_arch.values())) for key in ("stack", "spill_bytes", "shared_bytes")]
        registers = [str(by_arch[a]["registers"]) if a in by_arch else "" for a in targets]
        threads = str(max(row["threads"] for row in by_arch.values()))
        lines.append("| " + " | ".join([backend, f"`{kernel}`", threads, *registers, *worst]) + " |")
    verdict = [f"- {problem}" for problem in found] or ["No spills; everything within the limits of every target."]
    return "\n".join([*lines, "", *verdict, ""])


def triton_rows(targets: Iterable[int]) -> list[Row]:
    """The rows of the Triton kernels. Raises CannotRun where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise CannotRun("the triton package is not installed") from None
    sys.path.insert(0, str(Path(__file__).parent))
    import triton_aot

    return triton_aot.compile_all(tuple(targets))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="e.g. 80,90 (default: all)")
    parser.add_argument("--skip-triton", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder of kernels.md and kernels.json")
    parser.add_argument("sources", nargs="*", type=Path, default=sorted(ROOT.glob("kernels/*/*.cu")), help=".cu files")
    options = parser.parse_args(arguments)
    try:
        targets = [int(a) for a in options.targets.split(",")]
        rows = [row for source in options.sources for row in compile_cuda(source, targets)]
        rows += [] if options.skip_triton else triton_rows(targets)
    except CannotRun as reason:
        print(f"kernels cannot be checked: {reason}", file=sys.stderr)
        return 2
    found = problems(rows)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "kernels.json").write_text(json.dumps(rows, indent=1))
    table = markdown(rows, found)
    (options.output / "kernels.md").write_text(table)
    print(table)
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
