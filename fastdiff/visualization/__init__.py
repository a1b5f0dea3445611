"""Pictures of runs and samples, drawn by matplotlib without a display, and text as it is decoded, on a terminal."""

from fastdiff.visualization.curves import save_loss_curve
from fastdiff.visualization.grids import save_sample_grid
from fastdiff.visualization.scatter import save_length_scatter
from fastdiff.visualization.text import TextSample, save_text_samples
from fastdiff.visualization.watch import DenoisingView

__all__ = [
    "DenoisingView",
    "TextSample",
    "save_length_scatter",
    "save_loss_curve",
    "save_sample_grid",
    "save_text_samples",
]
