"""Texts that a run shows: generated from its recipe's prompts, with the step that chose each token."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdiff.device import autocast, autocast_dtype
from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.visualization.text import TextSample

if TYPE_CHECKING:
    from fastdiff.tasks.masked_lm.task import MaskedLMTask

_SHOWN, _PROMPT_TOKENS = 6, 16  # held-out prompts shown, and their length where the text has none of its own


def draw_samples(task: "MaskedLMTask", model: nn.Module) -> list[TextSample]:
    """The prompts of `sampling.prompts`, or the first held-out ones, continued by `model`."""
    prompts = _prompts(task)
    encoder = task.model.config.num_encoder_layers > 0
    start = task.tokenizer.bos_token_id
    ids, mask = _left_padded([[start]] * len(prompts) if encoder else prompts, task)
    options = {"max_new_tokens": _new_tokens(task, ids.shape[1]), "seed": task.config.training.seed}
    device = next(model.parameters()).device
    inputs = {}
    if encoder:
        conditions, seen = _left_padded(prompts, task)
        inputs = {"encoder_input_ids": conditions.to(device), "encoder_attention_mask": seen.to(device)}
    chosen = torch.full((len(prompts), 0), 0)

    def note(token_ids: Tensor, step: int) -> None:
        nonlocal chosen
        left = (token_ids == task.process.mask_token_id).cpu()
        if not chosen.numel():
            chosen = torch.full(token_ids.shape, -1)
        chosen[(chosen < 0) & ~left] = step

    dtype = autocast_dtype(task.config.training.mixed_precision, device.type)
    with autocast(device, dtype):
        output = generate(
            model,
            ids.to(device),
            mask.to(device),
            MaskedDiffusionGenerationConfig(**(options | task.config.sampling.generation)),
            streamer=note,
            **inputs,
        )
    new, steps = output.sequences[:, ids.shape[1] :].tolist(), chosen[:, ids.shape[1] :].tolist()
    ends = model.config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    samples = []
    for prompt, tokens, step in zip(prompts, new, steps, strict=True):
        length = (
            next((i for i, token in enumerate(tokens) if token in ends), len(tokens)) if task.pairs else len(tokens)
        )
        text = task.tokenizer.decode(prompt)
        samples.append(TextSample(text + (" → " if task.pairs else ""), _pieces(task, tokens[:length]), step[:length]))
    return samples


def _prompts(task: "MaskedLMTask") -> list[list[int]]:
    given = task.config.sampling.prompts
    if given:
        return [
            task.tokenizer.encode(text, add_special_tokens=False) or [task.tokenizer.bos_token_id] for text in given
        ]
    part = task.data.held_out
    if task.pairs:
        return [part.conditions.document(i).tolist() for i in range(min(_SHOWN, len(part.conditions)))]
    step = max(part.targets.num_tokens // _SHOWN, 1)
    starts = range(0, part.targets.num_tokens - _PROMPT_TOKENS + 1, step)
    return [part.targets.window(start, _PROMPT_TOKENS).tolist() for start in starts]


def _left_padded(rows: list[list[int]], task: "MaskedLMTask") -> tuple[Tensor, Tensor]:
    width, padding = max(map(len, rows)), task.model.config.pad_token_id or 0
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def _new_tokens(task: "MaskedLMTask", prompt: int) -> int:
    longest = task.config.data.max_length
    return min(longest if task.pairs else max(longest - prompt, 1), task.model.config.max_position_embeddings - prompt)


def _pieces(task: "MaskedLMTask", tokens: list[int]) -> list[str]:
    """The text of each token; a character of several tokens belongs to its last."""
    pieces, before = [], ""
    for count in range(1, len(tokens) + 1):
        text = task.tokenizer.decode(tokens[:count])
        shown = text.rstrip("\ufffd")
        pieces.append(shown[len(before) :])
        before = shown
    return pieces
