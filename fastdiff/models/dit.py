"""The diffusion transformer of Peebles & Xie (2023), "Scalable Diffusion Models with Transformers", and its relatives.

Options make it LLM2DiT's (of the family of Lumina's and minRF's: convolutional stem, rotary positions, norms of queries
and keys, SwiGLU) or that of transformer latent diffusion (cross-attention instead of adaLN, a convolution in the MLP).
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff.backends import with_this_backend
from fastdiff.models.dit_blocks import CrossDiTBlock, DiTBlock, FinalLayer, PlainFinalLayer, embedders, initialise
from fastdiff.models.dit_checkpoints import DIFFUSERS_CLASSES, model_folder, read_foreign
from fastdiff.models.dit_config import DiTConfig, preset_config
from fastdiff.models.pretrained import CONFIG_NAME, Pretrained, naming_config
from fastdiff.models.weights import check_counts, check_state
from fastdiff.nn import AdaLayerNorm, ConvStem, PatchEmbed, sincos_2d
from fastdiff.nn.rotary import rotary_table

_ROTARY_THETA = 10000.0
_CONTEXT_NORM_EPS = 1e-5


class DiT(Pretrained):
    """A diffusion transformer, conditioned on class labels or from outside.

    Parameter names are those of facebookresearch/DiT. The timestep is taken as it is given: 0 … 999 for discrete
    levels, 1000·t for continuous ones, or as `time_scale` says (`fastdiff.diffusion.Diffusion.model_time`).
    """

    config_class = DiTConfig
    title = "a DiT"
    free_fields = ("attention", "class_dropout_prob", "gradient_checkpointing", "input_size")
    also_reads = DIFFUSERS_CLASSES

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, crosses = config.hidden_size, config.conditioning == "cross_attention"
        self.stem = ConvStem(config.in_channels, dim // 2) if config.stem == "conv" else None
        self.x_embedder = PatchEmbed(dim // 2 if self.stem else config.in_channels, dim, config.patch_size)
        self.t_embedder, self.y_embedder = embedders(config)
        self.blocks = nn.ModuleList((CrossDiTBlock if crosses else DiTBlock)(config) for _ in range(config.depth))
        if config.embedders_per_block:  # the first block and the final layer have the two above
            self.block_embedders = nn.ModuleList(nn.ModuleList(embedders(config)) for _ in self.blocks[1:])
        self.context_norm = AdaLayerNorm(dim, eps=_CONTEXT_NORM_EPS, elementwise_affine=True) if crosses else None
        self.final_layer = (PlainFinalLayer if crosses else FinalLayer)(config)
        self.pos_embed = None
        if config.position_embedding == "learned":
            rows, columns = self._grid(config.image_size)
            self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if config.position_embedding == "sincos":
            self.register_buffer("positions", torch.empty(0), persistent=False)
        if crosses:
            self.register_buffer("ones", torch.empty(0), persistent=False)
        self.reset_positions()
        self.apply(initialise)
        if config.adaln_zero and not crosses:  # adaLN-Zero: each block starts as the identity
            for layer in (*self.blocks, self.final_layer):
                nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DiT":
        """A model with random weights: "DiT-S/2" … "DiT-XL/8", "DiT-tiny", "llm2dit" or "fmnist_t2i".

        `overrides` replace fields of `DiTConfig`. Raises ValueError for an unknown name and TypeError for an unknown
        field.
        """
        return cls(preset_config(name, **overrides))

    def forward(
        self,
        sample: Tensor,  # [B, C, H, W], H and W multiples of the patch size
        timestep: Tensor,  # [B] or a scalar
        class_labels: Tensor | None = None,  # [B] int64 in [0, num_classes]; num_classes is the null label, if any
        *,
        layer_embedding: Tensor | None = None,  # [B, L, D]
        context: Tensor | None = None,  # [B, S, D]
        context_mask: Tensor | None = None,  # bool [B, S], True = a token
        layer_conditioning: Tensor | None = None,  # [B, L, D]
        token_conditioning: Tensor | None = None,  # [B, N, D]
        label_generator: torch.Generator | None = None,
        modulations: Sequence[Tensor] | None = None,  # depth of [B, 6 * D], then [B, 2 * D]
    ) -> Tensor:  # [B, C, H, W], or [B, 2 * C, H, W] with learn_sigma
        """Returns the network's prediction: noise, image or velocity, depending on `prediction_type`.

        Args:
            sample: noisy images, float32, bfloat16 or float16.
            timestep: a time for each sample, or one for all.
            class_labels: None is the null label for all, where the model has one (`config.null_label`).
            layer_embedding: stands in the place of the labels' embedding: row l in block l, the last row also in the
                final layer (what a Q-Former makes of a text).
            context: what blocks with cross-attention attend to beside the time; stands in the place of the label.
            context_mask: None is all of it.
            layer_conditioning: row l is added to the conditioning vector of block l, the last row also to the final
                layer's.
            token_conditioning: added to the conditioning vector of every block and of the final layer before it is
                modulated, so that each token has its own shift, scale and gate.
            label_generator: where label dropout draws from in training mode; None is torch's generator.
            modulations: rows of what `modulations` gave. Timestep and labels are then known and not looked at again.

        Raises:
            ValueError: a shape that does not fit, two conditions of which one stands in the place of the other, a
                condition that this model has not, another size with learned positions, or (on CPU tensors) a label out
                of range.
            TypeError: labels that are not int64.
        """
        x = self.x_embedder(sample if self.stem is None else self.stem(sample))
        given = dict(layer_embedding=layer_embedding, context=context, context_mask=context_mask,
                     layer_conditioning=layer_conditioning, token_conditioning=token_conditioning)  # fmt: skip
        self._check_conditioning(*x.shape[:2], timestep, class_labels, modulations, **given)
        # Under autocast the patches are bfloat16 and the positions float32: the residual stream is float32.
        x, places = self._placed(x, sample)
        if self.context_norm is not None:
            if context is None:
                labels = self._dropped(class_labels, len(x), sample.device, label_generator)
                context = self.y_embedder(labels)[:, None]
            patches = self._cross(x, timestep.expand(len(x)), context, context_mask, places)
        elif modulations is not None:
            patches = self._modulated(x, lambda index: (None, modulations[index]), places)
        else:
            timestep, labels = timestep.expand(len(x)), None
            shared = self.t_embedder(timestep)
            if layer_embedding is None:
                labels = self._dropped(class_labels, len(x), sample.device, label_generator)
                shared = shared + self.y_embedder(labels)

            def conditioning(index: int) -> tuple[Tensor]:
                own = self._own_embedding(index, timestep, labels)
                base = _add_conditioning(shared if own is None else own, layer_embedding, None, index)
                return (_add_conditioning(base, layer_conditioning, token_conditioning, index),)

            patches = self._modulated(x, conditioning, places)
        return self._unpatchify(patches, sample)

    def _modulated(self, x: Tensor, conditioning: Callable[[int], tuple], places: tuple) -> Tensor:
        """Through adaLN blocks and the final layer; `conditioning(l)`: what layer l takes, -1 being the last."""
        residual, branch, gate = x, None, None
        for index, block in enumerate(self.blocks):
            vector, modulation = (*conditioning(index), None)[:2]
            residual, branch, gate = self._run(block, residual, branch, gate, vector, modulation, *places)
        return self.final_layer(residual, branch, gate, *conditioning(-1))

    def _cross(self, x: Tensor, timestep: Tensor, context: Tensor, mask: Tensor | None, places: tuple) -> Tensor:
        """Through blocks that attend to the time and the context."""
        context = self.context_norm(torch.cat([self.t_embedder(timestep)[:, None], context], dim=1), None, None)
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        residual, branch = x, None
        for block in self.blocks:
            residual, branch = self._run(block, residual, branch, self.ones, context, mask, *places)
        return self.final_layer(residual, branch)

    def _run(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, ...]:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(with_this_backend(block), *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def makes_modulations(self) -> bool:
        """Whether `modulations` stands for what `forward` does: not where a subclass or a layer has its own."""
        plain = all(type(block) is DiTBlock for block in self.blocks) and type(self.final_layer) is FinalLayer
        return plain and type(self).forward is DiT.forward

    @torch.no_grad()
    def modulations(
        self,
        timesteps: Tensor,  # [S]
        class_labels: Tensor | None = None,  # [U] int64 in [0, num_classes]
        *,
        layer_embedding: Tensor | None = None,  # [U, L, D]: instead of labels
    ) -> list[Tensor]:  # depth of [S, U, 6 * D], then [S, U, 2 * D]
        """The shifts, scales and gates of every layer at each of these times for each of these labels or prompts.

        They depend on nothing else, so a sampler that knows its steps needs one matrix product a layer for all of them.
        `forward` takes rows of them as `modulations`. Labels are looked up as they are: none is dropped.

        Raises:
            ValueError: other shapes, both or neither of labels and embeddings, a model without modulations, or (on CPU
                tensors) a label out of range.
            TypeError: labels that are not int64.
        """
        self._check_axes(timesteps, class_labels, layer_embedding)
        shared = self.t_embedder(timesteps)[:, None]
        if layer_embedding is None:
            shared = shared + self.y_embedder(class_labels)
        found = []
        for index, layer in enumerate((*self.blocks, self.final_layer)):
            own = self._own_embedding(index, timesteps, class_labels, outer=True)
            vectors = shared if own is None else own
            if layer_embedding is not None:
                vectors = vectors + layer_embedding[:, min(index, len(self.blocks) - 1)]
            found.append(layer.adaLN_modulation(vectors))
        return found

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | str = torch.float32, **options: Any
    ) -> "DiT":
        """Loads a model, in eval mode; its files say which format it has.

        Args:
            path: a folder written by `save_pretrained`; a folder of diffusers' DiTTransformer2DModel, also under its
                older name Transformer2DModel (or a pipeline folder with one in `transformer/`); a facebookresearch/DiT
                file (.pt, or .safetensors with the same names), its EMA weights if it holds both; a file of LLM2DiT's
                DiT. Wrappers and prefixes of training scripts are taken off.
            dtype: dtype of the parameters, or its name ("bfloat16").
            options: fields of `DiTConfig` that no weight depends on, such as `attention`. For a facebookresearch file
                also `num_heads` where the width is not that of a preset, and `num_classes`: as many rows in the label
                table mean a model without a null label. None of the two is needed where the file has its command
                line, "args". For a diffusers folder also `variant`, such as "fp16". For a folder written by
                `save_pretrained` also `weights`, the name of the file with them, as in a run's checkpoint.

        Raises:
            FileNotFoundError: nothing there, or no checkpoint in the folder.
            ValueError: the file is cut short, damaged or of another model; the message names it.
            TypeError: a field that cannot be changed.
        """
        return super().from_pretrained(path, dtype=dtype, **options)

    @classmethod
    def _read(cls, path: Path, weights: str, overrides: dict[str, Any]) -> tuple[DiTConfig, dict[str, Tensor]]:
        path = model_folder(path)
        foreign = read_foreign(path, overrides, cls.free_fields)
        return super()._read(path, weights, overrides) if foreign is None else foreign

    @classmethod
    def _filled(cls, config: DiTConfig, state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> "DiT":
        check_counts(dataclasses.asdict(config), state, path / CONFIG_NAME)
        # no memory and no time for weights that are replaced at once
        with naming_config(path, cls.title), torch.device("meta"):
            model = cls(config)
        check_state(state, model.state_dict(), path, "its configuration")
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
        model.reset_positions(dtype)
        return model.eval()

    def reset_positions(self, dtype: torch.dtype = torch.float32) -> None:
        """Makes the fixed positions of the grid trained on again, on the parameters' device; they are not saved."""
        grid, device = self._grid(self.config.image_size), next(self.parameters()).device
        if self.config.position_embedding == "sincos":
            self.positions = self._positions_of(*grid, device=device).to(dtype)
        if self.config.conditioning == "cross_attention":
            self.ones = torch.ones(self.config.hidden_size, device=device, dtype=dtype)

    def _grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size[0] // self.config.patch_size, image_size[1] // self.config.patch_size

    def _positions_of(self, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
        return sincos_2d(rows, columns, self.config.hidden_size, device=device)

    def _placed(self, x: Tensor, sample: Tensor) -> tuple[Tensor, tuple]:
        """Tokens with their positions added, and what blocks are told of them: the rotary table, the grid."""
        grid = self._grid(sample.shape[-2:])
        known = grid == self._grid(self.config.image_size)
        kind = self.config.position_embedding
        if kind == "rotary":
            places = torch.arange(x.shape[1], device=x.device)[None]
            table = rotary_table(places, self.config.hidden_size // self.config.num_heads, _ROTARY_THETA)
            return x.to(self.x_embedder.proj.weight.dtype), (table, grid)
        if kind == "learned":
            if not known:
                expected = f"{self.config.image_size}: its positions are learned"
                raise ValueError(f"sample: got height and width {tuple(sample.shape[-2:])}; expected {expected}")
            return x + self.pos_embed, (None, grid)
        positions = self.positions if known else self._positions_of(*grid, device=x.device).to(self.positions.dtype)
        return x + positions, (None, grid)

    def _unpatchify(self, patches: Tensor, sample: Tensor) -> Tensor:  # [B, N, p * p * C] -> [B, C, H, W]
        batch, channels = len(patches), self.config.out_channels
        p, (rows, columns) = self.config.patch_size, self._grid(sample.shape[-2:])
        pixels = patches.view(batch, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(batch, channels, rows * p, columns * p)

    def _dropped(self, class_labels: Tensor | None, batch: int, device: torch.device, generator) -> Tensor:  # [B]
        """The labels of a batch, with some dropped in training mode."""
        if self.y_embedder is None:
            name = "layer_embedding" if self.context_norm is None else "context"
            raise ValueError(f"{name}: got None; this model has no labels (num_classes 0): pass one")
        if class_labels is None:
            if not self.config.null_label:
                raise ValueError("class_labels: got None; this model has no null label: pass a label for each sample")
            class_labels = torch.full((batch,), self.config.num_classes, device=device)
        return self.y_embedder.drop(class_labels, generator)

    def _own_embedding(self, layer: int, timestep: Tensor, labels: Tensor | None, outer: bool = False) -> Tensor | None:
        """Time and label (if any) as a layer embeds them by itself; None where it has those of the first block.

        `outer`: of each time with each label, [S, U, D].
        """
        if not self.config.embedders_per_block or layer in (0, -1, len(self.blocks)):
            return None
        t_embedder, y_embedder = self.block_embedders[layer - 1]
        time = t_embedder(timestep)
        time = time[:, None] if outer else time
        return time if labels is None else time + y_embedder(labels)

    def _check_axes(self, timesteps, class_labels, layer_embedding):
        if self.context_norm is not None:
            raise ValueError("modulations: this model has none (conditioning 'cross_attention'); call it as it is")
        if (class_labels is None) == (layer_embedding is None):
            raise ValueError("class_labels, layer_embedding: got both or neither; expected one of them")
        for name, tensor in (("timesteps", timesteps), ("class_labels", class_labels)):
            if tensor is not None and tensor.ndim != 1:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}; expected one dimension")
        if class_labels is None:
            expected = (self.config.depth, self.config.hidden_size)
            if layer_embedding.ndim != 3 or layer_embedding.shape[1:] != expected:
                shape = list(layer_embedding.shape)
                raise ValueError(f"layer_embedding: got shape {shape}; expected [U, {expected[0]}, {expected[1]}]")
            return
        if class_labels.dtype != torch.int64:
            raise TypeError(f"class_labels: got {class_labels.dtype}; expected torch.int64")
        last = len(self.y_embedder.embedding_table.weight) - 1
        if class_labels.device.type == "cpu" and ((class_labels < 0) | (class_labels > last)).any():
            raise ValueError(f"class_labels: got {class_labels.tolist()[:8]}; expected 0 to {last}")

    def _check_conditioning(self, batch, tokens, timestep, class_labels, modulations, **given):
        depth, dim = self.config.depth, self.config.hidden_size
        length = given["context"].shape[1] if given["context"] is not None and given["context"].ndim == 3 else "S"
        expected = {
            "timestep": (timestep, ((), (1,), (batch,))),
            "class_labels": (class_labels, ((batch,),)),
            "layer_embedding": (given["layer_embedding"], ((batch, depth, dim),)),
            "layer_conditioning": (given["layer_conditioning"], ((batch, depth, dim),)),
            "token_conditioning": (given["token_conditioning"], ((batch, tokens, dim),)),
            "context": (given["context"], ((batch, length, dim),)),
            "context_mask": (given["context_mask"], ((batch, length),)),
        }
        for name, (tensor, shapes) in expected.items():
            if tensor is not None and tuple(tensor.shape) not in shapes:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}; expected {list(shapes[-1])}")
        has = {name for name, tensor in given.items() if tensor is not None}
        foreign = has & ({"context", "context_mask"} if self.context_norm is None else
                         {"layer_embedding", "layer_conditioning", "token_conditioning"})  # fmt: skip
        if foreign or (self.context_norm is not None and modulations is not None):
            name = (*sorted(foreign), "modulations")[0]
            raise ValueError(f"{name}: got one with conditioning {self.config.conditioning!r}; expected None")
        for name in ("layer_embedding", "context"):
            if name in has and class_labels is not None:
                raise ValueError(f"{name}: got one beside class_labels, whose place it takes; expected one of them")
        if modulations is None:
            return
        if has:
            others = "layer_conditioning or token_conditioning, or layer_embedding"
            raise ValueError(f"modulations: got them beside {others}; expected one")
        if len(modulations) != depth + 1:
            raise ValueError(f"modulations: got {len(modulations)}; expected {depth + 1}, one a layer")
        for modulation in modulations:
            if modulation.ndim != 2 or len(modulation) != batch:
                raise ValueError(f"modulations: got shape {list(modulation.shape)}; expected a row for each of {batch}")


def _add_conditioning(shared: Tensor, by_layer: Tensor | None, by_token: Tensor | None, layer: int) -> Tensor:
    """The conditioning of one layer: [B, D], or [B, N, D] with conditioning by token."""
    if by_layer is not None:
        shared = shared + by_layer[:, layer]
    return shared if by_token is None else shared[:, None] + by_token
