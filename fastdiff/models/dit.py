"""The diffusion transformer of Peebles & Xie (2023), "Scalable Diffusion Models with Transformers".

Between two matrix products a block adds the gated branch to the residual stream, normalises and modulates. Here the
branch that a block leaves is not added at its end but handed on with its gate, so that the addition happens inside
the next site's `gated_residual_adaln`: all sites but the first are one fused operator.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff.backends import with_this_backend
from fastdiff.models.dit_checkpoints import DIFFUSERS_CLASSES, model_folder, read_foreign
from fastdiff.models.dit_config import DiTConfig, preset_config
from fastdiff.models.pretrained import CONFIG_NAME, Pretrained, naming_config
from fastdiff.models.weights import check_counts, check_state
from fastdiff.nn import (
    GatedResidualAdaLayerNorm,
    LabelEmbedding,
    Mlp,
    PatchEmbed,
    SelfAttention,
    TimestepEmbedding,
    sincos_2d,
)


class DiTBlock(nn.Module):
    """Attention and MLP, each before a gate, each after a fused gated-residual AdaLN.

    Takes and returns (residual, branch, gate): the last branch is pending, not yet added to the stream.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        norm = dict(norm=config.norm, elementwise_affine=config.norm_elementwise_affine)
        mlp_eps = config.norm_eps if config.mlp_norm_eps is None else config.mlp_norm_eps
        self.norm1 = GatedResidualAdaLayerNorm(dim, eps=config.norm_eps, **norm)
        self.attn = SelfAttention(dim, config.num_heads, qkv_bias=config.qkv_bias, backend=config.attention)
        self.norm2 = GatedResidualAdaLayerNorm(dim, eps=mlp_eps, **norm)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), activation=config.mlp_activation)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        residual: Tensor,  # [B, N, D]
        branch: Tensor | None,  # [B, N, D]: pending from the block before; None in the first block
        gate: Tensor | None,  # [B, D] or [B, N, D]: its gate
        conditioning: Tensor | None,  # [B, D], or [B, N, D]: a token's own
        modulation: Tensor | None = None,  # [B, 6 * D]: what is made of it, where that is known already
    ) -> tuple[Tensor, Tensor, Tensor]:
        if modulation is None:
            modulation = self.adaLN_modulation(conditioning)
        # Six strided views of one projection; the operators read them in place.
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        residual, x = self.norm1(residual, branch, gate, shift_attn, scale_attn)
        residual, x = self.norm2(residual, self.attn(x), gate_attn, shift_mlp, scale_mlp)
        return residual, self.mlp(x), gate_mlp


class FinalLayer(nn.Module):
    """Adds the pending branch, normalises, modulates and projects each token to the pixels of its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = GatedResidualAdaLayerNorm(dim, norm=config.norm, eps=config.norm_eps)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(
        self,
        residual: Tensor,  # [B, N, D]
        branch: Tensor,  # [B, N, D]
        gate: Tensor,  # as the blocks'
        conditioning: Tensor | None,
        modulation: Tensor | None = None,  # [B, 2 * D]
    ) -> Tensor:
        if modulation is None:
            modulation = self.adaLN_modulation(conditioning)
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(self.norm_final(residual, branch, gate, shift, scale)[1])


class DiT(Pretrained):
    """A class-conditional diffusion transformer.

    Parameter names are those of facebookresearch/DiT. The timestep is taken as it is given: 0 … 999 for discrete
    levels, 1000·t for continuous ones (`fastdiff.diffusion.Diffusion.model_time`).
    """

    config_class = DiTConfig
    title = "a DiT"
    free_fields = ("attention", "class_dropout_prob", "gradient_checkpointing", "input_size")
    also_reads = DIFFUSERS_CLASSES

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
        self.t_embedder, self.y_embedder = _embedders(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        if config.embedders_per_block:  # the first block and the final layer have the two above
            self.block_embedders = nn.ModuleList(nn.ModuleList(_embedders(config)) for _ in self.blocks[1:])
        self.final_layer = FinalLayer(config)
        self.register_buffer("positions", torch.empty(0), persistent=False)
        self.reset_positions()
        self.apply(_initialise)
        for layer in (*self.blocks, self.final_layer):  # adaLN-Zero: each block starts as the identity
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DiT":
        """A model with random weights: "DiT-S/2" … "DiT-XL/8" or "DiT-tiny", with fields of `DiTConfig` replaced.

        Raises ValueError for an unknown name and TypeError for an unknown field.
        """
        return cls(preset_config(name, **overrides))

    def forward(
        self,
        sample: Tensor,  # [B, C, H, W], H and W multiples of the patch size
        timestep: Tensor,  # [B] or a scalar
        class_labels: Tensor | None = None,  # [B] int64 in [0, num_classes]; num_classes is the null label, if any
        *,
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
            layer_conditioning: row l is added to the conditioning vector of block l, the last row also to the final
                layer's.
            token_conditioning: added to the conditioning vector of every block and of the final layer before it is
                modulated, so that each token has its own shift, scale and gate.
            label_generator: where label dropout draws from in training mode; None is torch's generator.
            modulations: rows of what `modulations` gave. Timestep and labels are then known and not looked at again.

        Raises:
            ValueError: a shape that does not fit, modulations beside a conditioning by layer or token, or (on CPU
                tensors) a label out of range.
            TypeError: labels that are not int64.
        """
        x = self.x_embedder(sample)
        batch, tokens, dim = x.shape
        self._check_conditioning(batch, tokens, timestep, class_labels, layer_conditioning, token_conditioning)
        if modulations is None:
            timestep = timestep.expand(batch)
            labels = self._dropped(class_labels, batch, sample.device, label_generator)
            shared = self.t_embedder(timestep) + self.y_embedder(labels)
        else:
            self._check_modulations(len(sample), modulations, layer_conditioning, token_conditioning)

        # Under autocast the patches are bfloat16 and the positions float32: the residual stream is float32.
        residual, branch, gate = x + self._positions(sample), None, None
        for index, block in enumerate(self.blocks):
            if modulations is not None:
                inputs = (residual, branch, gate, None, modulations[index])
            else:
                own = self._own_embedding(index, timestep, labels)
                conditioning = shared if own is None else own
                conditioning = _add_conditioning(conditioning, layer_conditioning, token_conditioning, index)
                inputs = (residual, branch, gate, conditioning)
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                residual, branch, gate = checkpoint(
                    with_this_backend(block), *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                residual, branch, gate = block(*inputs)
        if modulations is not None:
            last = (None, modulations[-1])
        else:
            last = (_add_conditioning(shared, layer_conditioning, token_conditioning, -1),)
        return self._unpatchify(self.final_layer(residual, branch, gate, *last), sample)

    def makes_modulations(self) -> bool:
        """Whether `modulations` stands for what `forward` does: not where a subclass or a layer has its own."""
        plain = all(type(block) is DiTBlock for block in self.blocks) and type(self.final_layer) is FinalLayer
        return plain and type(self).forward is DiT.forward

    @torch.no_grad()
    def modulations(
        self,
        timesteps: Tensor,  # [S]
        class_labels: Tensor,  # [U] int64 in [0, num_classes]
    ) -> list[Tensor]:  # depth of [S, U, 6 * D], then [S, U, 2 * D]
        """The shifts, scales and gates of every layer at each of these times for each of these labels.

        They depend on nothing else, so a sampler that knows its steps needs one matrix product a layer for all of them.
        `forward` takes rows of them as `modulations`. Labels are looked up as they are: none is dropped.

        Raises:
            ValueError: other shapes, or (on CPU tensors) a label out of range.
            TypeError: labels that are not int64.
        """
        self._check_axes(timesteps, class_labels)
        shared = self.t_embedder(timesteps)[:, None] + self.y_embedder(class_labels)
        found = []
        for index, layer in enumerate((*self.blocks, self.final_layer)):
            own = self._own_embedding(index, timesteps, class_labels, outer=True)
            found.append(layer.adaLN_modulation(shared if own is None else own))
        return found

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | str = torch.float32, **options: Any
    ) -> "DiT":
        """Loads a model, in eval mode; its files say which format it has.

        Args:
            path: a folder written by `save_pretrained`; a folder of diffusers' DiTTransformer2DModel, also under its
                older name Transformer2DModel (or a pipeline folder with one in `transformer/`); a facebookresearch/DiT
                file (.pt, or .safetensors with the same names), its EMA weights if it holds both. Wrappers and prefixes
                of training scripts are taken off.
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
        """Makes the positions of the grid trained on again, on the parameters' device; they are not saved."""
        grid, device = self._grid(self.config.image_size), next(self.parameters()).device
        self.positions = self._positions_of(*grid, device=device).to(dtype)

    def _grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size[0] // self.config.patch_size, image_size[1] // self.config.patch_size

    def _positions_of(self, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
        return sincos_2d(rows, columns, self.config.hidden_size, device=device)

    def _positions(self, sample: Tensor) -> Tensor:  # [N, D]
        grid = self._grid(sample.shape[-2:])
        if grid == self._grid(self.config.image_size):
            return self.positions
        return self._positions_of(*grid, device=sample.device).to(self.positions.dtype)

    def _unpatchify(self, patches: Tensor, sample: Tensor) -> Tensor:  # [B, N, p * p * C] -> [B, C, H, W]
        batch, channels = len(patches), self.config.out_channels
        p, (rows, columns) = self.config.patch_size, self._grid(sample.shape[-2:])
        pixels = patches.view(batch, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(batch, channels, rows * p, columns * p)

    def _dropped(self, class_labels: Tensor | None, batch: int, device: torch.device, generator) -> Tensor:  # [B]
        """The labels of a batch, with some dropped in training mode."""
        if class_labels is None:
            if not self.config.null_label:
                raise ValueError("class_labels: got None; this model has no null label: pass a label for each sample")
            class_labels = torch.full((batch,), self.config.num_classes, device=device)
        return self.y_embedder.drop(class_labels, generator)

    def _own_embedding(self, layer: int, timestep: Tensor, labels: Tensor, outer: bool = False) -> Tensor | None:
        """Time and label as a layer embeds them by itself; None where it has those of the first block.

        `outer`: of each time with each label, [S, U, D].
        """
        if not self.config.embedders_per_block or layer in (0, len(self.blocks)):
            return None
        t_embedder, y_embedder = self.block_embedders[layer - 1]
        time = t_embedder(timestep)
        return (time[:, None] if outer else time) + y_embedder(labels)

    def _check_axes(self, timesteps, class_labels):
        for name, tensor in (("timesteps", timesteps), ("class_labels", class_labels)):
            if tensor.ndim != 1:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}; expected one dimension")
        if class_labels.dtype != torch.int64:
            raise TypeError(f"class_labels: got {class_labels.dtype}; expected torch.int64")
        last = len(self.y_embedder.embedding_table.weight) - 1
        if class_labels.device.type == "cpu" and ((class_labels < 0) | (class_labels > last)).any():
            raise ValueError(f"class_labels: got {class_labels.tolist()[:8]}; expected 0 to {last}")

    def _check_modulations(self, batch, modulations, layer_conditioning, token_conditioning):
        if layer_conditioning is not None or token_conditioning is not None:
            raise ValueError("modulations: got them beside layer_conditioning or token_conditioning; expected one")
        if len(modulations) != len(self.blocks) + 1:
            raise ValueError(f"modulations: got {len(modulations)}; expected {len(self.blocks) + 1}, one a layer")
        for modulation in modulations:
            if modulation.ndim != 2 or len(modulation) != batch:
                raise ValueError(f"modulations: got shape {list(modulation.shape)}; expected a row for each of {batch}")

    def _check_conditioning(self, batch, tokens, timestep, class_labels, layer_conditioning, token_conditioning):
        expected = {
            "timestep": (timestep, ((), (1,), (batch,))),
            "class_labels": (class_labels, ((batch,),)),
            "layer_conditioning": (layer_conditioning, ((batch, self.config.depth, self.config.hidden_size),)),
            "token_conditioning": (token_conditioning, ((batch, tokens, self.config.hidden_size),)),
        }
        for name, (tensor, shapes) in expected.items():
            if tensor is not None and tuple(tensor.shape) not in shapes:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}; expected {list(shapes[-1])}")


def _embedders(config: DiTConfig) -> tuple[TimestepEmbedding, LabelEmbedding]:
    time = TimestepEmbedding(
        config.hidden_size, frequency_dim=config.frequency_embedding_size, frequency_shift=config.frequency_shift
    )
    label = LabelEmbedding(
        config.num_classes,
        config.hidden_size,
        dropout_prob=config.class_dropout_prob,
        null_label=config.null_label,
    )
    return time, label


def _add_conditioning(shared: Tensor, by_layer: Tensor | None, by_token: Tensor | None, layer: int) -> Tensor:
    """The conditioning of one layer: [B, D], or [B, N, D] with conditioning by token."""
    if by_layer is not None:
        shared = shared + by_layer[:, layer]
    return shared if by_token is None else shared[:, None] + by_token


def _initialise(module: nn.Module) -> None:
    """DiT's initialisation, but for the zeros of adaLN-Zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LabelEmbedding):
        nn.init.normal_(module.embedding_table.weight, std=0.02)
    elif isinstance(module, TimestepEmbedding):  # apply() visits it after its own linear layers
        nn.init.normal_(module.mlp[0].weight, std=0.02)
        nn.init.normal_(module.mlp[2].weight, std=0.02)
