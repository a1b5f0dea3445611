"""What ends a training step: gradients are clipped, AdamW moves the weights, and the average follows them."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from fastdiff.backends import requested, why_not
from fastdiff.ops.adamw_ema import OPERATOR
from fastdiff.training.ema import Ema


class WeightUpdate:
    """One call a step, after the gradients are there; it removes them.

    On a CPU all of it is one pass over the weights (`fastdiff.ops.adamw_ema`); elsewhere, and where processes share
    the weights out among them, it is accelerate's clipping, torch's fused AdamW and `Ema.update`. Both keep the
    optimizer's state under the names that torch gives it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,  # torch.optim.AdamW as accelerate prepared it
        ema: Ema,
        max_grad_norm: float,  # 0 turns clipping off
    ) -> None:
        # not the model: it may hold a process group, which must be gone before the processes part
        self._accelerator, self._parameters = accelerator, list(model.parameters())
        self._optimizer, self._ema = optimizer, ema
        self._limit = max_grad_norm or float("inf")
        self._average = dict(ema.pairs())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        whole = accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
        self._can_be_one_pass = whole and all(
            type(p) is nn.Parameter and p.dtype == torch.float32 and p.is_contiguous() and p in self._average
            and why_not(OPERATOR, "cpu", p.device.type, (p.dtype,)) is None
            for p in parameters
        )  # fmt: skip

    def __call__(self, step: int) -> Tensor:
        """Ends step `step` (the first is 0); returns the norm of the gradients before they were clipped."""
        if self._can_be_one_pass and requested() in ("auto", "cpu"):
            return self._in_one_pass(step)
        norm = self._accelerator.clip_grad_norm_(self._parameters, self._limit)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.update(step)
        return norm

    @torch.no_grad()
    def _in_one_pass(self, step: int) -> Tensor:
        from fastdiff.ops.adamw_ema import adamw_ema_, gradient_norm

        state, average_weight = self._optimizer.state, 1 - self._ema.decay_of(step)
        groups = []
        for group in self._optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                groups.append((group, parameters, [p.grad.contiguous() for p in parameters]))
        every = [grad for *_, grads in groups for grad in grads]
        norm = gradient_norm(every)[0] if every else torch.zeros(())
        scale = min(1.0, self._limit / (norm.item() + 1e-6)) if self._limit < float("inf") else 1.0
        if norm != norm:  # as torch's clipping: the weights become NaN, too, and the run ends with a message
            scale = float("nan")
        moved = set()
        for group, parameters, grads in groups:
            kept = [_state_of(p, state) for p in parameters]
            adamw_ema_(
                parameters, grads,
                *([entries[name] for entries in kept] for name in ("exp_avg", "exp_avg_sq", "step")),
                [self._average[p] for p in parameters],
                group["lr"], *group["betas"], group["eps"], group["weight_decay"], scale, average_weight,
            )  # fmt: skip
            moved.update(parameters)
            for p in parameters:
                p.grad = None
        self._ema.follow([p for p in self._average if p not in moved], average_weight)
        return norm


def _state_of(parameter: nn.Parameter, state: dict) -> dict[str, Tensor]:
    """An entry of AdamW's state, made as torch makes it at a parameter's first gradient."""
    entries = state[parameter]
    if not entries:
        entries["step"] = torch.zeros((), dtype=torch.float32)
        entries["exp_avg"] = torch.zeros_like(parameter)
        entries["exp_avg_sq"] = torch.zeros_like(parameter)
    return entries
