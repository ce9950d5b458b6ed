"""One bench for the crash experiments of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from share_simulations.chaos.lab import Lab, open_lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A lab; every experiment begins by putting its store back, so tests may share it."""
    with open_lab() as made:
        yield made
