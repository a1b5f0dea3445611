"""Samples as files (pictures, sounds, videos, tables), pictures of runs, and text as it is decoded, on a terminal."""

from fastdiff.lazy import exports

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

__getattr__ = exports(
    __name__,
    {
        "DenoisingView": "fastdiff.visualization.watch",
        "TextSample": "fastdiff.visualization.text",
        "save_contact_sheet": "fastdiff.visualization.videos",
        "save_length_scatter": "fastdiff.visualization.scatter",
        "save_loss_curve": "fastdiff.visualization.curves",
        "save_marginals": "fastdiff.visualization.tables",
        "save_sample_grid": "fastdiff.visualization.grids",
        "save_spectrograms": "fastdiff.visualization.sounds",
        "save_table_csv": "fastdiff.visualization.tables",
        "save_text_samples": "fastdiff.visualization.text",
        "save_video_gif": "fastdiff.visualization.videos",
        "save_wav": "fastdiff.visualization.sounds",
    },
)
