"""Captions of images' states: how they are decoded, in batches, and as a picture shows them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.data.text_codec import TextCodec
from fastdiff.device import autocast
from fastdiff.generation import Continuation, MaskedDiffusionGenerationConfig, TextGenerator
from fastdiff.visualization.text import TextSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.generation.length import LengthPredictor


def start_token(codec: TextCodec) -> int:
    """What captions begin with: BoS; where a tokenizer has none, the EoS that closes a text before."""
    return codec.start[0] if codec.bos_token_id is None else codec.bos_token_id


class Captioner:
    """A language model, its tokenizer and a way of decoding, to write captions with.

    Args:
        model: a `fastdiff.models.MaskedDiffusionLM` with cross-attention.
        tokenizer: its tokenizer.
        decoding: fields of `MaskedDiffusionGenerationConfig`. Guidance hides the image alone: the token that texts
            begin with stays, as in training.
        length_predictor: of length="auto"; None is the rule "cdf", uncalibrated.

    Raises ValueError for options that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        decoding: Mapping[str, Any],
        length_predictor: "LengthPredictor | None" = None,
    ) -> None:
        config = MaskedDiffusionGenerationConfig(**decoding)
        plain = TextGenerator(model, tokenizer, config, length_predictor)
        self.start = start_token(plain.codec)
        if config.guidance_scale != 1:
            config.cfg_keep_tokens = [*(config.cfg_keep_tokens or ()), self.start]
            plain = TextGenerator(model, tokenizer, config, plain.length_predictor)
        self.generator = plain
        plain.check([self.start], "captions")

    def __call__(self, names: Sequence[str], states: Sequence[Tensor], **options: Any) -> Iterator[list[Continuation]]:
        """Captions, a batch at a time: the first image's num_samples, then the second's, …

        Args:
            names: what the images are called: the `prompt` of their captions.
            states: [M, C] of each image.
            options: those of `TextGenerator.generate`.
        """
        return self.generator.generate(names, [[self.start]] * len(states), encoder_states=states, **options)


def text_samples(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    states: Tensor,  # [N, M, C]
    decoding: Mapping[str, Any],
    *,
    num_samples: int = 1,
    dtype: torch.dtype | None = None,
) -> list[TextSample]:
    """Captions of images, each token with the step that chose it.

    Args:
        states: of the images.
        decoding: as of `Captioner`.
        num_samples: captions of each image.
        dtype: what the model computes in; None is the dtype of its weights.
    """
    captioner = Captioner(model, tokenizer, decoding)
    with autocast(model.device, dtype):
        batches = list(captioner([""] * len(states), list(states), num_samples=num_samples, record_steps=True))
    pieces = captioner.generator.pieces
    return [TextSample("", pieces(each.tokens), each.steps) for batch in batches for each in batch]
