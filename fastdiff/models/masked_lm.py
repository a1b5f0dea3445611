"""Masked diffusion language models: bidirectional transformers that predict the tokens behind mask tokens.

One module covers MDLM-style models of one's own (Sahoo et al. 2024), GPT-2 and Llama made bidirectional (DiffuGPT and
DiffuLLaMA, Gong et al. 2025), LLaDA (Nie et al. 2025) and Dream (Ye et al. 2025); they differ in their configuration.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from fastdiff.backends import with_this_backend
from fastdiff.models.masked_lm_checkpoints import load_gpt2, load_masked_lm
from fastdiff.models.masked_lm_config import MaskedDiffusionLMConfig
from fastdiff.nn import AdaLayerNorm, KeyValueCache, LanguageModelHead, TimestepEmbedding, TransformerBlock
from fastdiff.nn.checks import bool_mask, check_token_ids
from fastdiff.nn.flash import resolve_implementation
from fastdiff.nn.rotary import rotary_table

IGNORED_LABEL = -100


class TransformerStack(nn.Module):
    """Positions, blocks and final norm: embeddings `[B, L, D]` → hidden states `[B, L, D]`."""

    def __init__(self, config: MaskedDiffusionLMConfig, num_layers: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.embed_positions = None
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        norm = dict(norm=config.norm, eps=config.norm_eps)
        self.layers = nn.ModuleList(
            TransformerBlock(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                attention=dict(
                    num_key_value_heads=config.num_key_value_heads,
                    head_dim=config.head_dim,
                    bias=config.attention_bias,
                    output_bias=config.output_bias,
                ),
                feed_forward=dict(activation=config.hidden_act, gated=config.gated_mlp, bias=config.mlp_bias),
                norm=norm,
                context_dim=context_dim,
                dropout=config.dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = AdaLayerNorm(config.hidden_size, elementwise_affine=True, **norm)

    def run(
        self,
        x: Tensor,  # [B, L, D]
        mask: Tensor | None,
        position_ids: Tensor,  # [B or 1, L]
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        output_columns: Tensor | None = None,
    ) -> Tensor:
        rotary, implementation = None, self.config._attn_implementation
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        else:
            rotary = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta)
        if self.config.dropout:
            x = nn.functional.dropout(x, self.config.dropout, self.training)
        for index, layer in enumerate(self.layers):
            columns = output_columns if index == len(self.layers) - 1 else None  # the layers before serve all columns
            if self.gradient_checkpointing and self.training and cache is None:
                inputs = (x, mask, rotary, context, context_mask, None, index, columns, implementation)
                x = self._gradient_checkpointing_func(with_this_backend(layer.__call__), *inputs)
            else:
                x = layer(x, mask, rotary, context, context_mask, cache, index, columns, implementation)
        return self.norm(x, None, None)


class Denoiser(TransformerStack):
    """The stack with token embeddings and, where the model takes the time, its embedding."""

    def __init__(self, config: MaskedDiffusionLMConfig) -> None:
        super().__init__(config, config.num_hidden_layers, config.cross_attention_dim)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.time_embedding = None
        if config.timestep_embedding:
            self.time_embedding = TimestepEmbedding(config.hidden_size)


class MaskedDiffusionLM(PreTrainedModel):
    """A bidirectional language model that predicts the tokens behind mask tokens.

    Parameter names are those of transformers' Llama. `from_pretrained` also loads the checkpoints of GPT-2, DiffuGPT,
    DiffuLLaMA, Llama, Qwen2, LLaDA and Dream; see docs/masked_lm.md.
    """

    config_class = MaskedDiffusionLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["TransformerBlock"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MaskedDiffusionLMConfig) -> None:
        super().__init__(config)
        self.model = Denoiser(config)
        self.encoder = TransformerStack(config, config.num_encoder_layers) if config.num_encoder_layers else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @property
    def head(self) -> LanguageModelHead:
        """The head as it is now, wrapped or not: what every loss, draw and likelihood goes through."""
        return LanguageModelHead(self.lm_head)

    @property
    def head_weight(self) -> Tensor:  # [V, D]
        """The head's weight; the token embedding where they are tied. Raises ValueError where the head is wrapped."""
        return self._plain_head()[0]

    @property
    def head_bias(self) -> Tensor | None:  # [V]
        """The head's bias, or None. Raises ValueError where the head is wrapped."""
        return self._plain_head()[1]

    def _plain_head(self) -> tuple[Tensor, Tensor | None]:
        plain = self.head.plain
        if plain is None:
            raise ValueError(
                f"lm_head: a {type(self.lm_head).__name__}, whose weight does not say all that it does; use model.head "
                "or model.lm_head(states)"
            )
        return plain

    def hidden_states(
        self,
        input_ids: Tensor,  # int64 [B, L]
        attention_mask: Tensor | None = None,  # [B, keys] or [B or 1, L, keys], bool or 0/1
        *,
        position_ids: Tensor | None = None,  # int64 [B, L], [1, L] or [L]
        timesteps: Tensor | None = None,  # [B]
        encoder_hidden_states: Tensor | None = None,  # [B, M, cross_attention_dim]
        encoder_attention_mask: Tensor | None = None,  # bool or 0/1 [B, M]
        cache: KeyValueCache | None = None,
        cache_columns: Tensor | None = None,  # int64 [L] or [B, L]
        cache_rows: Tensor | None = None,  # int64 [B]
        output_columns: Tensor | None = None,  # int64 [B, l]
    ) -> Tensor:  # [B, L or l, D]
        """Hidden states after the final norm, ready for the head; with `config.logit_shift` state i predicts token i+1.

        Args:
            input_ids: token ids, the mask token where a token is wanted.
            attention_mask: True where a key may be attended to (False: padding); of three dimensions it says so for
                each query (`fastdiff.nn.annealed_attention_mask`). None: all attend to all.
            position_ids: None is 0 … L - 1, or cache_columns where those are given.
            timesteps: times in [0, 1], 1 all masks; needed with `config.timestep_embedding`.
            encoder_hidden_states: what the cross-attention sees, from `encode` or another model; None leaves it out.
            encoder_attention_mask: True where it may be attended to; a row without any True is as one without them.
            cache: filled by a call over whole sequences.
            cache_columns: the columns of the cached sequences that input_ids are; keys and values of the others come
                from the cache, and attention_mask is over all columns. A column named twice is computed twice.
            cache_rows: the cached sequences that this call is of, different ones; None is all.
            output_columns: those of input_ids whose states are wanted, in [0, L): the last block computes no others.

        Raises:
            TypeError, ValueError: a dtype or shape does not fit, more tokens than positions, or (on CPU tensors) ids
                out of range; the message names it.
        """
        self._check_input(input_ids, timesteps, encoder_hidden_states, output_columns)
        _check_cache(input_ids, cache, cache_columns, cache_rows)
        keys = input_ids.shape[1] if cache is None or cache_columns is None else cache.length
        mask = _attention_mask("attention_mask", attention_mask, input_ids.shape[0], input_ids.shape[1], keys)
        context_mask = None
        if encoder_hidden_states is not None:
            batch, context = encoder_hidden_states.shape[:2]
            context_mask = _attention_mask("encoder_attention_mask", encoder_attention_mask, batch, 1, context)
        if cache is not None:
            cache.columns, cache.rows = cache_columns, cache_rows
        position_ids = self._positions(input_ids, cache_columns if position_ids is None else position_ids)
        x = self.model.embed_tokens(input_ids)
        if timesteps is not None and self.model.time_embedding is not None:
            x = x + self.model.time_embedding(1000 * timesteps.float()).to(x.dtype)[:, None]
        return self.model.run(x, mask, position_ids, encoder_hidden_states, context_mask, cache, output_columns)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # [B, M] -> [B, M, D]
        """States of the model's own encoder for `encoder_hidden_states`: condition text, seen by every block.

        Raises ValueError where the configuration has no encoder, and what `hidden_states` raises.
        """
        if self.encoder is None:
            raise ValueError("encode: this model has no encoder; set num_encoder_layers in its configuration")
        self._check_ids(input_ids)
        mask = _attention_mask("attention_mask", attention_mask, *input_ids.shape, input_ids.shape[1])
        return self.encoder.run(self.model.embed_tokens(input_ids), mask, self._positions(input_ids, None))

    def predicting_states(self, hidden_states: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        """Hidden states moved so that state i predicts token i: shifted right by one under `config.logit_shift`."""
        if not self.config.logit_shift:
            return hidden_states
        return torch.cat([hidden_states[:, :1], hidden_states[:, :-1]], dim=1)

    def forward(
        self,
        input_ids: Tensor,  # int64 [B, L]
        attention_mask: Tensor | None = None,  # [B, L] or [B or 1, L, L], bool or 0/1
        labels: Tensor | None = None,  # int64 [B, L]
        *,
        encoder_input_ids: Tensor | None = None,  # int64 [B, M]
        row_weight: Tensor | None = None,  # [B, L], or what broadcasts to it: [B, 1]
        loss_normalizer: float | Tensor | None = None,
        label_smoothing: float = 0.0,
        return_logits: bool | None = None,
        **inputs: Any,
    ) -> MaskedLMOutput:
        """Logits, whose position i predicts token i in every architecture, and the loss where labels are given.

        Args:
            input_ids, attention_mask, inputs: those of `hidden_states`, but for output_columns and the cache's.
            labels: clean tokens where the loss counts, -100 elsewhere.
            encoder_input_ids: condition text for the model's own encoder, with encoder_attention_mask: instead of
                encoder_hidden_states.
            row_weight: factor of each token's cross entropy, such as `MaskedTokens.weight[:, None]`.
            loss_normalizer: what the sum is divided by; None is the number of labels that count (at least 1).
            label_smoothing: a number in [0, 1).
            return_logits: None is True but in training with labels: the loss never holds the logits in memory.

        Returns:
            MaskedLMOutput with `loss` (float32, in nats; the mask token has probability 0 in it) and `logits`
            `[B, L, V]`, each None where not asked for.

        Raises what `hidden_states` and `fastdiff.ops.masked_linear_cross_entropy` raise.
        """
        if encoder_input_ids is not None:
            inputs["encoder_hidden_states"] = self.encode(encoder_input_ids, inputs.get("encoder_attention_mask"))
        states = self.predicting_states(self.hidden_states(input_ids, attention_mask, **inputs))
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels: got shape {list(labels.shape)}; expected {list(input_ids.shape)}")
            counted = labels != IGNORED_LABEL
            loss, _ = self.head.masked_cross_entropy(
                states,
                labels,
                counted,
                row_weight=row_weight,
                suppress_tokens=(self.config.mask_token_id,),
                label_smoothing=label_smoothing,
            )
            loss = loss / (counted.sum().clamp(min=1) if loss_normalizer is None else loss_normalizer)
        wanted = return_logits if return_logits is not None else not (self.training and labels is not None)
        return MaskedLMOutput(loss=loss, logits=self.lm_head(states) if wanted else None)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args: Any, **kwargs: Any) -> "MaskedDiffusionLM":
        """Loads a model, in eval mode; config.json says which format it has.

        Args:
            path: a folder or hub id: written by `save_pretrained`, or of GPT-2, DiffuGPT, DiffuLLaMA, Llama, Qwen2,
                LLaDA or Dream.
            args, kwargs: those of transformers' `PreTrainedModel.from_pretrained`. For a foreign checkpoint: dtype
                ("auto", as stored, or a torch.dtype), attn_implementation ("sdpa", "flash_attention_2", or None:
                the latter where it is installed), revision, cache_dir, token, local_files_only, force_download,
                and fields of `MaskedDiffusionLMConfig`, such as the mask_token_id that some checkpoints leave to
                their tokenizer.

        Raises:
            FileNotFoundError: nothing there, or no weights.
            ValueError: a format that is not known (the message lists those that are), or a damaged file.
        """
        return load_masked_lm(cls, path, args, kwargs, super().from_pretrained)

    @classmethod
    def from_gpt2(
        cls,
        source: Any,
        *,
        mask_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> "MaskedDiffusionLM":
        """GPT-2 made a masked diffusion model (DiffuGPT, Gong et al. 2025): bidirectional, logits shifted by one.

        Args:
            source: a transformers GPT2LMHeadModel, or a folder or hub id of one.
            mask_token_id: None is 10541, a token hardly ever seen.
            pad_token_id: None is a new id, the vocabulary's size: 50257. Ids beyond the vocabulary get the mean of
                all embeddings, in the tied head too.
            kwargs: those of `from_pretrained` for a foreign checkpoint.

        Anneal its attention from causal to bidirectional with `fastdiff.nn.annealed_attention_mask`.
        Raises what `from_pretrained` raises.
        """
        return load_gpt2(cls, source, mask_token_id, pad_token_id, kwargs)

    def _check_ids(self, input_ids: Tensor) -> None:
        check_token_ids("input_ids", input_ids)
        longest = self.config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"input_ids: got {input_ids.shape[1]} tokens; expected at most max_position_embeddings = {longest}: "
                "shorten the prompt or ask for fewer tokens"
            )
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
            low, high = (int(bound) for bound in torch.aminmax(input_ids))
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids: got ids {low} to {high}; expected 0 to {self.config.vocab_size - 1}: "
                    "take the model's own tokenizer"
                )

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        return resolve_implementation(attn_implementation)  # transformers asks, here and in set_attn_implementation

    def _check_input(self, input_ids, timesteps, encoder_hidden_states, output_columns) -> None:
        self._check_ids(input_ids)
        batch, length = input_ids.shape
        if self.config.timestep_embedding and timesteps is None:
            raise ValueError("timesteps: got None; this model has a timestep embedding: pass times [B] in [0, 1]")
        if timesteps is not None and timesteps.shape != (batch,):
            raise ValueError(f"timesteps: got shape {list(timesteps.shape)}; expected [{batch}], one time per sequence")
        if encoder_hidden_states is not None:
            if self.config.cross_attention_dim is None:
                raise ValueError("encoder_hidden_states: this model has no cross-attention; set cross_attention_dim")
            expected, shape = self.config.cross_attention_dim, encoder_hidden_states.shape
            if len(shape) != 3 or shape[0] != batch or shape[2] != expected:
                raise ValueError(
                    f"encoder_hidden_states: got shape {list(shape)}; expected [{batch}, states, {expected}]"
                )
        if output_columns is not None and (output_columns.ndim != 2 or len(output_columns) != batch):
            raise ValueError(f"output_columns: got shape {list(output_columns.shape)}; expected [{batch}, columns]")

    def _positions(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:  # [B or 1, L]
        batch, length = input_ids.shape
        if position_ids is None:
            return torch.arange(length, device=input_ids.device)[None]
        if position_ids.ndim == 1:
            position_ids = position_ids[None]
        if position_ids.shape not in ((batch, length), (1, length)):
            raise ValueError(
                f"position_ids: got shape {list(position_ids.shape)}; expected [{batch}, {length}] or [{length}]"
            )
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and position_ids.numel():
            low, high = (int(bound) for bound in torch.aminmax(position_ids))
            if low < 0 or high >= self.config.max_position_embeddings:
                longest = self.config.max_position_embeddings
                raise ValueError(f"position_ids: got {low} to {high}; expected 0 to {longest - 1}")
        return position_ids

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Leaf by leaf: transformers does not hand the containers of code outside of it to this function.
        role = getattr(module, "branch", None)
        if role == "residual":  # GPT-2's scheme: branches add up in the residual stream and share its variance
            init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5)
        elif role == "cross":
            init.zeros_(module.weight)  # a trained denoiser starts as if it had no encoder


def _attention_mask(name: str, mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor | None:
    """The mask as bool [B, 1, 1 or queries, keys], or None where nothing is hidden."""
    if mask is None:
        return None
    mask = bool_mask(name, mask, (batch, keys), (batch, queries, keys), (1, queries, keys))
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None  # attention without a mask is faster; on a GPU looking would wait
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]


def _check_cache(input_ids: Tensor, cache: KeyValueCache | None, columns: Tensor | None, rows: Tensor | None) -> None:
    batch, length = input_ids.shape
    if (columns is not None or rows is not None) and (cache is None or not cache.length):
        raise ValueError("cache_columns: there is no filled cache; run the whole sequences with cache= first")
    if columns is not None and columns.shape not in ((length,), (batch, length)):
        raise ValueError(f"cache_columns: got shape {list(columns.shape)}; expected [{length}] or [{batch}, {length}]")
    if rows is not None and rows.shape != (batch,):
        raise ValueError(f"cache_rows: got shape {list(rows.shape)}; expected [{batch}], one per sequence")
