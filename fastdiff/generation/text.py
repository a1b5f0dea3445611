"""From text to text: prompts as tokens, batches and copies of them, and samples as text again."""

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.data.text_codec import TextCodec
from fastdiff.data.tokenization import ids_without_text
from fastdiff.generation.canvas import padded
from fastdiff.generation.checks import condition_names
from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.decoding import GenerationStatistics, Streamer, generate
from fastdiff.generation.length import LengthPredictor
from fastdiff.generation.windows import default_predictor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Continuation:
    """A prompt's new text.

    Attributes:
        prompt: the prompt as it was given.
        row, copy: which prompt of the call, and which of its samples.
        tokens: the new tokens, cut before the first end token.
        text: the new tokens as text, special tokens left out.
        filled: the prompt with its mask tokens filled, as text; None where it had none.
        steps: the step that chose each of `tokens`, from 0; None where steps were not recorded.
    """

    prompt: str
    row: int
    copy: int
    tokens: list[int]
    text: str
    filled: str | None
    steps: list[int] | None = None


class StepRecorder:
    """A streamer that notes which step chose each token.

    `steps`, int64 `[B, L]`, has the step from 0 for each column of the result, and -1 where no token is chosen yet.
    """

    def __init__(self, mask_token_id: int, next_streamer: Streamer | None = None) -> None:
        self.mask_token_id, self.next_streamer = mask_token_id, next_streamer
        self.steps: Tensor | None = None

    def __call__(self, token_ids: Tensor, step: int) -> None:
        """Notes a step, and hands it on."""
        if self.steps is None:
            self.steps = torch.full_like(token_ids, -1)
        chosen = token_ids != self.mask_token_id
        self.steps = torch.where(chosen & (self.steps < 0), step, self.steps).masked_fill(~chosen, -1)  # rows may grow
        if self.next_streamer is not None:
            self.next_streamer(token_ids, step)


class TextGenerator:
    """A model and its tokenizer, to generate text with.

    Args:
        model: a `fastdiff.models.MaskedDiffusionLM`.
        tokenizer: its tokenizer. The model's mask token counts: where the tokenizer has none, "<mask>" stands for it in
            prompts.
        config: how to decode; validated here. Ids that the tokenizer does not have, such as those of a padded
            vocabulary, are never chosen either.
        length_predictor: predicts lengths where config.length is "auto"; None is the rule "cdf", uncalibrated.

    `codec` turns text into ids and back; `silent_token_ids` are those that decode to nothing; `statistics` adds up what
    was generated so far.

    Raises:
        ValueError: an option that does not fit, or a model whose answers have no known end.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        config: MaskedDiffusionGenerationConfig,
        length_predictor: LengthPredictor | None = None,
    ) -> None:
        config.validate()
        length_predictor = length_predictor or default_predictor(model, config)
        self.length_predictor = length_predictor
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.codec = TextCodec(tokenizer, model.config)
        self.mask_token_id, self.mask_text = self.codec.mask_token_id, self.codec.mask_text
        self.end_token_ids = self.codec.end_token_ids
        if config.eos_token_id is not None:
            ends = config.eos_token_id
            self.end_token_ids = (ends,) if isinstance(ends, int) else tuple(ends)
        if length_predictor is not None:
            self.end_token_ids = tuple({*self.end_token_ids, *length_predictor.end_token_ids})
        self.statistics = GenerationStatistics(0, 0, 0.0)
        own, self._decoding = model.config, copy.deepcopy(config)
        fill = (own.pad_token_id,) if own.length_format == "pad_fill" else ()
        # those that end a text or fill it up need none
        self.silent_token_ids = ids_without_text(tokenizer, own.vocab_size, {*self.end_token_ids, *fill})
        if self.silent_token_ids:
            self._decoding.suppress_tokens = [*(config.suppress_tokens or ()), *self.silent_token_ids]

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are conditions, seen through an encoder, rather than the beginning of the text."""
        return self.model.config.num_encoder_layers > 0

    def encode(self, prompts: Sequence[str], *, chat: bool = False, unconditional: bool = False) -> list[list[int]]:
        """Token ids of prompts, checked.

        Args:
            chat: each prompt is a user's message, put into the tokenizer's chat template.
            unconditional: an empty prompt is the beginning of a text, as `TextCodec.start` says.

        Raises:
            ValueError: no or an empty prompt, one that leaves no room for the new tokens, a tokenizer without chat
                template, mask tokens where they cannot be filled; the message names the prompt.
        """
        if not prompts:
            raise ValueError("prompts: got none; pass at least one")
        rows = self.codec.encode_chats(prompts) if chat else [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            try:
                rows[i] = rows[i] if chat else self.codec.encode_prompt(prompt)
            except ValueError as error:
                raise ValueError(f"prompt {i + 1}: {error}") from None
            rows[i] = rows[i] or self._start(f"prompt {i + 1}", unconditional)
            self.check(rows[i], f"prompt {i + 1}")
        return rows

    def _start(self, name: str, unconditional: bool) -> list[int]:
        """What an empty prompt is."""
        advice = "expected at least one token"
        if self.codec.start and not self.has_encoder:
            if unconditional:
                return list(self.codec.start)
            advice += ", or unconditional (--unconditional), which begins a text"
        raise ValueError(f"{name}: got no text; {advice}")

    def check(self, ids: Sequence[int], name: str) -> None:
        """Raises ValueError, naming the prompt, where its tokens leave no room or nothing to generate."""
        masks, longest = list(ids).count(self.mask_token_id), self.model.config.max_position_embeddings
        if self.has_encoder and masks:
            raise ValueError(f"{name}: got mask tokens; this model's prompts go through an encoder, which fills none")
        if not self.config.max_new_tokens and not masks:
            raise ValueError(
                f"{name}: got no mask token {self.mask_text}, and max_new_tokens is 0: nothing to generate"
            )
        taken, room = 1 if self.has_encoder else len(ids), self.config.max_new_tokens
        if self.length_predictor is not None:  # its pass is over the window that it was calibrated on
            room = max(room, self.length_predictor.window)
        if len(ids) > longest or taken + room > longest:
            what = "max_new_tokens is" if room == self.config.max_new_tokens else "the length predictor's window is"
            raise ValueError(
                f"{name}: got {len(ids)} tokens, and {what} {room}; expected at most "
                f"{longest} together, the model's positions: shorten the prompt or ask for fewer tokens"
            )

    @property
    def start_token_id(self) -> int | None:
        """What the answers of a model with an encoder begin with: BoS, the model's, else the tokenizer's; or None."""
        return self.codec.bos_token_id

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens; half characters become U+FFFD."""
        return self.codec.decode(tokens)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token adds, special tokens included; a character of several tokens belongs to its last."""
        pieces, before = [], ""
        for count in range(1, len(tokens) + 1):
            shown = self.codec.decode(tokens[:count], special_tokens=True).rstrip("\ufffd")
            pieces.append(shown[len(before) :])
            before = shown
        return pieces

    def generate(
        self,
        prompts: Sequence[str],
        rows: Sequence[Sequence[int]],
        *,
        num_samples: int = 1,
        batch_size: int = 16,
        streamer: Callable[[Tensor, Tensor], Streamer | None] | None = None,
        cut: bool = True,
        record_steps: bool = False,
        encoder_states: Sequence[Tensor] | None = None,
    ) -> Iterator[list[Continuation]]:
        """Samples, a batch at a time: the first prompt's num_samples, then the second's, …

        A sample depends on seed, prompt, condition and number of the copy (equal ones count on), not on the batch.

        Args:
            prompts, rows: the prompts as text, and as token ids (`encode` makes these).
            num_samples: samples of each prompt.
            batch_size: samples decoded at once.
            streamer: makes the streamer of a batch from its prompts `[B, P]` and their attention mask.
            cut: whether a sample ends before its first end token. Otherwise it has all of its new tokens, as text of
                several documents does.
            record_steps: whether samples say which step chose each token (`Continuation.steps`).
            encoder_states: of each prompt what it is a text about, such as an image's states [M, D]; of one shape.
                Rows are then the beginnings of the texts, such as BoS, and guidance hides these states and the row.

        Raises what `fastdiff.generation.generate` raises, and ValueError for states beside an encoder of text.
        """
        if encoder_states is not None and (self.has_encoder or len(encoder_states) != len(rows)):
            got = "some for a model with an encoder of text" if self.has_encoder else str(len(encoder_states))
            raise ValueError(f"encoder_states: got {got}; expected {len(rows)}, one per prompt")
        seen: dict[tuple[Any, ...], int] = {}
        jobs = []
        for row, ids in enumerate(rows):
            key: tuple[Any, ...] = tuple(ids)
            if encoder_states is not None:
                (name,) = condition_names(None, None, encoder_states[row][None])
                key = (*key, hashlib.sha256(name).digest())
            for number in range(num_samples):
                seen[key] = seen.get(key, -1) + 1
                jobs.append((row, number, seen[key]))
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            states = None if encoder_states is None else torch.stack([encoder_states[row] for row, _, _ in part])
            yield self._batch(part, prompts, rows, streamer, cut, record_steps, states)

    def _batch(
        self, jobs: list[tuple[int, int, int]], prompts, rows, make_streamer, cut: bool, record_steps: bool, states
    ) -> list[Continuation]:
        device = self.model.device
        given = [self.codec.as_seen(rows[row]) if self.has_encoder else rows[row] for row, _, _ in jobs]
        ids, mask = padded(given, device)
        options: dict[str, Any] = {"copies": [copy for _, _, copy in jobs], "length_predictor": self.length_predictor}
        if self.has_encoder:
            if self.start_token_id is None:
                raise ValueError(
                    "bos_token_id: neither model nor tokenizer has one, from which a model with encoder starts; set it"
                )
            options |= {"encoder_input_ids": ids, "encoder_attention_mask": mask}
            ids = torch.full((len(jobs), 1), self.start_token_id, device=device)
            mask = torch.ones_like(ids, dtype=torch.bool)
        elif states is not None:
            options["encoder_hidden_states"] = states.to(device, next(self.model.parameters()).dtype)
        if self.config.stop_strings:
            options["tokenizer"] = self.tokenizer
        streamer = None if make_streamer is None else make_streamer(ids, mask)
        streamer = StepRecorder(self.mask_token_id, streamer) if record_steps else streamer
        output = generate(self.model, ids, mask, self._decoding, streamer, **options)
        done = output.statistics
        self.statistics = GenerationStatistics(
            *(getattr(self.statistics, f.name) + getattr(done, f.name) for f in dataclasses.fields(done))
        )
        chosen = streamer.steps[:, ids.shape[1] :].tolist() if record_steps else [None] * len(jobs)
        samples = []
        for (row, number, _), sequence, real, steps in zip(jobs, output.sequences, mask, chosen, strict=True):
            given, new = sequence[: len(real)][real].tolist(), sequence[len(real) :].tolist()
            if cut:
                new = until_end(new, self.end_token_ids)
            filled = self.decode(given) if self.mask_token_id in rows[row] else None
            steps = None if steps is None else steps[: len(new)]
            samples.append(Continuation(prompts[row], row, number, new, self._new_text(given, new), filled, steps))
        return samples

    def _new_text(self, given: list[int], new: list[int]) -> str:
        before, whole = self.decode(given), self.decode(given + new)
        # decoded together, so that no space or half character is lost where they meet
        return whole[len(before) :] if whole.startswith(before) else self.decode(new)


def until_end(tokens: list[int], end: Sequence[int]) -> list[int]:
    """The tokens before the first end token."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in end), len(tokens))]
