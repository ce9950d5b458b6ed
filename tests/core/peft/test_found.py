"""Adapters by strangers and of the 22 text tasks: all of ``shared/data/adapters`` is read and written."""

from __future__ import annotations

from pathlib import Path

import pytest

from share_core.linalg import difference_norm, product_norm
from share_core.peft.reader import read_adapter
from share_core.peft.writer import write_adapter

ADAPTERS = Path(__file__).parents[4] / "shared" / "data" / "adapters"
DIRECTORIES = sorted(path.parent for path in ADAPTERS.rglob("adapter_config.json"))
pytestmark = pytest.mark.skipif(not DIRECTORIES, reason=f"needs the real adapters in {ADAPTERS}")


def test_all_are_read_and_written(tmp_path: Path) -> None:
    assert len(DIRECTORIES) >= 32
    for number, directory in enumerate(DIRECTORIES):
        adapter = read_adapter(directory)
        assert adapter.notes == (), directory
        assert adapter.prefix in ("", "roberta.", "distilbert.", "vit.", "transformer."), directory
        assert not any(name.startswith(adapter.prefix or "bert.") for name in adapter.sites), directory
        write_adapter(tmp_path / str(number), adapter.factors, adapter.export)
        again = read_adapter(tmp_path / str(number))
        assert again.sites == adapter.sites
        for name, f in adapter.factors.items():
            apart = difference_norm(f.out, f.in_, again.factors[name].out, again.factors[name].in_)
            assert apart <= 1e-6 * product_norm(f.out, f.in_), (directory, name)


def test_adapters_of_one_backbone_share_their_sites() -> None:
    for pool in {path.parent for path in DIRECTORIES}:
        found = [set(read_adapter(path).sites) for path in DIRECTORIES if path.parent == pool]
        largest = max(found, key=len)
        assert all(sites <= largest for sites in found), pool
