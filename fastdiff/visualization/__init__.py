"""Pictures of runs and samples, drawn by matplotlib without a display."""

from fastdiff.visualization.curves import save_loss_curve
from fastdiff.visualization.grids import save_sample_grid

__all__ = ["save_loss_curve", "save_sample_grid"]
