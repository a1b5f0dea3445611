"""Pictures are tested by what matplotlib was given to draw."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order."""
    saved, savefig = [], Figure.savefig

    def record(figure, *arguments, **options):
        saved.append(figure)
        return savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved
