"""Decoding of masked diffusion language models, block by block, with no work for tokens that cannot be chosen.

The loop is LLaDA's (Nie et al. 2025): predict all masked tokens, keep the best of the current block, repeat; with its
classifier-free guidance. The rules of parallel unmasking are those of `fastdiff.ops.unmask_`. What differs from the
published loop changes no result: the model's last block, head, softmax and sampling run only on positions that are
masked and lie in the current block, without a full softmax in memory, finished rows leave the batch, and tokens are
committed on the device.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.device import evaluating
from fastdiff.diffusion.guidance import guide
from fastdiff.generation.canvas import Canvas, padding_last
from fastdiff.generation.checks import check_encoder_inputs, check_prompts, check_types, condition_names
from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.length import LengthPredictor, mean_embedding
from fastdiff.generation.passes import Passes, Predicting, on_cpu, probed
from fastdiff.generation.rows import ActiveRows, Turn, planned_turns
from fastdiff.generation.scores import draw_and_score, needs_logits, with_noise
from fastdiff.generation.stopping import Stopping
from fastdiff.generation.windows import PredictedWindows, buckets, default_predictor, predict_windows
from fastdiff.ops import TokenSample, lm_head_sample, sample_tokens, unmask_

Streamer = Callable[[Tensor, int], None]


@dataclass
class GenerationStatistics:
    """What a call cost.

    Attributes:
        forward_passes: passes of the model; a guided one sees twice the batch.
        tokens: tokens chosen, without those that fill a row which ended early.
        seconds: duration of the call.
        short_passes: how many of the passes computed only the columns that a cache lacks.
        probe_passes: how many of the passes predicted lengths (0 for length="fixed", as all that follow).
        window_tokens, saved_tokens: new tokens that rows of max_new_tokens would have had, and how many of them the
            predicted windows saved.
        extended_rows: rows that grew.
    """

    forward_passes: int
    tokens: int
    seconds: float
    short_passes: int = 0
    probe_passes: int = 0
    window_tokens: int = 0
    saved_tokens: int = 0
    extended_rows: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows per second."""
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
    *,
    length_predictor: LengthPredictor | None = None,
    copies: Sequence[int] | None = None,
    tokenizer: Any = None,
    encoder_input_ids: Tensor | None = None,  # int64 [B, M]
    encoder_attention_mask: Tensor | None = None,  # bool or 0/1 [B, M]
    encoder_hidden_states: Tensor | None = None,  # [B, M, cross_attention_dim]
) -> GenerationOutput:
    """Continues prompts, and fills mask tokens in them.

    A row gives the same tokens alone, in any batch, and in any order of rows, but for what rounding decides (another
    batch is another matrix product). Copies of a prompt in one batch draw differently.

    Args:
        model: a `fastdiff.models.MaskedDiffusionLM`, or one wrapped by peft.
        input_ids: the prompts. Mask tokens in them are filled first, before the blocks of new tokens. An id of -1
            (`fastdiff.data.MASK_WORD`) is the mask token as a word of the text, for models whose mask token is one
            (DiffuGPT): the model sees the mask token, and it stays.
        attention_mask: True or 1 where a token counts; prompts may be padded on the left or the right.
        generation_config: None is `MaskedDiffusionGenerationConfig()`.
        streamer: called after each step as streamer(token_ids, step): a new tensor laid out as `sequences`, with mask
            tokens where nothing was chosen yet, and the number of the step from 0.
        length_predictor: predicts lengths for length="auto"; its coverage must be the config's. None is the rule "cdf"
            with a window of max_new_tokens, uncalibrated: it takes the model at its word.
        copies: which copy of its prompt each row is (0 or above), where copies are spread over several calls; None
            counts those in the batch.
        tokenizer: a tokenizer of transformers, which decodes tokens where `stop_strings` are looked for.
        encoder_input_ids: one text per row for the model's own encoder, encoded once, that every pass attends to.
            Guidance hides it together with the prompt.
        encoder_attention_mask: True or 1 where it counts; padded on the left or the right.
        encoder_hidden_states: states of another encoder instead.

    Returns:
        GenerationOutput: `sequences[:, :P]` are the prompts (padding as it came, mask tokens filled),
        `sequences[:, P:]` the new tokens. A row that length="auto" gave less has end tokens behind them.

    A model with a timestep embedding gets, for each row, the time at which its `mask_schedule` would mask that row's
    current share of tokens (MDLM's sampler tells it the time of the step).

    Raises:
        TypeError, ValueError: an argument does not fit, a prompt is empty or too long, nothing is to be generated, or
            the model's logits have NaN; the message names it.
    """
    count = len(input_ids) if isinstance(input_ids, Tensor) and input_ids.ndim else None
    check_types(model, generation_config, streamer, tokenizer, copies, count)
    config = MaskedDiffusionGenerationConfig() if generation_config is None else generation_config
    config.validate()
    attention_mask = check_prompts(model, input_ids, attention_mask, config)
    encoder_mask = check_encoder_inputs(
        model, len(input_ids), encoder_input_ids, encoder_attention_mask, encoder_hidden_states
    )
    predictor = _predictor(model, config, length_predictor)
    ends = None if predictor is None else predictor.end_token_ids
    stopping = Stopping(model, config, tokenizer, at_once=ends)
    started = time.perf_counter()
    with evaluating(model):
        names = condition_names(encoder_input_ids, encoder_mask, encoder_hidden_states)
        prompt_mean = None
        if encoder_input_ids is not None:
            if encoder_mask is not None:
                encoder_input_ids = padding_last(encoder_input_ids, encoder_mask)
                encoder_mask = padding_last(encoder_mask, encoder_mask)
            prompt_mean = mean_embedding(model, encoder_input_ids, encoder_mask)
            encoder_hidden_states = model.encode(encoder_input_ids, encoder_mask)
        context = (encoder_hidden_states, encoder_mask)
        predicted = None
        if predictor is not None:
            predicted = predict_windows(predictor, config, input_ids, attention_mask, *context, prompt_mean)
        canvas = Canvas(
            input_ids,
            attention_mask,
            config.max_new_tokens,
            model.config.mask_token_id,
            model.config.pad_token_id,
            names,
            copies,
            windows=None if predicted is None else predicted.windows,
            end_token_id=None if predicted is None else predictor.end_token_ids[0],
            keep_tokens=config.cfg_keep_tokens or (),
        )
        decoding = _Decoding(model, canvas, config, stopping, context, predicted)
        for step, _ in enumerate(decoding.steps()):
            if streamer is not None:
                decoding.rows.write_back()
                streamer(canvas.sequences(), step)
    left = int((canvas.ids == canvas.mask_token_id).sum())  # waits for the device
    if left:
        raise ValueError("logits: the model gave no distribution at some position: all -inf, or NaN or +inf")
    return GenerationOutput(canvas.sequences(), decoding.statistics(time.perf_counter() - started))


def _predictor(
    model: torch.nn.Module, config: MaskedDiffusionGenerationConfig, given: LengthPredictor | None
) -> LengthPredictor | None:
    if given is None:
        return default_predictor(model, config)
    if not isinstance(given, LengthPredictor):
        raise TypeError(f"length_predictor: got a {type(given).__name__}; expected a LengthPredictor, or None")
    if config.length == "fixed":
        raise ValueError('length_predictor: got one with length="fixed"; set length="auto", or leave it out')
    if given.model is not model or given.coverage != config.coverage:
        what = "of another model" if given.model is not model else f"of coverage {given.coverage}"
        raise ValueError(f"length_predictor: got one {what}; expected this model's, of coverage {config.coverage}")
    return given


class _Decoding:
    """One call: the canvas, decoded all at once, or bucket after bucket of rows that grow until they have ended."""

    def __init__(
        self,
        model: torch.nn.Module,
        canvas: Canvas,
        config: MaskedDiffusionGenerationConfig,
        stopping: Stopping,
        context: tuple[Tensor | None, Tensor | None],
        predicted: PredictedWindows | None,
    ) -> None:
        if not sum(canvas.generated):
            raise ValueError("max_new_tokens: got 0 for prompts without mask tokens; nothing is to be generated")
        self.model, self.canvas, self.config = model, canvas, config
        self.stopping, self.context, self.predicted = stopping, context, predicted
        self.seed = int(torch.randint(2**63 - 1, ())) if config.seed is None else config.seed
        self.passes = self.short_passes = 0
        self.extended: set[int] = set()

    def steps(self) -> Iterator[None]:
        """Decodes, a step at a time; `rows` are those under way."""
        if self.predicted is None:
            return (yield from self._decode(None, None, None))
        pending, blocks = list(range(len(self.canvas.ids))), None
        states = self.predicted.states if self.config.reuse_probe else None
        while pending:
            windows = [self.canvas.windows[row] for row in pending]
            lengths = [self.canvas.prompt_lengths[row] + window for row, window in zip(pending, windows, strict=True)]
            for bucket in buckets(lengths, windows if blocks is None else blocks):
                rows = [pending[place] for place in bucket]
                yield from self._decode(rows, None if blocks is None else [blocks[place] for place in bucket], states)
            pending, states = self._unended(pending), None
            blocks = self.canvas.grow(pending, self.config.growth)
            self.extended.update(pending)

    def _decode(self, rows: list[int] | None, blocks: list[int] | None, states: Tensor | None) -> Iterator[None]:
        self.rows = ActiveRows.begin(self.canvas, self.config, *self.context, self.seed, rows, blocks)
        decoder = _Decoder(self.model, self.rows, self.config, self.stopping, self.seed, states)
        yield from decoder.steps()
        self.passes, self.short_passes = self.passes + decoder.passes.count, self.short_passes + decoder.passes.short

    def _unended(self, rows: list[int]) -> list[int]:
        """Those without an end token that have room to grow."""
        canvas, room = self.canvas, self.config.max_new_tokens
        inside = canvas.used & (canvas.columns >= canvas.window_start[:, None])
        ended = self.stopping.ends(canvas.ids, inside).any(1).tolist()
        return [row for row in rows if not ended[row] and canvas.windows[row] < room]

    def statistics(self, seconds: float) -> GenerationStatistics:
        canvas, tokens = self.canvas, sum(self.canvas.generated) - int(self.stopping.filled)
        if self.predicted is None:
            return GenerationStatistics(self.passes, tokens, seconds, self.short_passes)
        whole, probing = len(canvas.ids) * self.config.max_new_tokens, self.predicted.passes
        saved = whole - sum(canvas.windows)
        return GenerationStatistics(
            self.passes + probing, tokens, seconds, self.short_passes, probing, whole, saved, len(self.extended)
        )


class _Decoder:
    """Rows of the canvas that are under way together. Finished ones leave.

    `states` `[B, W, D]`, those of the probe, are the first step where no row has masks in its prompt.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: ActiveRows,
        config: MaskedDiffusionGenerationConfig,
        stopping: Stopping,
        seed: int,
        states: Tensor | None,
    ) -> None:
        self.model, self.rows, self.config, self.stopping, self.seed = model, rows, config, stopping, seed
        self.passes, canvas = Passes(model, config), rows.canvas
        self.states = None if any(canvas.prompt_masks[row] for row in rows.canvas_rows) else states
        self.suppressed = tuple({canvas.mask_token_id, *(config.suppress_tokens or ())})
        self.plan: list[list[Turn]] | None = None
        if config.unmasking_rule == "count" and not stopping.active:
            prompts = zip(canvas.prompt_masks, canvas.prompt_lengths, strict=True)
            self.plan = [planned_turns(masks, length, config) for masks, length in prompts]

    def steps(self) -> Iterator[None]:
        """Decodes, a step at a time."""
        for step in range(self.rows.canvas.width):  # each step commits at least one token per row
            masked = self.rows.begin_step()
            turns = self._turns(masked, step)
            kept = [row for row, turn in enumerate(turns) if turn is not None]
            if not kept:
                break
            if len(kept) < len(turns):
                places, width = self.rows.keep(kept)
                self.passes.keep(len(turns), places, width)
                masked, turns = masked.index_select(0, places)[:, :width], [turns[row] for row in kept]
            if step == 0 and self.states is not None:
                predicting = probed(self.rows, masked, self.states)
            else:
                predicting = self.passes(self.rows, masked, turns)
            self._step(predicting, step, turns)
            yield
        self.rows.write_back()

    def _turns(self, masked: Tensor, step: int) -> list[Turn | None]:
        """Where each row is, None for those that are finished.

        Under the rule "count" that is known before; else numbers come from the device after each step.
        """
        if self.plan is None:
            return [turn if turn.masks_left else None for turn in self.rows.turns(masked)]
        plans = (self.plan[row] for row in self.rows.canvas_rows)
        return [plan[step] if step < len(plan) else None for plan in plans]

    def _step(self, predicting: Predicting, step: int, turns: list[Turn]) -> None:
        rows, config = self.rows, self.config
        sample = self._sample(predicting, step)
        order = config.unmasking_order
        safe = predicting.positions.clamp(min=0)
        if config.alg_temp:
            places = (rows.sequence_ids[safe // rows.width], safe % rows.width)
            sample, order = with_noise(sample, order, config.alg_temp, self.seed, step, *places), "confidence"
        unmask_(
            rows.ids,
            sample,
            rows.mask_token_id,
            order=order,
            rows=predicting.positions,
            block_start=rows.block_start,
            block_end=rows.block_end,
            seed=self.seed,
            step=step,
            sequence_ids=rows.sequence_ids,
            **self._rule(turns),
        )
        if self.stopping.active:
            self.stopping(rows)

    def _rule(self, turns: list[Turn]) -> dict[str, str | float | Tensor]:
        """The operator's rule and its number."""
        rule = self.config.unmasking_rule
        if rule == "ancestral":  # what is predicted is what chance commits in this step
            return dict(rule="count", count=self.rows.width)
        if rule != "count":
            return {"rule": rule, rule: self.config.rule_number}
        counts = [turn.count for turn in turns]
        same = len(set(counts)) == 1
        return dict(rule=rule, count=counts[0] if same else torch.tensor(counts, device=self.rows.ids.device))

    def _sample(self, predicting: Predicting, step: int) -> TokenSample:
        """Head and draw at flat positions."""
        config, rows = self.config, self.rows
        safe = predicting.positions.clamp(min=0)
        drawing = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        options = dict(
            seed=self.seed,
            step=step,
            sequence_ids=rows.sequence_ids[safe // rows.width],
            positions=safe % rows.width,
            invalid="raise" if on_cpu(safe.device) else "flag",  # to raise, the device would have to be waited for
        )
        weight, bias = self.model.head_weight, self.model.head_bias
        if predicting.unconditional is not None:
            both = functional.linear(torch.cat([predicting.states, predicting.unconditional]), weight, bias)
            logits = guide(*both.chunk(2), config.guidance_scale)
        elif needs_logits(config):
            logits = functional.linear(predicting.states, weight, bias)
        else:
            return lm_head_sample(
                predicting.states, weight, bias, suppress_tokens=self.suppressed, **drawing, **options
            )
        if needs_logits(config):
            return draw_and_score(logits, config, self.suppressed, **options)
        return sample_tokens(logits, suppress_tokens=self.suppressed, **drawing, **options)
