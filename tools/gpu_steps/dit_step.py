"""A training step of DiT-XL/2 on latents of 256 × 256 images: fastdiff, the same model on reference operators, and the
usual public way; eager, then with each block compiled. Random weights and images."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from fastdiff.backends import use_backend
from gpu_steps.bench import Bench
from gpu_steps.device import Function

STEPS = 6
OPERATORS = ("adaln", "gated_residual_adaln")


def training_step(bench: Bench, model: nn.Module, batch: int, channels: int, size: int) -> Function:
    """One optimizer step of a rectified flow under bf16 autocast."""
    with torch.no_grad():
        for parameter in model.parameters():  # adaLN-Zero begins with zeros, on which products are faster
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.on.name == "cuda")
    images = torch.randn(batch, channels, size, size, device=bench.device)
    labels = bench.ids(10, batch)

    def step() -> None:
        noise, time = torch.randn_like(images), torch.rand(batch, device=bench.device)
        level = time[:, None, None, None]
        with torch.autocast(bench.on.name, torch.bfloat16):
            predicted = model((1 - level) * images + level * noise, 1000 * time, labels)
        loss = (predicted.float()[:, :channels] - (noise - images)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run(bench: Bench) -> None:
    try:
        from baselines import PlainDiT

        from fastdiff.models import DiT, preset_config
    except ImportError as error:
        bench.record.row("missing", text=f"fastdiff.models does not import here: {error}")
        return
    small = {"depth": 2, "hidden_size": 64, "num_heads": 2, "input_size": 8, "num_classes": 10}
    name, batch = ("DiT-S/2", 2) if bench.small else ("DiT-XL/2", 32)
    config = preset_config(name, **(small if bench.small else {}))
    size, channels = config.image_size[0], config.in_channels

    def stepping(kind: type[nn.Module], compiled: bool) -> Function:
        with bench.device:
            model = kind(config).train()
        if compiled:
            for block in model.blocks:
                block.compile(**bench.on.compile_options)
        return training_step(bench, model, batch, channels, size)

    def timed(kind: type[nn.Module], backend: str | None, compiled: bool) -> Callable[[], float]:
        def seconds() -> float:
            with contextlib.nullcontext() if backend is None else use_backend(backend):
                step = stepping(kind, compiled)
                step()
                return bench.on.wall(step, STEPS)[1]

        return seconds

    case = f"{name}, {config.depth} blocks, batch {batch}, {(size // config.patch_size) ** 2} tokens"
    contenders = {"fastdiff": (DiT, None), "reference operators": (DiT, "reference"), "public": (PlainDiT, None)}
    for compiled in (False, True):
        for contender, (kind, backend) in contenders.items():
            title = f"{contender}, blocks compiled" if compiled else contender
            ours = "cuda" if contender == "fastdiff" else None
            bench.by_the_clock(OPERATORS, case, title, timed(kind, backend, compiled), backend=ours)
            if compiled:
                torch.compiler.reset()
    bench.record.note(f"{bench.on.memory():.1f} GiB of the device's memory were held at most")
