"""QGFD diffusion models: the denoiser (backbone.py), models of any modality (model.py, adapters/), one call for all."""
