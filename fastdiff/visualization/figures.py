"""Figures as files, whole or not at all."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from fastdiff.files import write_atomically

REAL, SYNTHETIC = "#0072B2", "#D55E00"  # Okabe & Ito's, which colour-blind readers tell apart


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Writes a PNG; what was there before stays until the new one is on the disk."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_atomically(Path(path), content.getvalue())
    return Path(path)
