"""The optional folder of other people's data beside the project: measurements, topologies, configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2].parent / "shared" / "data"


def data(name: str) -> Path:
    """A file or folder of it. The test is skipped where it is absent: a fresh machine does not need it."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not there: the shared test data is absent")
    return path
