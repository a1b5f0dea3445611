"""AdamW and a moving average of the weights in plain PyTorch: what the kernel is held against."""

import torch
from torch import Tensor


def gradient_norm(grads: list[Tensor]) -> Tensor:  # []
    """The square root of the sum of squares of all gradients."""
    return torch.stack([grad.norm(dtype=torch.float64).square() for grad in grads]).sum().sqrt()


def adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    average_weight: float,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019) on gradients times `grad_scale`, then the average."""
    for param, grad, first, second, step, average in zip(
        params, grads, exp_avgs, exp_avg_sqs, steps, averages, strict=True
    ):
        step += 1
        grad = grad * grad_scale
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        deviation = (second / (1 - beta2**step)).sqrt_().add_(eps)
        param.mul_(1 - lr * weight_decay).sub_(lr / (1 - beta1**step) * first / deviation)
        average.lerp_(param, average_weight)
