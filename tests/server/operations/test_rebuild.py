"""A space made anew at another size: nothing is lost, every kill is harmless, and older bases stay usable."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from share_core.errors import ConfigError
from share_core.ledger import measure
from share_core.space import task_adapter, update_adapter
from share_core.spec_file import read_spec
from share_core.wire import decode_update
from share_proto.v1 import hub_pb2
from share_server.layout import Layout
from share_server.local import LocalHub
from share_server.operations.rebuild import rebuild
from share_server.operations.verify import verify
from share_server.relay.verify import Checker


def test_a_larger_space_wins_back_what_compactions_dropped(
    server: Path, reopen: Callable[..., LocalHub], live: Callable[[LocalHub], Any], make_payload: Callable[..., bytes]
) -> None:
    made = rebuild(Layout(server), 24)
    assert (made.version, made.k_max, made.tau) == (12, 24, 0.05)
    assert len(made.tasks) == 8
    assert all(task.after <= made.tau < task.before for task in made.tasks), made.tasks
    report = verify(Layout(server), replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal == 12
    hub = reopen(server)
    hub.start()
    life = live(hub)
    old = life.fetch("acme/alice", 5)  # a version before the rebuild, whose coordinates clients may still hold
    payload = make_payload(40, old)
    life.submit("acme/alice", "acme/t3", payload)
    newest = life.fetch("acme/alice")
    assert newest.version == 13
    meant = update_adapter(decode_update(payload, hub.spec), old.bases)
    assert measure(meant, task_adapter(newest, "acme/t3", torch.float64)).bound <= made.tau
    with hub.hub(life.holder("bolt/bob")) as stub:
        assert stub.DescribeSpace(hub_pb2.DescribeSpaceRequest()).k_max == 24
        request = hub_pb2.FollowVersionsRequest(space_id=hub.spec.space_id, since_version=11)
        _, first = itertools.islice(stub.FollowVersions(request, timeout=30.0), 2)
        assert first.snapshot_required.newest_version == 13
        request.since_version = 12
        _, first = itertools.islice(stub.FollowVersions(request, timeout=30.0), 2)
        # What members check: the rebuilt version is signed, and the next one continues it.
        checker = Checker(
            hub.layout.ca_cert.read_bytes(), hub.layout.signing_certificate.read_bytes(), hub.spec.space_id
        )
        fetch = hub_pb2.FetchSnapshotRequest(space_id=hub.spec.space_id, version=12)
        link = checker.whole(next(iter(stub.FetchSnapshot(fetch, timeout=30.0))).header)
        checker.step(first.delta, 12, link)
    assert hub.stop() == 0
    assert verify(Layout(server), replay=True).problems == []


def test_a_smaller_space_is_made_too_and_twice_in_a_row(server: Path, reopen: Callable[..., LocalHub]) -> None:
    assert rebuild(Layout(server), 6, 0.1).version == 12
    spec = read_spec(Layout(server).space)
    assert (spec.k_max, spec.tau) == (6, 0.1)
    again = rebuild(Layout(server), 40)
    assert (again.version, again.tau) == (13, 0.1)
    assert len(again.tasks) == 8
    assert all(task.after <= 0.1 for task in again.tasks)  # from what was submitted, not from what the small one left
    report = verify(Layout(server), replay=True)
    assert report.problems == [] and report.bit_equal == 13
    hub = reopen(server)
    hub.start()
    with pytest.raises(ConfigError, match="already runs"):
        rebuild(Layout(server), 8)


KILL = """
import os, signal, sys
from pathlib import Path
from share_server.layout import Layout
from share_server.operations import rebuild
from share_server.store import versions
from share_server.store.blobs import BlobStore

def die(*rest, **named):
    os.kill(os.getpid(), signal.SIGKILL)

where, root = sys.argv[1:]
if where == "before the payload":
    BlobStore.put = die
elif where == "before the limits":
    rebuild.write_atomic = die
elif where == "before the commit":
    rebuild.commit_version = die
elif where == "after the commit":
    rebuild._put_in_place = die
rebuild.rebuild(Layout(Path(root)), 24)
"""

KILLS = {"before the payload": 11, "before the limits": 11, "before the commit": 11, "after the commit": 12}
"""Where the rebuild is killed, and the version that holds afterwards."""


def _limits_agree(root: Path, version: int) -> bool:
    """Return whether ``space.toml`` holds the limits of the newest version: 24 if it was rebuilt, else 12."""
    return read_spec(Layout(root).space).k_max == (24 if version == 12 else 12)


@pytest.mark.parametrize("where", KILLS)
def test_a_kill_at_any_point_is_healed_by_the_next_start(
    where: str,
    server: Path,
    reopen: Callable[..., LocalHub],
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_program(KILL, where, str(server))
    assert done.returncode == -9, done.stderr
    assert verify(Layout(server)).problems == []
    hub = reopen(server)
    hub.start()
    with hub.hub(hub.own("operator")) as stub:
        space = stub.DescribeSpace(hub_pb2.DescribeSpaceRequest())
    assert (space.version, space.k_max) == (KILLS[where], 24 if KILLS[where] == 12 else 12)
    assert hub.stop() == 0
    assert _limits_agree(server, KILLS[where]) and not Layout(server).space_next.exists()
    assert verify(Layout(server), replay=True).problems == []
    assert rebuild(Layout(server), 24).version == KILLS[where] + 1


UNHEALED = """
import sys
from share_server.hub import __main__, process

async def forgetful(layout, spec):
    return spec

process.settle = forgetful
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_hub_that_does_not_heal_is_found(
    server: Path,
    tmp_path: Path,
    reopen: Callable[..., LocalHub],
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A planted bug: without the healing the rebuilt version runs under the old limits."""
    (tmp_path / "hub.py").write_text(UNHEALED)
    assert run_program(KILL, "after the commit", str(server)).returncode == -9
    hub = reopen(server, tmp_path / "hub.py")
    hub.start()
    assert hub.stop() == 0
    assert not _limits_agree(server, 12)


def test_an_empty_space_only_changes_its_limits(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    assert rebuild(hub.layout, 5).version == 0
    assert read_spec(hub.layout.space).k_max == 5
    with pytest.raises(ConfigError, match="k_max"):
        rebuild(hub.layout, 0)
