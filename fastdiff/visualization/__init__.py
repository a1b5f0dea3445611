"""Samples as files (pictures, sounds, videos, tables), pictures of runs, and text as it is decoded, on a terminal."""

from fastdiff.visualization.curves import save_loss_curve
from fastdiff.visualization.grids import save_sample_grid
from fastdiff.visualization.scatter import save_length_scatter
from fastdiff.visualization.sounds import save_spectrograms, save_wav
from fastdiff.visualization.tables import save_marginals, save_table_csv
from fastdiff.visualization.text import TextSample, save_text_samples
from fastdiff.visualization.videos import save_contact_sheet, save_video_gif
from fastdiff.visualization.watch import DenoisingView

__all__ = [
    "DenoisingView",
    "TextSample",
    "save_contact_sheet",
    "save_length_scatter",
    "save_loss_curve",
    "save_marginals",
    "save_sample_grid",
    "save_spectrograms",
    "save_table_csv",
    "save_text_samples",
    "save_video_gif",
    "save_wav",
]
