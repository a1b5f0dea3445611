"""Tables: one token per column, numbers and categories."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.qgfd.adapters.base import (
    Adapter,
    AdapterConfig,
    Batch,
    Latents,
    LatentShape,
    TokenStack,
    grid_positions,
    no_lengths,
    unit_scale,
)
from fastdiff.models.qgfd.backbone import QGFDConfig


@dataclass
class TabularAdapterConfig(AdapterConfig):
    """Settings of `TabularAdapter`, beside those of `AdapterConfig`; it has no Hugging Face encoder.

    Attributes:
        num_numbers: Columns of numbers.
        category_sizes: Number of categories of each such column.
    """

    num_numbers: int = 0
    category_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.category_sizes = tuple(self.category_sizes)
        self.at_least(0, "num_numbers")
        self.at_least(1, "category_sizes")
        if self.backbone_name is not None or self.backbone_config is not None:
            raise ValueError(
                f"backbone_name: got {self.backbone_name!r}; modality 'tabular' has no Hugging Face encoder: "
                "leave it out"
            )


class TabularAdapter(Adapter):
    """Diffusion over the columns of a table's rows.

    Batches are {"numbers" [B, N] standardised, "categories" int64 [B, K], "labels" int64 [B] (optional)}; either of
    the first two may be left out where the table has none. L = N + K, numbers first. `fastdiff.data.TableSchema`
    makes them. Raises ValueError for a table without columns.
    """

    modality = "tabular"
    fields = ("numbers", "categories")

    def __init__(self, config: TabularAdapterConfig, qgfd: QGFDConfig) -> None:
        super().__init__(config, qgfd)
        dim, numbers, sizes = config.hidden_size, config.num_numbers, config.category_sizes
        if numbers + len(sizes) == 0:
            raise ValueError("TabularAdapterConfig: got no columns; expected num_numbers or category_sizes above 0")
        if numbers:
            self.number_weight = nn.Parameter(torch.randn(numbers, dim))
            self.number_bias = nn.Parameter(torch.randn(numbers, dim))
            self.number_head = nn.Parameter(torch.randn(numbers, dim) * dim**-0.5)
            self.number_offset = nn.Parameter(torch.zeros(numbers))
        self.category_embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)
        self.category_heads = nn.ModuleList(nn.Linear(dim, size) for size in sizes)
        self.encoder = TokenStack(dim, self.latent_dim, self.block_config, config.encoder_layers)
        self.decoder = TokenStack(self.latent_dim, dim, self.block_config, config.decoder_layers)

    def encode(self, batch: Batch) -> Latents:
        numbers, categories = self._columns(batch)
        tokens = []
        if self.config.num_numbers:
            tokens.append(F.gelu(numbers[..., None] * self.number_weight + self.number_bias))
        columns = zip(self.category_embeddings, categories.unbind(1), strict=True) if categories is not None else ()
        tokens += [embedding(column)[:, None] for embedding, column in columns]
        tokens = torch.cat(tokens, 1)
        positions = grid_positions(tokens.shape[1], device=tokens.device)
        return Latents(unit_scale(self.encoder(tokens, None, positions)), None, positions)

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """{"numbers" [B, N] (standardised), "categories" [B, K]}: the mean, and the likeliest category."""
        numbers, logits = self._heads(tokens)
        table = {}
        if numbers is not None:
            table["numbers"] = numbers
        if logits:
            table["categories"] = torch.stack([scores.argmax(-1) for scores in logits], 1)
        return table

    def reconstruction_loss(self, batch: Batch, latents: Latents) -> Tensor:  # [B]
        """Mean over the columns of squared error (numbers) and cross entropy (categories)."""
        numbers, categories = self._columns(batch)
        made, logits = self._heads(latents.tokens)
        errors = [] if made is None else [(made.float() - numbers).square()]
        for column, scores in enumerate(logits):
            errors.append(F.cross_entropy(scores.float(), categories[:, column], reduction="none")[:, None])
        return torch.cat(errors, 1).mean(1)

    def latent_length(self, batch: Batch) -> int:
        return self.config.num_numbers + len(self.config.category_sizes)

    def sample_shape(
        self, count: int, length: int | Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> LatentShape:
        no_lengths(self.modality, length)
        columns = self.config.num_numbers + len(self.config.category_sizes)
        return LatentShape(columns, None, grid_positions(columns, device=device))

    def _heads(self, tokens: Tensor) -> tuple[Tensor | None, list[Tensor]]:  # numbers [B, N]; logits by column
        states = self.decoder(tokens, None, grid_positions(tokens.shape[1], device=tokens.device))
        count, numbers = self.config.num_numbers, None
        if count:
            numbers = (states[:, :count] * self.number_head).sum(-1) + self.number_offset
        columns = states[:, count:].unbind(1)
        return numbers, [head(column) for head, column in zip(self.category_heads, columns, strict=True)]

    def _columns(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        numbers, categories = batch.get("numbers"), batch.get("categories")
        expected = {"numbers": self.config.num_numbers, "categories": len(self.config.category_sizes)}
        for name, tensor in (("numbers", numbers), ("categories", categories)):
            given = None if tensor is None else list(tensor.shape)
            if (tensor is None and expected[name]) or (tensor is not None and given[1:] != [expected[name]]):
                raise ValueError(f"{name}: got shape {given}; expected [B, {expected[name]}]")
        # looking would stall a GPU
        if numbers is not None and numbers.device.type == "cpu" and not torch.isfinite(numbers).all():
            raise ValueError("numbers: got values that are missing or infinite; drop such rows, or fill them in first")
        if categories is not None and categories.device.type == "cpu":
            for column, size in enumerate(self.config.category_sizes):
                values = categories[:, column]
                if len(values) and not (0 <= int(values.min()) and int(values.max()) < size):
                    raise ValueError(
                        f"categories: got {int(values.min())}..{int(values.max())} in column {column}; expected "
                        f"0..{size - 1}"
                    )
        return numbers, categories
