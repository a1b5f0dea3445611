"""Problems for unmask_, and what the reference makes of them: for tests of every backend."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdiff.kernels.unmask import reference
from fastdiff.ops.token_sampling import TokenSample

RULES = ("count", "threshold", "factor", "entropy_budget", "ancestral")
ORDERS = ("confidence", "margin", "entropy", "random")
MASK = 40  # ids are below 50
# The number of each rule: one that commits several candidates and not all.
NUMBERS = {"count": 3, "threshold": 0.5, "factor": 1.25, "entropy_budget": 1.5, "ancestral": 0.3}
KINDS = ("plain", "ties", "blocks", "rows", "odd values", "nothing to do")


def numbers(rule: str, value: float | Tensor) -> dict[str, float | Tensor]:
    """The rule's number as the keyword that unmask_ takes."""
    return {"probability" if rule == "ancestral" else rule: value}


@dataclass
class Problem:
    token_ids: Tensor  # int64 [B, L]
    sample: TokenSample  # [B, L], or [R] with rows
    optional: dict[str, Tensor] = field(default_factory=dict)  # rows, block_start, block_end, active, sequence_ids

    def dense(self) -> TokenSample:
        """The sample as [B, L]; token -1 where it has no entry."""
        if "rows" not in self.optional:
            return self.sample
        fields = []
        for t in self.sample[:4]:
            full = torch.full(self.token_ids.shape, -1).to(t.dtype)
            for entry, row in enumerate(self.optional["rows"].tolist()):
                if row >= 0:
                    full.view(-1)[row] = t[entry]
            fields.append(full)
        return TokenSample(*fields)

    def expected(self, rule: str, order: str, value: float | Tensor, seed: int = 0, step: int = 0):
        """(token_ids, committed) of the reference."""
        batch, length = self.token_ids.shape
        default = {
            "block_start": torch.zeros(batch, dtype=torch.int64), "block_end": torch.full((batch,), length),
            "active": torch.ones(batch, dtype=torch.bool), "sequence_ids": torch.arange(batch),
        }  # fmt: skip
        o = default | self.optional
        value = value if isinstance(value, Tensor) else torch.full((batch,), float(value), dtype=torch.float64)
        return reference.unmask(
            self.token_ids, *self.dense()[:4], o["block_start"], o["block_end"], o["active"], rule, order, value, MASK,
            torch.tensor(seed), torch.tensor(step), o["sequence_ids"],
        )  # fmt: skip


def problem(kind: str, batch: int, length: int, seed: int = 0) -> Problem:
    """A random problem of one of KINDS."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g)

    token_ids = torch.randint(50, (batch, length), generator=g)
    masked = rand(batch, length) < torch.linspace(0.2, 1, batch)[:, None]
    token_ids = torch.where(masked, MASK, token_ids)
    token = torch.randint(50, (batch, length), generator=g)  # some are the mask token
    token = torch.where(rand(batch, length) < 0.05, -1, token)
    scores = [-3 * rand(batch, length), 2 * rand(batch, length), rand(batch, length)]
    if kind == "ties":  # quarters: sums and comparisons meet the rules' numbers exactly
        scores = [(4 * t).round() / 4 for t in scores]
        token_ids[0] = MASK
        for t in scores:
            t[0] = t[0, 0]  # a row whose scores are all equal
    if kind == "odd values":
        odd = ((-torch.inf, 0.0, -0.0, 1e-40), (torch.inf, -0.0, 0.0, -0.25), (-0.0, 1.0))  # log_prob, entropy, margin
        for t, values in zip(scores, odd, strict=True):
            for value in (torch.nan, *values):
                t[rand(batch, length) < 0.12] = value
        if batch > 1:
            for t in scores:
                t[1] = torch.nan
    made = Problem(token_ids, TokenSample(token, *scores))
    if kind == "blocks":
        made.optional = {
            "block_start": torch.randint(-2, length + 1, (batch,), generator=g),
            "block_end": torch.randint(0, length + 3, (batch,), generator=g),
            "active": rand(batch) < 0.8,
            "sequence_ids": torch.randint(0, 2**40, (batch,), generator=g),
        }
    if kind == "rows":  # some of the positions, in no order, with fillers
        chosen = torch.randperm(batch * length, generator=g)[: max(1, batch * length * 2 // 3)]
        rows = torch.where(rand(len(chosen)) < 0.1, -1, chosen)
        made.sample = TokenSample(*(t.flatten()[chosen] for t in made.sample[:4]))
        made.optional = {"rows": rows}
    if kind == "nothing to do":
        made.token_ids[::2] = 1
        made.sample.token[1::2] = MASK
    return made
