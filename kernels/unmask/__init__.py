"""unmask_: commits the best of a masked diffusion language model's sampled tokens."""
