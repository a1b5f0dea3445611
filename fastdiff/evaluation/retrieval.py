"""Is a sample nearest to the picture that was asked for? Retrieval among candidates, in a space of features."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RetrievalReport:
    """How samples find their pictures among candidates.

    Attributes:
        samples, candidates: how many.
        first: share whose picture is the nearest candidate.
        among_five: share whose picture is one of the five nearest.
        mean_rank: mean place of the right picture, 1 where it is the nearest.
        chance: what `first` is for samples drawn blindly.
        nearest: index of the nearest candidate of each sample.
    """

    samples: int
    candidates: int
    first: float
    among_five: float
    mean_rank: float
    chance: float
    nearest: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """As a table."""
        rows = [
            (f"{self.samples} samples among {self.candidates} candidates", "share"),
            ("---", "---:"),
            ("the right picture is nearest", f"{self.first:.1%}"),
            ("it is among the five nearest", f"{self.among_five:.1%}"),
            ("by chance", f"{self.chance:.1%}"),
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\nmean rank {self.mean_rank:.2f}"


def retrieval(
    samples: Tensor,  # [N, F]
    candidates: Tensor,  # [M, F]
    targets: Tensor,  # int [N]
) -> RetrievalReport:
    """Ranks the candidates of each sample by the cosine of their features, from which the candidates' mean is taken.

    Args:
        samples, candidates: features, such as those of `fastdiff.evaluation.image_features`.
        targets: the candidate that each sample should be. A candidate as near as it counts as nearer: copies of the
            right picture, and features that do not differ, are no success.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 candidates, or a target that is none.
    """
    fits = samples.ndim == candidates.ndim == 2 and samples.shape[1] == candidates.shape[1]
    if not fits or len(candidates) < 2 or not len(samples) or tuple(targets.shape) != (len(samples),):
        raise ValueError(
            f"samples: got shape {tuple(samples.shape)}, candidates {tuple(candidates.shape)} and targets "
            f"{tuple(targets.shape)}; expected [N, F], [M, F] with M >= 2, and [N]"
        )
    if not 0 <= int(targets.min()) <= int(targets.max()) < len(candidates):
        raise ValueError(
            f"targets: got {int(targets.min())} … {int(targets.max())}; expected 0 … {len(candidates) - 1}"
        )
    mean = candidates.double().mean(dim=0)
    similarity = F.normalize(samples.double() - mean, dim=1) @ F.normalize(candidates.double() - mean, dim=1).T
    rows = torch.arange(len(samples))
    own = similarity[rows, targets.long()]
    ranks = (similarity >= own[:, None]).sum(dim=1).double()  # itself, too
    return RetrievalReport(
        len(samples),
        len(candidates),
        float((ranks == 1).double().mean()),
        float((ranks <= 5).double().mean()),
        float(ranks.mean()),
        1 / len(candidates),
        tuple(similarity.argmax(dim=1).tolist()),
    )
