"""Configuration of masked diffusion language models: architectures, sizes and special tokens."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from fastdiff.nn import ACTIVATIONS

# What an architecture fixes unless the configuration says otherwise.
_GPT_STYLE = dict(
    norm="layer", norm_eps=1e-5, position_embedding="learned", gated_mlp=False, attention_bias=True, output_bias=True,
    mlp_bias=True, tie_word_embeddings=True,
)  # fmt: skip
_LLAMA_STYLE = dict(
    norm="rms", position_embedding="rope", hidden_act="silu", gated_mlp=True, attention_bias=False, output_bias=False,
    mlp_bias=False, tie_word_embeddings=False,
)  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mdlm": dict(**_GPT_STYLE, hidden_act="gelu", logit_shift=False, rope_theta=1e4),
    "gpt2": dict(**_GPT_STYLE, hidden_act="gelu_tanh", logit_shift=True, rope_theta=1e4),
    "llada": dict(**_LLAMA_STYLE, norm_eps=1e-5, logit_shift=False, rope_theta=5e5),
    "dream": dict(**{**_LLAMA_STYLE, "attention_bias": True}, norm_eps=1e-6, logit_shift=True, rope_theta=1e6),
    "llama": dict(**_LLAMA_STYLE, norm_eps=1e-5, logit_shift=True, rope_theta=1e4),
}
SIZES: dict[str, dict[str, int]] = {
    name: dict(hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers)
    for name, (width, heads, layers) in {
        "tiny": (256, 4, 4),
        "small": (384, 6, 6),
        "medium": (512, 8, 8),
        "large": (640, 10, 10),
        "xlarge": (768, 12, 12),
    }.items()
}
LENGTH_FORMATS = ("eos_fill", "pad_fill", "eos_only")
_CHOICES = {
    "architecture": tuple(ARCHITECTURES),
    "norm": ("layer", "rms"),
    "position_embedding": ("learned", "rope"),
    "hidden_act": tuple(ACTIVATIONS),
    "length_format": (None, *LENGTH_FORMATS),
    "mask_schedule": ("linear", "cosine", "maskgit_cosine", "polynomial"),
}
_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings",
)  # fmt: skip


class MaskedDiffusionLMConfig(PretrainedConfig):
    """Shape, options and special tokens of a `MaskedDiffusionLM`. Fields that are None take the architecture's value.

    Attributes:
        architecture: "mdlm" (a bidirectional transformer of one's own), "gpt2" (GPT-2 made bidirectional, DiffuGPT),
            "llada", "dream" (Qwen2's blocks) or "llama" (DiffuLLaMA).
        vocab_size: Number of token ids, the mask token included.
        hidden_size, num_hidden_layers, num_attention_heads: Width, blocks, heads; heads divide the width unless
            head_dim is given.
        num_key_value_heads: Heads of keys and values; divides num_attention_heads. None: as many.
        head_dim: Channels of a head; None is hidden_size / num_attention_heads.
        intermediate_size: Width of the feed-forward part. None: 4 × the width, gated 8/3 × it rounded up to 256.
        max_position_embeddings: Longest sequence.
        norm, norm_eps: "layer" or "rms", and what is added to the variance.
        position_embedding: "learned" or "rope" (rotary, with rope_theta).
        hidden_act, gated_mlp: "gelu", "gelu_tanh" or "silu"; gated is SwiGLU with "silu".
        attention_bias, output_bias, mlp_bias, head_bias: Which linear layers have a bias: query, key and value; the
            attention's output; the feed-forward part; the head.
        tie_word_embeddings: The head is the token embedding.
        logit_shift: Logits of position i come from hidden state i - 1 (position 0 from itself), as in models adapted
            from autoregressive ones. `MaskedDiffusionLM.forward` undoes it: its logits at i predict token i.
        timestep_embedding: 1000·t is embedded and added to the tokens; the model then needs `timesteps`.
        mask_schedule, mask_schedule_exponent: How mask rates belong to times in training, as in
            `fastdiff.diffusion.MaskedDiffusionConfig`: decoding tells a model with a timestep embedding the time of its
            share of masks.
        cross_attention_dim: Width of an encoder's states that every block attends to; None for none.
        num_encoder_layers: Blocks of the model's own text encoder (`MaskedDiffusionLM.encode`); then
            cross_attention_dim is hidden_size.
        dropout: Probability, on embeddings, attention weights and the branches of the blocks.
        initializer_range: Standard deviation of random weights.
        mask_token_id, pad_token_id, bos_token_id, eos_token_id: Special tokens; all but the mask token may be None.
        add_special_tokens: Whether texts in training were what the tokenizer makes of them by itself, with what it puts
            before a text (BoS, [CLS]), and special tokens that are spelled out in it taken as such. Other projects'
            models are loaded with True; False is what fastdiff's training does: it adds nothing, and text is text. See
            `fastdiff.data.TextCodec`.
        length_format: How texts ended in training: "eos_fill" `[text][EoS][EoS…]`, "pad_fill" `[text][EoS][PAD…]`,
            "eos_only" (what follows EoS was not in the loss) or None (unknown).

    Raises ValueError, naming the field, for values that do not fit together, such as a mask token that is the pad
    token or is outside the vocabulary.
    """

    model_type = "fastdiff_masked_lm"

    architecture: str = "mdlm"
    vocab_size: int = 8192
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    norm: str | None = None
    norm_eps: float | None = None
    position_embedding: str | None = None
    rope_theta: float | None = None
    hidden_act: str | None = None
    gated_mlp: bool | None = None
    attention_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    head_bias: bool = False
    tie_word_embeddings: bool | None = None
    logit_shift: bool | None = None
    timestep_embedding: bool = False
    mask_schedule: str = "linear"
    mask_schedule_exponent: float = 2.0
    cross_attention_dim: int | None = None
    num_encoder_layers: int = 0
    dropout: float = 0.0
    initializer_range: float = 0.02
    mask_token_id: int = 3
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    add_special_tokens: bool = False
    length_format: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_choices("architecture")
        for name, value in ARCHITECTURES[self.architecture].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads: got {self.num_attention_heads}; expected a divisor of hidden_size = "
                    f"{self.hidden_size}, or head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            gated = -(-8 * self.hidden_size // (3 * 256)) * 256
            self.intermediate_size = gated if self.gated_mlp else 4 * self.hidden_size
        if self.num_encoder_layers > 0 and self.cross_attention_dim is None:
            self.cross_attention_dim = self.hidden_size
        self._check()
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **fields: Any) -> "MaskedDiffusionLMConfig":
        """A configuration of width, heads and blocks "tiny", "small", "medium", "large" or "xlarge" (256 … 768 wide).

        `fields` are other fields, or replace those. Raises ValueError for an unknown size.
        """
        if size not in SIZES:
            raise ValueError(f"size: got {size!r}; expected one of {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **fields})

    def to_diff_dict(self) -> dict[str, Any]:
        """Every field: what an architecture fixes must not depend on the defaults of the version that reads it."""
        own = {name: getattr(self, name) for name in MaskedDiffusionLMConfig.__annotations__}
        return {**super().to_diff_dict(), **own}

    def _check_choices(self, *names: str) -> None:
        for name in names:
            value, known = getattr(self, name), _CHOICES[name]
            if value not in known:
                raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(map(str, known))}")

    def _check(self) -> None:
        self._check_choices(*_CHOICES)
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}; expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}"
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}; rotary positions need an even one")
        if self.timestep_embedding and self.hidden_size < 2:
            raise ValueError(f"hidden_size: got {self.hidden_size}; a timestep embedding needs at least 2")
        if self.num_encoder_layers and self.cross_attention_dim != self.hidden_size:
            raise ValueError(
                f"cross_attention_dim: got {self.cross_attention_dim} with an encoder of its own; expected hidden_size "
                f"= {self.hidden_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}; expected a probability below 1")
        self._check_tokens()

    def _check_tokens(self) -> None:
        eos = self.eos_token_id if isinstance(self.eos_token_id, list | tuple) else [self.eos_token_id]
        tokens = {"mask_token_id": [self.mask_token_id], "pad_token_id": [self.pad_token_id], "eos_token_id": eos}
        for name, ids in {**tokens, "bos_token_id": [self.bos_token_id]}.items():
            for token in ids:
                if name == "mask_token_id" and token is None:
                    raise ValueError("mask_token_id: got None; a masked diffusion model needs one: pass mask_token_id=")
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name}: got {token}; expected 0 to {self.vocab_size - 1} (vocab_size - 1)")
        for name in ("pad_token_id", "eos_token_id"):
            if self.mask_token_id in tokens[name]:
                raise ValueError(
                    f"mask_token_id: got {self.mask_token_id}, which is {name} too; give one of them another id"
                )


# so that AutoTokenizer reads the tokenizer beside a model's config.json without a warning
AutoConfig.register(MaskedDiffusionLMConfig.model_type, MaskedDiffusionLMConfig, exist_ok=True)
