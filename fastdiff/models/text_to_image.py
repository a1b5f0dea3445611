"""A DiT that is told by a text what to draw: through a Q-Former and adaLN, or through cross-attention.

The first way is LLM2DiT's: a Q-Former reads the hidden states of a language model and gives each layer of the DiT a
vector in the place of the class label's. The second is that of latent Fashion-MNIST diffusion: the DiT's blocks attend
to the time and the text. The language model itself is no part of this model: its states come in (`fastdiff.data` keeps
them in files). What a text means to the DiT (`condition`) is computed once a prompt, not once a step.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdiff.models.dit import DiT
from fastdiff.models.dit_config import DiTConfig, preset_config
from fastdiff.models.pretrained import Pretrained, check_overrides
from fastdiff.models.text_to_image_checkpoints import read_published
from fastdiff.nn.checks import bool_mask
from fastdiff.nn.q_former import QFormer, QFormerConfig, StateMix

CONDITIONINGS = ("q_former", "cross_attention")


@dataclass
class TextToImageConfig:
    """Shape and options of a text-to-image model.

    Attributes:
        dit: The DiT. With "cross_attention" its `conditioning` is that, too, and it needs no classes (num_classes 0).
        text_dim: Width of the text states.
        text_states: How many hidden states of each token there are; more than one are mixed by learned weights.
        conditioning: "q_former" (LLM2DiT) or "cross_attention" (latent Fashion-MNIST diffusion).
        q_former: The Q-Former; null with "cross_attention".
        text_embedding_dim: With "cross_attention": the states are embedded in this width before they are projected to
            the DiT's, as a table of class vectors does for one-hot states; null projects them at once.
        text_dropout_prob: Probability with which training replaces a text by no text, for guidance. The caller draws.
    """

    dit: DiTConfig = field(default_factory=DiTConfig)
    text_dim: int = 768
    text_states: int = 1
    conditioning: Literal["q_former", "cross_attention"] = "q_former"
    q_former: QFormerConfig | None = None
    text_embedding_dim: int | None = None
    text_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("text_dim", 1), ("text_states", 1), ("text_embedding_dim", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"TextToImageConfig.{name}: got {value}; expected at least {least}")
        if not 0 <= self.text_dropout_prob <= 1:
            raise ValueError(f"TextToImageConfig.text_dropout_prob: got {self.text_dropout_prob}; expected 0 to 1")
        if self.conditioning not in CONDITIONINGS:
            expected = " or ".join(map(repr, CONDITIONINGS))
            raise ValueError(f"TextToImageConfig.conditioning: got {self.conditioning!r}; expected {expected}")
        crosses = self.conditioning == "cross_attention"
        wanted = "cross_attention" if crosses else "adaln"
        if self.dit.conditioning != wanted:
            raise ValueError(
                f"TextToImageConfig.dit.conditioning: got {self.dit.conditioning!r} with conditioning "
                f"{self.conditioning!r}; expected {wanted!r}"
            )
        if crosses and self.q_former is not None:
            raise ValueError("TextToImageConfig.q_former: got one with conditioning 'cross_attention'; expected null")
        if not crosses and self.text_embedding_dim is not None:
            raise ValueError(
                f"TextToImageConfig.text_embedding_dim: got {self.text_embedding_dim} with conditioning 'q_former'; "
                "expected null"
            )
        if not crosses and self.q_former is None:
            self.q_former = QFormerConfig()
        if not crosses and not self.dit.null_label and self.text_dropout_prob:
            raise ValueError(
                f"TextToImageConfig.text_dropout_prob: got {self.text_dropout_prob} with a DiT without a null label; "
                "expected 0, or dit.null_label True"
            )


PRESETS: dict[str, dict[str, Any]] = {
    # GPT-2's states of one layer; the DiT is frozen, and without a text it is that of the null label
    "llm2dit": dict(text_dim=768, conditioning="q_former", text_dropout_prob=0.0),
    # one-hot classes
    "fmnist_t2i": dict(text_dim=10, conditioning="cross_attention", text_dropout_prob=0.1),
}


class TextToImage(Pretrained):
    """A diffusion transformer conditioned on the hidden states of a text.

    Attributes:
        dit: The DiT. `train: q_former` freezes it by `dit.requires_grad_(False)`.
        q_former: With "q_former": what reads the text. Else None.
        text_proj: With "cross_attention": the states' way to the width of the DiT. Else None.
        mix: The learned mean of the hidden states of several layers, where `text_states` is more than one. Else None.
    """

    config_class = TextToImageConfig
    title = "a text-to-image model"
    free_fields = ("text_dropout_prob",)
    extra_keys = (*Pretrained.extra_keys, "text_encoder", "labelled")

    def __init__(self, config: TextToImageConfig, dit: DiT | None = None) -> None:
        """`dit`: a DiT of `config.dit`; None makes one with random weights."""
        super().__init__()
        self.config = config
        self.dit = DiT(config.dit) if dit is None else dit
        self.mix = StateMix(config.text_states) if config.text_states > 1 else None
        self.q_former, self.text_proj = None, None
        width = config.dit.hidden_size
        if config.conditioning == "q_former":
            self.q_former = QFormer(config.text_dim, config.dit.depth, width, config.q_former)
        elif config.text_embedding_dim is None:
            self.text_proj = nn.Linear(config.text_dim, width)
        else:
            embedding = nn.Linear(config.text_dim, config.text_embedding_dim, bias=False)
            nn.init.normal_(embedding.weight)  # as a table's
            self.text_proj = nn.Sequential(embedding, nn.Linear(config.text_embedding_dim, width))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TextToImage":
        """A model with random weights: "llm2dit" or "fmnist_t2i".

        `overrides` replace fields of `TextToImageConfig`. Raises ValueError for an unknown name and TypeError for an
        unknown field.
        """
        if name not in PRESETS:
            raise ValueError(f"name: got {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(TextToImageConfig(**{"dit": preset_config(name), **PRESETS[name], **overrides}))

    @classmethod
    def from_dit(cls, dit: DiT, config: TextToImageConfig) -> "TextToImage":
        """A model around a trained DiT, which is taken as it is; the rest has random weights.

        Raises ValueError where `config.dit` is not that of the DiT, but for fields that no weight depends on.
        """
        for name, value in dataclasses.asdict(config.dit).items():
            own = getattr(dit.config, name)
            if name not in DiT.free_fields and own != value:
                raise ValueError(f"dit.{name}: got {value!r}; the trained DiT has {own!r}; set it to that")
        return cls(config, dit)

    def forward(
        self,
        sample: Tensor,  # [B, C, H, W]
        timestep: Tensor,  # [B] or a scalar
        *,
        text_states: Tensor
        | None = None,  # [B, S, text_dim], or [B, S, K, text_dim] with K = text_states of the config
        text_mask: Tensor | None = None,  # bool [B, S], True = a token
        text_rows: Tensor | None = None,  # int64 [B]
        dropped: Tensor | None = None,  # bool [B]
        condition: Mapping[str, Tensor] | None = None,
        modulations: Sequence[Tensor] | None = None,
    ) -> Tensor:  # [B, C, H, W], or [B, 2 * C, H, W] with learn_sigma
        """The DiT's prediction under a text. Training passes states, sampling the `condition` made of them once.

        Args:
            sample, timestep: as of `DiT`.
            text_states, text_mask: hidden states of the texts' tokens.
            text_rows: which row of text_states each sample has, where several have one text: each is read once.
            dropped: samples that are drawn without a text.
            condition: instead of text_states: what `condition` or `null_condition` gave.
            modulations: instead of both: as of `DiT`.

        Raises ValueError where none or several of the three are given, or a shape does not fit.
        """
        given = [each is not None for each in (text_states, condition, modulations)]
        if sum(given) != 1:
            raise ValueError(
                f"text_states, condition, modulations: got {sum(given)} of them; expected exactly one of the three"
            )
        if modulations is not None:
            return self.dit(sample, timestep, modulations=modulations)
        if condition is None:
            condition = self.condition(text_states, text_mask, dropped, rows=text_rows)
        return self.dit(sample, timestep, **condition)

    def condition(
        self,
        text_states: Tensor,  # [U, S, text_dim] or [U, S, K, text_dim]
        text_mask: Tensor | None = None,  # bool [U, S], True = a token; None: all are
        dropped: Tensor | None = None,  # bool [B]
        *,
        rows: Tensor | None = None,  # int64 [B] in [0, U); None: each its own, and B = U
    ) -> dict[str, Tensor]:
        """What texts mean to the DiT, in terms of its call: it depends on no noise and no time.

        Returns {"layer_embedding": [B, L, D]} (Q-Former), or {"context": [B, S, D]} (cross-attention) with
        "context_mask", bool [B, S], where S is more than 1. Rows with dropped = True are those of no text: the null
        label's embedding for every layer, or one token of zeros.

        Raises ValueError where shapes do not fit, TypeError for a mask of floating-point numbers.
        """
        states = self._mixed(text_states)
        if text_mask is not None:
            text_mask = bool_mask("text_mask", text_mask, states.shape[:2])
        if self.q_former is not None:
            found = {"layer_embedding": self.q_former(states, text_mask)}
        else:
            found = {"context": self.text_proj(states)}
            if states.shape[1] > 1:
                everything = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
                found["context_mask"] = everything if text_mask is None else text_mask
        if rows is not None:
            found = {name: tensor.index_select(0, rows) for name, tensor in found.items()}
        return found if dropped is None else self._without(found, dropped)

    def knows_no_text(self) -> bool:
        """Whether there is something that stands for no text: with a Q-Former the DiT's null label."""
        return self.q_former is None or self.config.dit.null_label

    def null_condition(self, batch: int) -> dict[str, Tensor]:
        """The condition of no text, for `batch` samples: {"layer_embedding": [B, L, D]} or {"context": [B, 1, D]}.

        Raises ValueError for a DiT that has no null label to stand for it.
        """
        if self.q_former is not None:
            return {"layer_embedding": self._null_vector().expand(batch, self.config.dit.depth, -1)}
        return {"context": self._null_token().expand(batch, 1, -1)}

    def makes_modulations(self) -> bool:
        """Whether `modulations` stands for what `forward` does: not where a subclass or a part has its own."""
        return type(self).forward is TextToImage.forward and self.dit.makes_modulations()

    def modulations(self, timesteps: Tensor, *, layer_embedding: Tensor) -> list[Tensor]:
        """Those of the DiT."""
        return self.dit.modulations(timesteps, layer_embedding=layer_embedding)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | str = torch.float32, **options: Any
    ) -> "TextToImage":
        """Loads a model, in eval mode; its files say which format it has.

        Args:
            path: a folder written by `save_pretrained`, or a file (.pth, .pt, .safetensors) of LLM2DiT with its
                Q-Former or of latent Fashion-MNIST diffusion.
            dtype: dtype of the parameters, or its name ("bfloat16").
            options: for a folder `weights`, the name of the file with them, and fields of `TextToImageConfig` that no
                weight depends on. For a file fields of `DiTConfig` that it does not tell: `input_size`, and `num_heads`
                or `cross_attention_heads` where they are not those of the published models.

        Raises:
            FileNotFoundError: nothing there, or no checkpoint in the folder.
            ValueError: the file is cut short, damaged or of another model; the message names it.
            TypeError: a field that cannot be changed.
        """
        return super().from_pretrained(path, dtype=dtype, **options)

    @classmethod
    def _read(cls, path: Path, weights: str, overrides: dict[str, Any]) -> tuple[TextToImageConfig, dict[str, Tensor]]:
        if not path.is_file():
            return super()._read(path, weights, overrides)
        check_overrides(overrides, ("input_size", "num_heads", "cross_attention_heads"))
        fields, state = read_published(path, overrides)
        return TextToImageConfig(**fields), state

    @classmethod
    def _config_from(cls, values: Mapping[str, Any]) -> TextToImageConfig:
        q_former = values.get("q_former")
        parts = {"dit": DiTConfig(**values["dit"]), "q_former": q_former and QFormerConfig(**q_former)}
        return TextToImageConfig(**{**values, **parts})

    def _mixed(self, text_states: Tensor) -> Tensor:  # [U, S, text_dim]
        if self.mix is not None:
            text_states = self.mix(text_states)
        if text_states.ndim != 3 or text_states.shape[2] != self.config.text_dim:
            shape = list(text_states.shape)
            raise ValueError(f"text_states: got shape {shape}; expected [B, S, {self.config.text_dim}]")
        return text_states

    def _without(self, condition: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """A condition with some rows of it those of no text."""
        first = next(iter(condition.values()))
        if dropped.shape != first.shape[:1] or dropped.dtype != torch.bool:
            raise ValueError(f"dropped: got {dropped.dtype} {list(dropped.shape)}; expected bool [{len(first)}]")
        rows = dropped[:, None, None]
        if self.q_former is not None:
            return {"layer_embedding": torch.where(rows, self._null_vector(), condition["layer_embedding"])}
        found = {"context": torch.where(rows, self._null_token(), condition["context"])}
        if "context_mask" in condition:
            mask = condition["context_mask"]
            alone = torch.arange(mask.shape[1], device=mask.device) == 0
            found["context_mask"] = torch.where(dropped[:, None], alone, mask)
        return found

    def _null_vector(self) -> Tensor:  # [D]
        if not self.knows_no_text():
            raise ValueError(
                "dropped: this model's DiT has no null label to stand for no text; train one with labels dropped"
            )
        return self.dit.y_embedder.embedding_table.weight[self.config.dit.num_classes]

    def _null_token(self) -> Tensor:  # [D]
        weight = next(self.text_proj.parameters())
        return self.text_proj(weight.new_zeros(self.config.text_dim))
