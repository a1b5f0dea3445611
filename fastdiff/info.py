"""`fastdiff info`: what this installation is, what it can run here and why it cannot run the rest; diagrams of runs."""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import fastdiff
from fastdiff import backends, tuning
from fastdiff.commands import command
from fastdiff.ops import _native


def report() -> str:
    """Version, CPU, instruction set, CUDA architectures, and every backend of every operator, as text."""
    lines = [
        f"fastdiff {fastdiff.__version__} on Python {platform.python_version()}, torch {torch.__version__}",
        tested_versions(),
        f"machine: {platform.machine()}, {torch.get_num_threads()} threads",
    ]
    if _native.cpu_module is not None:
        native = _native.cpu_module
        build, features = native.build_info(), native.cpu_features()
        have = ", ".join(name for name, present in features.items() if present) or "none that kernels are made for"
        serves = f"serves torch >= {build['oldest_torch']}"
        lines += [
            f"build: {build['compiler']}, against torch {build['torch_at_build']}, {serves}",
            f"CPU features: {have}",
            f"instruction set: {native.isa()} (of {', '.join(native.isa_names())}; FASTDIFF_CPU_ISA)",
        ]
    if _native.cuda_module is not None:
        archs = ", ".join(f"sm_{arch}" for arch in _native.cuda_module.architectures.split(","))
        lines.append(f"CUDA module: built for {archs} and PTX, with nvcc {_native.cuda_module.nvcc_version}")
    else:
        lines.append(f"CUDA module: {_native.cuda_missing}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    lines += [f"GPU: {gpu}", f"backend asked for: {backends.requested()} (use_backend or FASTDIFF_BACKEND)", ""]
    alike: dict[str, list[str]] = {}
    for name, entries in backends.table().items():
        alike.setdefault(_backends_of(name, entries), []).append(f"fastdiff.ops.{name}")
    lines += [line for text, names in alike.items() for line in (*names, text)]  # what holds of many is said once
    return "\n".join([*lines, "", *tuning.table(), "`fastdiff tune` measures again; FASTDIFF_TUNE=0 takes defaults"])


def tested_versions() -> str:
    """The line that says with which versions of the packages under it fastdiff was tested (tools/abi.py)."""
    tested = json.loads(Path(__file__).with_name("tested.json").read_text())
    torches = (f"{version} ({', '.join(machines)})" for version, machines in tested.pop("torch").items())
    rest = (f"{package} {', '.join(versions)}" for package, versions in tested.items())
    return f"tested with: torch {'; '.join((', '.join(torches), *rest))}"


def _backends_of(operator: str, entries: dict[str, str | None]) -> str:
    """A line for each backend of an operator."""
    device, text = "cuda" if torch.cuda.is_available() else "cpu", []
    for name in entries:
        reason = backends.why_not(operator, name, device, (torch.float32,))
        if reason is None:
            chosen = backends.select(operator, device, (torch.float32,)) == name
            text.append(f"  {name:10} runs{f' (chosen on {device})' if chosen else ''}")
        else:
            text.append(f"  {name:10} cannot run: {'see above' if reason == _native.cuda_missing else reason}")
    return "\n".join(text)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    about = (
        "Tells what this installation is, which kernels it can run here, and why it cannot run the others; or draws a "
        "run: its model, one block of it inside, and its diffusion process."
    )
    parser = argparse.ArgumentParser(prog="fastdiff info", description=about, allow_abbrev=False)
    run = "draw this run, checkpoint, saved model or hub id: files of SVG"
    parser.add_argument("--diagram", metavar="RUN", help=run)
    folder = "folder of the files; default: diagrams in the folder of the run or saved model"
    parser.add_argument("--output", metavar="FOLDER", help=folder)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise argparse.ArgumentError(None, f"unrecognized arguments: {' '.join(unknown)}")
    if options.diagram is None:
        if options.output is not None:
            raise ValueError(f"--output: got {options.output!r} without --diagram; expected a RUN to draw")
        return print(report())
    from fastdiff.tasks.diagrams import save_diagrams

    for file in save_diagrams(options.diagram, options.output):
        print(file)


if __name__ == "__main__":
    main()
