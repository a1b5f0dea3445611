"""The recipe of a masked diffusion language model."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastdiff.data.text_config import TextDataConfig, TokenizerConfig
from fastdiff.diffusion.masked import MaskedDiffusionConfig
from fastdiff.errors import named
from fastdiff.training.config import TrainingConfig


@dataclass
class LanguageModelConfig:
    """Shape of the model; vocabulary and special tokens come from the tokenizer.

    Attributes:
        init_from: folder or hub id of a checkpoint to go on from, in any layout of `MaskedDiffusionLM.from_pretrained`,
            such as "gpt2"; then its shape counts, and the other fields but dropout are not used. null: random
            weights.
        mask_token_id: the mask token of `init_from`, where neither its configuration nor its tokenizer has a mask
            token; an id behind its vocabulary (its size) is added. null: the checkpoint's own (OpenAI's GPT-2: 10541).
        architecture: "mdlm", "llada", "dream", "llama" or "gpt2".
        size: "tiny", "small", "medium", "large" or "xlarge": 256, 384, 512, 640, 768 wide; see hidden_size.
        hidden_size, num_hidden_layers, num_attention_heads: replace those of `size`.
        max_position_embeddings: longest sequence, prompt included.
        position_embedding: "learned" or "rope"; null is the architecture's.
        timestep_embedding: whether the time is an input of the model.
        num_encoder_layers: above 0, the condition of a sample (its prompt, or the sentences given) goes through an
            encoder of so many blocks and cross-attention, instead of standing before the answer.
        dropout: probability.
    """

    init_from: str | None = None
    mask_token_id: int | None = None
    architecture: str = "mdlm"
    size: Literal["tiny", "small", "medium", "large", "xlarge"] = "tiny"
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    max_position_embeddings: int = 512
    position_embedding: Literal["learned", "rope"] | None = None
    timestep_embedding: bool = False
    num_encoder_layers: int = 0
    dropout: float = 0.0


@dataclass
class ObjectiveConfig:
    """What the loss is beside the diffusion.

    Attributes:
        normalizer: what the sum of weighted cross entropies is divided by: "masked_tokens", "all_tokens" (all that may
            be masked, masked or not: B·L for packed windows, which with weights 1/t is the likelihood bound per token)
            or "answer" (each sample's sum by its answer's window, fill included, then the mean; LLaDA's instruction
            tuning).
        fully_masked_fraction: share of the samples whose tokens are all masked (time 1), as decoding begins.
        end_masking: how pairs' EoS and what fills the window behind it are masked: "as_text" like the answer,
            "always" (so that the model never sees where an answer ends, as at the first step of decoding; dLLM-Var), or
            "visible" (the EoS is never masked: the model learns to write to a length that is given). With
            fully_masked_fraction 1 the last two are diffusion-llms' fine-tuning on prompt + mask + EoS + mask.
        loss_on_first_token: whether the first token of a window counts when it is masked. Where logits are shifted by
            one (architectures "dream", "llama", "gpt2") it is predicted from its own state, as in dllm's Dream (true);
            the trainers of Dream and DiffuLLaMA leave it out (false; the validation bound then takes it as given). null
            is true.
        annealing_steps: steps over which attention goes from causal to bidirectional (adaptation of autoregressive
            models, Gong et al. 2025); 0 is bidirectional from the start.
        likelihood_samples: Monte-Carlo draws of the validation bound, spread over the held-out texts.
    """

    normalizer: Literal["masked_tokens", "all_tokens", "answer"] = "all_tokens"
    fully_masked_fraction: float = 0.0
    end_masking: Literal["as_text", "always", "visible"] = "as_text"
    loss_on_first_token: bool | None = None
    annealing_steps: int = 0
    likelihood_samples: int = 512

    def __post_init__(self):
        if not 0 <= self.fully_masked_fraction <= 1:
            raise ValueError(
                f"{named('fully_masked_fraction')}: got {self.fully_masked_fraction}; expected a number from 0 to 1"
            )
        if self.annealing_steps < 0:
            raise ValueError(f"{named('annealing_steps')}: got {self.annealing_steps}; expected 0 or more")
        if self.likelihood_samples < 2:
            raise ValueError(f"{named('likelihood_samples')}: got {self.likelihood_samples}; expected at least 2")


@dataclass
class TextSamplingConfig:
    """How a run's samples are generated, where a command does not say otherwise.

    Attributes:
        prompts: prompts of samples.png; where empty, held-out ones if the data has pairs. An empty one begins a
            text.
        generation: options of `fastdiff.generation.MaskedDiffusionGenerationConfig`.
    """

    prompts: list[str] = field(default_factory=list)
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        from fastdiff.generation import MaskedDiffusionGenerationConfig

        MaskedDiffusionGenerationConfig(**self.generation)


@dataclass
class MaskedLMRecipe:
    """Everything a run of fastdiff.train on text is made from.

    Attributes:
        task: names the kind of recipe.
        model: the language model.
        diffusion: mask rate, times and weight.
        tokenizer: text to tokens.
        data: the text.
        objective: the loss.
        training: the course of training.
        sampling: samples of text.
    """

    task: Literal["masked_lm"] = "masked_lm"
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    diffusion: MaskedDiffusionConfig = field(default_factory=MaskedDiffusionConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: TextDataConfig = field(default_factory=TextDataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: TextSamplingConfig = field(default_factory=TextSamplingConfig)
