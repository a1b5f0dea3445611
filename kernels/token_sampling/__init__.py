"""Token sampling of masked diffusion language models."""
