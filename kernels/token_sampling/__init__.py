"""Token sampling and unmasking of masked diffusion language models."""
