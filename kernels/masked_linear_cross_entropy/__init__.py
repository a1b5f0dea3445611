"""The masked diffusion loss: LM head and cross entropy of masked rows alone."""
