"""Cross-attention as it is seen and steered: captured maps, their entropy, and the share that the first token takes.

Attention of text models and of what reads their states sinks into the first token (Xiao et al. 2024, "Efficient
Streaming Language Models with Attention Sinks"). Two remedies are here, one for each side of it: `drop_early_tokens`
hides the first tokens now and then in training, and `EntropyTerm` rewards maps that are spread.
"""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from fastdiff.nn.cross_attention import CrossAttention
from fastdiff.nn.q_former import QFormer

_LEAST = 1e-30  # of a weight under a logarithm: hidden keys have the weight 0


def cross_attentions(model: nn.Module) -> dict[str, CrossAttention]:
    """The cross-attention modules of a model by their names, in its order. Raises ValueError where it has none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, CrossAttention)}
    if not found:
        raise ValueError(
            f"model: got a {type(model).__name__} without cross-attention; expected a QFormer, or a DiT that attends "
            "to a context"
        )
    return found


def depends_on_time(model: nn.Module) -> bool:
    """Whether the maps of a model differ from one denoising step to the next.

    Those of a Q-Former do not: it reads a prompt once, and sees neither noise nor time. Raises as `cross_attentions`.
    """
    inside = {id(each) for module in model.modules() if isinstance(module, QFormer) for each in module.modules()}
    return any(id(module) not in inside for module in cross_attentions(model).values())


class AttentionMaps:
    """What `attention_maps` has captured.

    Attributes:
        layers: names of the cross-attention modules, in the model's order.
        leading_keys: keys before a prompt's first token: 1 of a DiT, whose first key is the time; 0 of a Q-Former.
        steps: the sampling steps of which there are maps; 0 alone where no steps were asked for.
    """

    def __init__(self, model: nn.Module, steps: Collection[int] | None, rows: int | None, detach: bool) -> None:
        self._modules = cross_attentions(model)
        self._wanted = None if steps is None else set(steps)
        self._rows, self._detach, self._step = rows, detach, 0
        self._found: dict[int, dict[str, list[Tensor]]] = {}
        self._before = {name: module.capture for name, module in self._modules.items()}
        self.layers = tuple(self._modules)
        self.leading_keys = max(module.leading_keys for module in self._modules.values())

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted(self._found))

    def after_step(self, step: int, *_: object) -> None:
        """Says that a sampling step is done: `sample`'s callback, or called by it."""
        self._step = step + 1
        self._switch()

    def __getitem__(self, step: int) -> Tensor:  # float32 [B, layers, H, Q, K]
        """The maps of a step (0 where no steps were asked for): each row of K sums to 1, hidden keys have 0.

        Raises KeyError where none were captured, ValueError where calls of different K were made.
        """
        if step not in self._found:
            raise KeyError(f"step {step}: no cross-attention was computed in it; there are maps of {list(self.steps)}")
        layers = [self._found[step].get(name, []) for name in self.layers]
        shapes = {tuple(each.shape[1:]) for calls in layers for each in calls}
        if len({len(calls) for calls in layers}) > 1 or len(shapes) > 1:
            raise ValueError(
                f"attention_maps: got maps [H, Q, K] of {sorted(shapes)} in one step; expected one shape: run the "
                "model once, on one batch"
            )
        return torch.stack([torch.cat(calls) for calls in layers], 1)

    def _switch(self) -> None:
        """Weights are made explicitly in the steps that are wanted, and in no other."""
        wanted = self._wanted is None or self._step in self._wanted
        for name, module in self._modules.items():
            module.capture = self._taker(name) if wanted else self._before[name]

    def _taker(self, name: str):
        before = self._before[name]

        def take(weights: Tensor) -> None:  # [B, H, Q, K]
            if before is not None:
                before(weights)
            kept = weights[: self._rows]
            kept = kept.detach().cpu() if self._detach else kept
            self._found.setdefault(self._step, {}).setdefault(name, []).append(kept)

        return take

    def _restore(self) -> None:
        for name, module in self._modules.items():
            module.capture = self._before[name]


@contextlib.contextmanager
def attention_maps(
    model: nn.Module, steps: Collection[int] | None = None, *, rows: int | None = None, detach: bool = True
) -> Iterator[AttentionMaps]:
    """Within the block, every cross-attention map of a model is kept; its outputs are what they are without.

        with attention_maps(model) as maps:  # a Q-Former: once a prompt, whatever the step
            condition = model.condition(text_states, text_mask)
        with attention_maps(model, [0, 12], rows=len(prompts)) as maps:  # a DiT's blocks, in two steps of sampling
            sample_prompts(model, diffusion, condition, callback=maps.after_step)

    Args:
        model: has `CrossAttention` modules somewhere in it.
        steps: of sampling, counted from 0, to be told by `AttentionMaps.after_step`; None keeps those of every call.
        rows: keeps the first rows of each call alone: of guidance the conditional half, which comes first.
        detach: False keeps gradients, on the model's device.

    Raises ValueError for a model without cross-attention, and for steps below 0.
    """
    if steps is not None and (not steps or min(steps) < 0):
        raise ValueError(f"steps: got {list(steps)}; expected steps of sampling, from 0")
    maps = AttentionMaps(model, steps, rows, detach)
    try:
        maps._switch()
        yield maps
    finally:
        maps._restore()


def attention_entropy(maps: Tensor) -> Tensor:
    """Entropy over the keys, in nats: `[..., K]` → `[...]`. Weights of 0 add nothing, to the gradient neither."""
    return -(maps * maps.clamp_min(_LEAST).log()).sum(-1)


def sink_share(maps: Tensor, first: int = 0) -> Tensor:
    """The share of attention on a prompt's first token, mean over all but the first dimension: `[B, …, K]` → `[B]`.

    Args:
        maps: rows of K sum to 1, such as `AttentionMaps.__getitem__` gives them.
        first: the key of the first token: `AttentionMaps.leading_keys`.

    Attention without a preference has 1 / (keys of the prompt). Raises ValueError where there is no such key.
    """
    if not 0 <= first < maps.shape[-1]:
        raise ValueError(f"first: got {first} of {maps.shape[-1]} keys; expected 0 … {maps.shape[-1] - 1}")
    return maps[..., first].flatten(1).mean(1)


def drop_early_tokens(model: nn.Module, probability: float, tokens: int = 1) -> None:
    """Sets how often training hides the first tokens of a prompt from cross-attention (`CrossAttention.drop_early`).

    Args:
        model: has `CrossAttention` modules somewhere in it.
        probability: of a row and call; 0 is never.
        tokens: how many those are. Prompts that have no others keep them.

    Raises ValueError for a probability beyond 0 … 1, fewer tokens than 1, and a model without cross-attention.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: got {probability}; expected 0 to 1")
    if tokens < 1:
        raise ValueError(f"tokens: got {tokens}; expected at least 1")
    for module in cross_attentions(model).values():
        module.drop_early, module.early_tokens = probability, tokens


class EntropyTerm:
    """A term of a loss that rewards spread attention: minus weight · mean entropy of all cross-attention maps.

    It captures the maps of every call in training mode from its construction on, so that plain weights are computed
    there, as gradients need them.

        term = EntropyTerm(model, 0.01)
        loss = diffusion_loss(model, batch) + term()  # a step

    Args:
        model: has `CrossAttention` modules somewhere in it.
        weight: of the term; a nat of entropy lowers the loss by so much.

    Raises ValueError for a weight that is not above 0, and for a model without cross-attention.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        if not weight > 0:
            raise ValueError(f"weight: got {weight}; expected a number above 0")
        self.weight, self._modules = weight, cross_attentions(model)
        self._maps: dict[str, Tensor] = {}
        for name, module in self._modules.items():
            module.capture = self._taker(name, module)

    def __call__(self) -> Tensor:
        """The term of the last forward pass, a scalar with gradients; its maps are let go.

        Raises RuntimeError where there was none in training mode since the last call.
        """
        if not self._maps:
            raise RuntimeError("EntropyTerm: got no forward pass in training mode since the last call; expected one")
        entropies = [attention_entropy(maps).mean() for maps in self._maps.values()]
        self._maps.clear()
        return -self.weight * torch.stack(entropies).mean()

    def remove(self) -> None:
        """Maps are no longer captured."""
        self._maps.clear()
        for module in self._modules.values():
            module.capture = None

    def _taker(self, name: str, module: CrossAttention):
        def take(weights: Tensor) -> None:
            if module.training and weights.requires_grad:
                # The last call counts: with gradient checkpointing the backward pass computes a block once more.
                self._maps[name] = weights

        return take
