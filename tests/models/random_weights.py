"""Weights with which every part of a model is heard."""

import torch


def random_weights(model, scale=0.05):
    """All weights random, so that nothing is gated away and no bias is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()
