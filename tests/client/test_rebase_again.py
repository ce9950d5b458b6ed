"""One training that waits through several horizons of the hub: expressed anew each time, never worse, never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from share_client.outbox import Entry, Outbox, Training
from share_client.rebase import MOST_REBASES, Rebaser, kept_adapter
from share_core.linalg import difference_norm, product_norm
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import update_adapter
from share_core.types import Adapter, Core, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import decode_update, encode_update


def versions(spec: SpaceSpec, fake: Any, count: int) -> list[Space]:
    """Return the versions from 0 to ``count``."""
    state = empty_state(spec)
    made = [state.space]
    for seed in range(1, count + 1):
        adapter = update_adapter(fake.make_update(state.space, seed), state.space.bases)
        state = merge(state, f"org/t{seed}", adapter, MergePolicy(k_max=32)).state
        made.append(state.space)
    return made


def coordinates(space: Space) -> Update:
    """Return an update that is made of cores alone."""
    draw = torch.Generator().manual_seed(3)
    cores = {
        name: Core(torch.randn(basis.k_out, 2, generator=draw), torch.randn(basis.k_in, 2, generator=draw))
        for name, basis in space.bases.items()
    }
    return Update(space.version, {name: SiteUpdate(core=core) for name, core in cores.items()})


def distance(a: Adapter, b: Adapter) -> float:
    """Return the largest relative difference over the sites."""
    return max(
        float(difference_norm(a[site].out, a[site].in_, b[site].out, b[site].in_))
        / float(product_norm(a[site].out, a[site].in_))
        for site in a
    )


def put(outbox: Outbox, update: Update, space: Space) -> Entry:
    training = Training("task", "hash", space.version, loss=0.1, steps=1, seconds=1.0, rows=5)
    kept = kept_adapter(update, space)
    return outbox.put(
        encode_update(update), b"head", training, space_id="s", task_id="org/task", create=True, adapter=kept
    )


@pytest.mark.parametrize("kind", ["free factors", "coordinates"])
def test_a_training_is_expressed_as_often_as_promised(kind: str, spec: SpaceSpec, fake: Any, tmp_path: Path) -> None:
    """The first payload may need no bases; the next ones do, and what they mean without any must be kept by then."""
    history = versions(spec, fake, 9)
    base = history[3]
    if kind == "coordinates":
        update = coordinates(base)
    else:  # inside of what the newer bases span, so that coordinates are the smaller form there
        adapter = update_adapter(coordinates(base), base.bases)
        update = Update(base.version, {site: SiteUpdate(residual=factors) for site, factors in adapter.items()})
    before = update_adapter(update, base.bases)
    outbox = Outbox(tmp_path / "outbox")
    entry = put(outbox, update, base)
    for times in range(1, MOST_REBASES + 1):
        newest = history[3 + 2 * times]
        rebaser = Rebaser(spec, lambda newest=newest: newest, lambda v=newest.version: (v, v))  # type: ignore[misc]
        made = rebaser.express(entry)
        assert made is not None, f"only {times - 1} times"
        entry = outbox.rebase(entry, made.payload, made.space.version, False, made.adapter)
        now = decode_update(entry.read_payload(), spec)
        assert any(part.core is not None for part in now.sites.values()), "so bases are needed to read it"
        assert distance(before, update_adapter(now, newest.bases)) < 1e-6
    assert [kept.update_id for kept in outbox.entries()] == [entry.update_id]
    assert rebaser.express(entry) is None, "by now it is old"
