"""Diagrams of models as SVG: the whole model, one block of each kind inside, and the diffusion process."""

from fastdiff.lazy import exports

__all__ = ["Process", "draw_blocks", "draw_model", "draw_process", "mask_process", "noise_process", "probe"]

__getattr__ = exports(
    __name__,
    {
        "Process": "fastdiff.visualization.diagrams.process",
        "draw_blocks": "fastdiff.visualization.diagrams.block",
        "draw_model": "fastdiff.visualization.diagrams.model",
        "draw_process": "fastdiff.visualization.diagrams.process",
        "mask_process": "fastdiff.visualization.diagrams.process",
        "noise_process": "fastdiff.visualization.diagrams.process",
        "probe": "fastdiff.visualization.diagrams.probes",
    },
)
