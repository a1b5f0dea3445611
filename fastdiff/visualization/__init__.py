"""Pictures of runs and samples, drawn by matplotlib without a display."""

from fastdiff.visualization.curves import save_loss_curve
from fastdiff.visualization.grids import save_sample_grid
from fastdiff.visualization.text import TextSample, save_text_samples

__all__ = ["TextSample", "save_loss_curve", "save_sample_grid", "save_text_samples"]
