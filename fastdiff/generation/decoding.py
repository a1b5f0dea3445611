"""Decoding of masked diffusion language models, block by block, with no work for tokens that cannot be chosen.

The loop is LLaDA's (Nie et al. 2025): predict all masked tokens, keep the best of the current block, repeat; with its
classifier-free guidance. The rules of parallel unmasking are those of `fastdiff.ops.unmask_`. What differs from the
published loop changes no result: head, softmax and sampling run only on rows that are masked and lie in the current
block, without a full softmax in memory, and tokens are committed on the device.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.generation.canvas import Canvas
from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.ops import TokenSample, lm_head_sample, sample_tokens, unmask_

Streamer = Callable[[Tensor, int], None]


@dataclass
class GenerationStatistics:
    """What a call cost: `forward_passes` of the model (guided ones are of twice the batch), `tokens` and `seconds`."""

    forward_passes: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows a second."""
        return self.tokens / self.seconds


@dataclass
class GenerationOutput:
    """`sequences`, int64 `[B, P + max_new_tokens]`, and `statistics`."""

    sequences: Tensor
    statistics: GenerationStatistics


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    input_ids: Tensor,  # int64 [B, P]
    attention_mask: Tensor | None = None,  # bool or 0/1 [B, P]
    generation_config: MaskedDiffusionGenerationConfig | None = None,
    streamer: Streamer | None = None,
    copies: Sequence[int] | None = None,
) -> GenerationOutput:
    """Continues prompts, and fills mask tokens in them.

    A row gives the same tokens alone, in any batch, and in any order of rows, but for what rounding decides (another
    batch is another matrix product). Copies of a prompt in one batch draw differently.

    Args:
        model: a `fastdiff.models.MaskedDiffusionLM`, or one wrapped by peft.
        input_ids: the prompts. Mask tokens in them are filled first, before the blocks of new tokens.
        attention_mask: True or 1 where a token counts; prompts may be padded on the left or the right.
        generation_config: None is `MaskedDiffusionGenerationConfig()`.
        streamer: called after each step as streamer(token_ids, step): a new tensor laid out as `sequences`, with mask
            tokens where nothing was chosen yet, and the number of the step from 0.
        copies: which copy of its prompt each row is (0 or above), where copies are spread over several calls; None
            counts those in the batch.

    Returns:
        GenerationOutput: `sequences[:, :P]` are the prompts (padding as it came, mask tokens filled),
        `sequences[:, P:]` the new tokens.

    A model with a timestep embedding is told the masked share of a row's generated positions: the time of the linear
    schedule.

    Raises:
        TypeError, ValueError: an argument does not fit, a prompt is empty or too long, nothing is to be generated, or
            the model's logits have NaN; the message names it.
    """
    config = MaskedDiffusionGenerationConfig() if generation_config is None else generation_config
    config.validate()
    attention_mask = _check(model, input_ids, attention_mask, config)
    if copies is not None and (len(copies) != len(input_ids) or min(copies, default=0) < 0):
        raise ValueError(f"copies: got {list(copies)}; expected {len(input_ids)} numbers of 0 or above, one a row")
    started = time.perf_counter()
    training = model.training
    model.eval()
    try:
        decoder = _Decoder(model, input_ids, attention_mask, config, copies)
        for step in decoder.steps():
            if streamer is not None:
                streamer(decoder.canvas.sequences(), step)
    finally:
        model.train(training)
    sequences = decoder.canvas.sequences()
    tokens = decoder.tokens - int((decoder.canvas.ids == decoder.mask_token_id).sum())  # waits for the device
    if tokens < decoder.tokens:
        raise ValueError("the model's logits have no distribution at some position: all -inf, or NaN or +inf")
    statistics = GenerationStatistics(decoder.forward_passes, tokens, time.perf_counter() - started)
    return GenerationOutput(sequences, statistics)


class _Decoder:
    """One call: the canvas, and where each row is. Every row advances by itself; finished ones wait."""

    def __init__(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        config: MaskedDiffusionGenerationConfig,
        copies: Sequence[int] | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.mask_token_id = model.config.mask_token_id
        self.canvas = Canvas(
            input_ids, attention_mask, config.max_new_tokens, self.mask_token_id, model.config.pad_token_id, copies
        )
        self.tokens = sum(self.canvas.infilled) + len(input_ids) * config.max_new_tokens
        if not self.tokens:
            raise ValueError("max_new_tokens: got 0 for prompts without mask tokens; nothing is to be generated")
        self.generated = (self.canvas.ids == self.mask_token_id).sum(1)  # int64 [B]
        self.seed = int(torch.randint(2**63 - 1, ())) if config.seed is None else config.seed
        self.suppressed = tuple({self.mask_token_id, *(config.suppress_tokens or ())})
        self.end_tokens = _end_tokens(model, config)
        self.forward_passes = 0
        batch, device = len(input_ids), input_ids.device
        self.on_cpu = _on_cpu(device)
        self.block = torch.full((batch,), -1, device=device)  # where the current block begins
        self.step_in_block = torch.zeros_like(self.block)
        self.masks_in_block = torch.zeros_like(self.block)

    def steps(self) -> Iterator[int]:
        """Decodes, a step at a time."""
        for step, width in enumerate(self._widths()):
            masked = self._in_block()
            self._step(masked, width, step)
            yield step

    # ------------------------------------------------------------------------------------------ which positions

    def _widths(self) -> Iterator[int]:
        """For each step, the most masked positions that a row has in its block.

        Under the rule "count" they are known before; else a number comes from the device after each step.
        """
        if self.config.unmasking_rule == "count" and not self.config.early_stop:
            yield from _planned_widths(self.canvas.infilled, self.config)
            return
        for _ in range(self.canvas.width):  # each step commits at least one token a row
            width = int(self._in_block(advance=False).sum(1).max())
            if width == 0:
                return
            yield width

    def _bounds(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Begin and end of each row's block, the one of its first masked position: the prompt, or one of new tokens."""
        first, starts = masked.to(torch.int8).argmax(1), self.canvas.starts
        length = self.config.block_length or max(self.config.max_new_tokens, 1)
        begin = starts + (first - starts) // length * length
        prompt = first < starts
        return torch.where(prompt, 0, begin), torch.where(prompt, starts, begin + length)

    def _in_block(self, advance: bool = True) -> Tensor:  # bool [B, W]
        """The positions that may be chosen now. `advance` notes which rows begin a block."""
        columns = self.canvas.columns
        masked = self.canvas.ids == self.mask_token_id
        begin, end = self._bounds(masked)
        masked &= (columns >= begin[:, None]) & (columns < end[:, None])
        if advance:
            fresh = begin != self.block
            self.step_in_block = torch.where(fresh, 0, self.step_in_block + 1)
            self.masks_in_block = torch.where(fresh, masked.sum(1), self.masks_in_block)
            self.block, self.end = begin, end
        return masked

    def _rows(self, masked: Tensor, width: int) -> Tensor:  # int64 [R], -1 for none
        """Flat positions b·W + l of the chosen rows: `width` a sequence, known without asking the device."""
        total = self.canvas.width
        places = torch.where(masked, self.canvas.columns, total).sort(1).values[:, :width]
        firsts = torch.arange(len(masked), device=masked.device)[:, None] * total
        rows = torch.where(places < total, firsts + places, -1).flatten()
        return rows[rows >= 0] if self.on_cpu else rows

    # ------------------------------------------------------------------------------------------ one step

    def _step(self, masked: Tensor, width: int, step: int) -> None:
        canvas, config = self.canvas, self.config
        rows = self._rows(masked, width)
        sample = self._sample(rows, step)
        unmask_(
            canvas.ids,
            sample,
            self.mask_token_id,
            rule=config.unmasking_rule,
            order=config.unmasking_order,
            rows=rows,
            block_start=self.block,
            block_end=self.end,
            seed=self.seed,
            step=step,
            sequence_ids=canvas.sequence_ids,
            **self._rule_number(),
        )
        if config.early_stop:
            self._end_rows()

    def _rule_number(self) -> dict[str, float | Tensor]:
        rule, steps = self.config.unmasking_rule, self.config.steps_per_block
        if rule == "count":
            if steps is None:
                return dict(count=1)
            extra = self.step_in_block < self.masks_in_block % steps
            return dict(count=(self.masks_in_block // steps + extra).clamp(min=1))
        if rule == "ancestral":  # mask rates 1, 1 - 1/S, …, 0
            if steps is None:
                steps = self.config.block_length or self.config.max_new_tokens
            return dict(probability=1 / (steps - self.step_in_block).clamp(min=1).double())
        return {rule: self.config.rule_number}

    def _sample(self, rows: Tensor, step: int) -> TokenSample:
        """Predicts the tokens at flat positions."""
        canvas, config, model = self.canvas, self.config, self.model
        safe = rows.clamp(min=0)
        sequences, positions = safe // canvas.width, safe % canvas.width
        source = safe
        if model.config.logit_shift:  # state i predicts token i + 1, and state 0 token 0
            source = sequences * canvas.width + (positions - 1).clamp(min=0)
        options = dict(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            suppress_tokens=self.suppressed,
            seed=self.seed,
            step=step,
            sequence_ids=canvas.sequence_ids[sequences],
            positions=positions,
            invalid="raise" if self.on_cpu else "flag",  # to raise, the device would have to be waited for
        )
        weight, bias = model.head_weight, model.head_bias
        guided = config.guidance_scale != 1
        states = self._hidden_states(guided).flatten(0, 1)
        if not guided:
            return lm_head_sample(states[source], weight, bias, **options)
        both = functional.linear(states[torch.cat([source, source + canvas.ids.numel()])], weight, bias)
        conditional, unconditional = both.chunk(2)
        return sample_tokens(unconditional + config.guidance_scale * (conditional - unconditional), **options)

    def _hidden_states(self, guided: bool) -> Tensor:  # [B or 2B, W, D]
        ids, mask, inputs = self.canvas.ids, self.canvas.attention_mask, {}
        if self.model.config.timestep_embedding:
            left = (ids == self.mask_token_id).sum(1)
            inputs["timesteps"] = left / self.generated
        if guided:
            ids = torch.cat([ids, ids.masked_fill(self.canvas.given, self.mask_token_id)])
            mask = None if mask is None else mask.repeat(2, 1)
            inputs = {name: t.repeat(2) for name, t in inputs.items()}
        self.forward_passes += 1
        return self.model.hidden_states(ids, mask, **inputs)

    def _end_rows(self) -> None:
        """Rows whose block is full and holds an end token are filled with the first such token."""
        canvas = self.canvas
        inside = (canvas.columns >= self.block[:, None]) & (canvas.columns < self.end[:, None])
        inside &= self.block[:, None] >= canvas.starts[:, None]  # not an end token of the prompt
        masked = canvas.ids == self.mask_token_id
        ends = inside & torch.isin(canvas.ids, self.end_tokens)
        ended = ends.any(1) & ~(inside & masked).any(1)
        token = canvas.ids.gather(1, ends.to(torch.int8).argmax(1, keepdim=True))
        canvas.ids.copy_(torch.where(masked & ended[:, None], token, canvas.ids))


def _on_cpu(device: torch.device) -> bool:
    """Whether asking for a number costs nothing: then rows are packed, and errors raised where they arise."""
    return device.type == "cpu"


def _planned_widths(infilled: list[int], config: MaskedDiffusionGenerationConfig) -> list[int]:
    """Masked positions of the current block before each step, the most of any row, under the rule "count"."""
    steps = config.steps_per_block
    length = config.block_length or config.max_new_tokens
    plan: list[int] = []
    for count in set(infilled):
        row = []
        for masks in [count] + [length] * config.num_blocks:
            left, total = masks, steps or masks
            for step in range(min(masks, total)):
                row.append(left)
                left -= masks // total + (step < masks % total)
        plan += [0] * (len(row) - len(plan))
        plan[: len(row)] = [max(pair) for pair in zip(plan, row, strict=False)]
    return plan


def _end_tokens(model: torch.nn.Module, config: MaskedDiffusionGenerationConfig) -> Tensor | None:
    if not config.early_stop:
        return None
    tokens = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
    if tokens is None:
        raise ValueError("early_stop: neither the generation config nor the model has an eos_token_id; set it")
    return torch.tensor([tokens] if isinstance(tokens, int) else list(tokens), device=model.head_weight.device)


def _check(
    model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor | None, config: MaskedDiffusionGenerationConfig
) -> Tensor | None:  # bool [B, P]
    """Checks what the model itself would say late, or not say; returns the mask as bool."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64 or input_ids.ndim != 2:
        got = type(input_ids).__name__
        if isinstance(input_ids, Tensor):
            got = f"{input_ids.dtype} of shape {list(input_ids.shape)}"
        raise TypeError(f"input_ids: got {got}; expected an int64 tensor [B, P]")
    if not input_ids.numel():
        raise ValueError(
            f"input_ids: got shape {list(input_ids.shape)}, an empty prompt; pass at least one token, such as BoS"
        )
    length = input_ids.shape[1]
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape or attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask: got {attention_mask.dtype} of shape {list(attention_mask.shape)}; expected bool or "
                f"0/1 integers {list(input_ids.shape)}"
            )
        attention_mask = attention_mask.bool()
        lengths = attention_mask.sum(1)
        shortest, length = int(lengths.min()), int(lengths.max())
        if shortest == 0:
            row = int(lengths.argmin())
            raise ValueError(f"attention_mask: row {row} has no token, an empty prompt; pass at least one, such as BoS")
    longest = model.config.max_position_embeddings
    if length + config.max_new_tokens > longest:
        raise ValueError(
            f"input_ids: got a prompt of {length} tokens and max_new_tokens = {config.max_new_tokens}; expected at "
            f"most max_position_embeddings = {longest} together: shorten the prompt or ask for fewer tokens"
        )
    vocab = model.config.vocab_size
    for token in config.suppress_tokens or ():
        if token >= vocab:
            raise ValueError(f"suppress_tokens: got {token}; expected 0 to {vocab - 1}")
    return attention_mask
