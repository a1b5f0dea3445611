"""The steps of the report, in the order of what they tell."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step: a function `run(bench)` in a process of its own.

    Attributes:
        name: what `--only` names, and the key of its predictions.
        title: its heading.
        module: where `run` is.
        weight: its share of the time, in seconds of an eight-minute report. What a step leaves goes to the later ones.
        timed: whether clocks and power are read while it runs.
        environment: variables that its process gets on top of the others.
    """

    name: str
    title: str
    module: str
    weight: float
    timed: bool = True
    environment: tuple[tuple[str, str], ...] = ()


POISON = (("FASTDIFF_POISON_EMPTY", "1"),)  # outputs of native operators start as NaN

STEPS = (
    Step("constants", "Constants of this machine", "gpu_steps.constants", 15),
    Step("correctness", "Correctness against fp64, with graph capture and another stream", "gpu_steps.correctness", 60,
         timed=False, environment=POISON),
    Step("adaln", "AdaLN and gated residual AdaLN", "gpu_steps.adaln", 70),
    Step("small", "Small batches, and sampling", "gpu_steps.small", 35),
    Step("qgfd", "QGFD attention", "gpu_steps.qgfd", 45),
    Step("heads", "Heads: sampling and end tokens without logits in memory", "gpu_steps.heads", 25),
    Step("loss", "Masked diffusion loss, forward and gradients", "gpu_steps.loss", 20),
    Step("counters", "Hardware counters of four kernels", "gpu_steps.counters", 30, timed=False),
    Step("host", "unmask_, and the host's time per call", "gpu_steps.host", 15),
    Step("sanitizer", "compute-sanitizer on small shapes of every operator", "gpu_steps.sanitizer", 45, timed=False),
    Step("dit", "A training step of DiT-XL/2", "gpu_steps.dit_step", 40),
    Step("decoding", "A decoding step of LLaDA-8B's shape", "gpu_steps.decoding_step", 40),
    Step("suite", "The operators' tests on this machine's backends", "gpu_steps.suite", 30, timed=False),
)  # fmt: skip
BUILD_WEIGHT = 120.0  # seconds of an eight-minute report, before the steps
