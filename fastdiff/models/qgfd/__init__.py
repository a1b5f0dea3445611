"""QGFD diffusion models: the denoiser (backbone.py), a model of any modality (model.py, adapters/), one call for all."""
