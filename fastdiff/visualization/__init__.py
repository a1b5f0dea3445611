"""Samples as files (pictures, sounds, videos, tables), pictures of runs, and text as it is decoded, on a terminal."""

from fastdiff.lazy import exports

__all__ = [
    "AttentionPanel",
    "DenoisingView",
    "TextSample",
    "caption_attention",
    "caption_grid",
    "save_attention_heatmaps",
    "save_captioned_gif",
    "save_captioned_grid",
    "save_contact_sheet",
    "save_length_scatter",
    "save_loss_curve",
    "save_marginals",
    "save_picture_table",
    "save_prompt_attention",
    "save_sample_grid",
    "save_spectrograms",
    "save_table_csv",
    "save_text_samples",
    "save_token_maps",
    "save_video_gif",
    "save_wav",
]

__getattr__ = exports(
    __name__,
    {
        "AttentionPanel": "fastdiff.visualization.attention",
        "DenoisingView": "fastdiff.visualization.watch",
        "TextSample": "fastdiff.visualization.text",
        "caption_attention": "fastdiff.visualization.captions",
        "caption_grid": "fastdiff.visualization.captions",
        "save_attention_heatmaps": "fastdiff.visualization.attention",
        "save_captioned_gif": "fastdiff.visualization.captioned",
        "save_captioned_grid": "fastdiff.visualization.captioned",
        "save_contact_sheet": "fastdiff.visualization.videos",
        "save_length_scatter": "fastdiff.visualization.scatter",
        "save_loss_curve": "fastdiff.visualization.curves",
        "save_marginals": "fastdiff.visualization.tables",
        "save_picture_table": "fastdiff.visualization.captioned",
        "save_prompt_attention": "fastdiff.visualization.attention",
        "save_sample_grid": "fastdiff.visualization.grids",
        "save_spectrograms": "fastdiff.visualization.sounds",
        "save_table_csv": "fastdiff.visualization.tables",
        "save_text_samples": "fastdiff.visualization.text",
        "save_token_maps": "fastdiff.visualization.attention",
        "save_video_gif": "fastdiff.visualization.videos",
        "save_wav": "fastdiff.visualization.sounds",
    },
)
