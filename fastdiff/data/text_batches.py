"""Token ids of a training step: windows of documents, and prompts with windows of answers. Pure functions."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.text_config import LengthFormat
from fastdiff.data.text_parts import TextPart
from fastdiff.data.token_files import TokenFile


class PairBatch(NamedTuple):
    """Rows `[prompt][window of the answer]`, padded on the right to the longest; W tokens wide.

    `maskable` marks what the loss is about: `maskable.sum(1)` is LLaDA's normaliser of an answer, fill included.
    """

    input_ids: Tensor  # int64 [B, W]
    attention_mask: Tensor  # bool [B, W], False on batch padding
    maskable: Tensor  # bool [B, W], True on the answer, its EoS and the EoS or PAD that fill the window
    is_end: Tensor  # bool [B, W], True from the EoS on to the end of the window
    condition_ids: Tensor | None  # int64 [B, M], the prompts where they stand apart, padded on the right
    condition_mask: Tensor | None  # bool [B, M], False on padding


class WindowLengths(Protocol):
    """A section of a recipe that says how long windows are, such as `TextDataConfig`."""

    min_length: int
    max_length: int
    window_distribution: str


def window_length(config: WindowLengths, generator: torch.Generator | None = None) -> int:
    """The length of a step's window: drawn from min_length … max_length tokens, whatever the texts.

    Windows of random length, drawn independently of the answers, keep a model usable when decoding crops the window.
    """
    if config.window_distribution == "log_uniform":
        ratio = (config.max_length + 1) / config.min_length
        drawn = torch.rand((), generator=generator, dtype=torch.float64)
        return min(int(config.min_length * ratio ** float(drawn)), config.max_length)
    return int(torch.randint(config.min_length, config.max_length + 1, (), generator=generator))


def document_windows(
    tokens: TokenFile,
    length: int,
    starts: Tensor | Sequence[int],  # int64 [B]
) -> Tensor:  # int64 [B, length]
    """Windows of the flat stream of documents, from each of `starts` on.

    Raises ValueError for a window that would not lie within the file.
    """
    starts = np.asarray(starts, dtype=np.int64).reshape(-1)
    if length < 1 or (len(starts) and not 0 <= starts.min() <= starts.max() <= tokens.num_tokens - length):
        found = f"{starts.min()} … {starts.max()}" if len(starts) else "none"
        raise ValueError(
            f"windows of {length} tokens starting at {found}; expected them within the {tokens.num_tokens} tokens of "
            f"{tokens.path}"
        )
    return torch.from_numpy(tokens.tokens[starts[:, None] + np.arange(length)].astype(np.int64))


def pair_windows(
    part: TextPart,
    indices: Tensor | Sequence[int],  # int64 [B]
    length: int,
    length_format: LengthFormat,
    eos_token_id: int,
    pad_token_id: int,
    separate_conditions: bool = False,
    bos_token_id: int | None = None,
    mask_token_id: int | None = None,
) -> PairBatch:
    """The pairs at `indices`, each with `length` tokens for the answer.

    An answer that does not fit with its EoS is cut to `length` tokens, without EoS. What follows the EoS of a shorter
    one depends on the format: "eos_fill" EoS, "pad_fill" PAD, both maskable and attended to up to the window's end;
    "eos_only" the mask token, attended to but not maskable: a place that a decoder has not come to, of which the loss
    says nothing. So p(EoS at i) becomes P(the answer ends at i, given that it got there). Prompts and batch padding are
    never maskable.

    Args:
        part: pairs: it has conditions.
        separate_conditions: whether prompts go into `condition_ids`, for an encoder; `bos_token_id` then stands before
            the answers, as it does in decoding, where each row needs a token to begin with.
        mask_token_id: what "eos_only" fills windows with.

    Raises:
        ValueError: `part` has documents, `length` is below 1 or the format unknown; an index has no pair.
    """
    if part.conditions is None:
        raise ValueError(f"{part.targets.path} holds documents; expected pairs, which have conditions")
    if separate_conditions and bos_token_id is None:
        raise ValueError(
            "bos_token_id: got None; answers to separate conditions begin with BoS: choose a tokenizer with one"
        )
    indices = torch.as_tensor(indices).tolist()
    prompts = [part.conditions.document(i) for i in indices]
    condition_ids = condition_mask = None
    if separate_conditions:
        condition_ids, condition_mask = _pad(prompts, pad_token_id)
        prompts = [prompt.new_tensor([bos_token_id]) for prompt in prompts]
    texts = [part.targets.document(i) for i in indices]
    rows = answer_windows(prompts, texts, length, length_format, eos_token_id, pad_token_id, mask_token_id)
    return rows._replace(condition_ids=condition_ids, condition_mask=condition_mask)


def answer_windows(
    prompts: Sequence[Tensor],  # B of int64 [P]
    answers: Sequence[Tensor],  # B of int64 [N]
    length: int,
    length_format: LengthFormat,
    eos_token_id: int,
    pad_token_id: int,
    mask_token_id: int | None = None,
) -> PairBatch:
    """Prompts, each with a window of `length` tokens for its answer, as `pair_windows` says; without conditions."""
    if length < 1:
        raise ValueError(f"length: got {length}; expected a window of at least 1 token")
    fills = {"eos_fill": eos_token_id, "pad_fill": pad_token_id, "eos_only": mask_token_id}
    if length_format not in fills:
        raise ValueError(f"length_format: got {length_format!r}; expected 'eos_fill', 'pad_fill' or 'eos_only'")
    fill = fills[length_format]
    if fill is None:
        raise ValueError("mask_token_id: got None; windows of eos_only are filled with it")
    kept = [min(len(answer), length) for answer in answers]
    windows = [_window(answer, length, eos_token_id) for answer in answers]
    windows = [torch.cat([window, window.new_full((length - len(window),), fill)]) for window in windows]
    input_ids, attended = _pad([torch.cat(row) for row in zip(prompts, windows, strict=True)], pad_token_id)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    column = torch.arange(input_ids.shape[1])
    ends = prompt_lengths + torch.tensor(kept, dtype=torch.int64)
    is_end = attended & (column >= ends[:, None])
    maskable = attended & (column >= prompt_lengths[:, None])
    if length_format == "eos_only":
        maskable &= column <= ends[:, None]
    return PairBatch(input_ids, attended, maskable, is_end, None, None)


def _window(answer: Tensor, length: int, eos_token_id: int) -> Tensor:
    if len(answer) >= length:  # no room for EoS
        return answer[:length]
    return torch.cat([answer, answer.new_tensor([eos_token_id])])


def _pad(rows: list[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right to the longest, int64 [B, W], and bool [B, W]: True where a row's own token is."""
    width = max((len(row) for row in rows), default=0)
    padded = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    own = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
        own[index, : len(row)] = True
    return padded, own
