"""Models: one family a file."""

from fastdiff.models.dit import PRESETS, DiT, DiTConfig, preset_config

__all__ = ["PRESETS", "DiT", "DiTConfig", "preset_config"]
