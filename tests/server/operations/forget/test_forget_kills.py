"""``share-server forget`` killed at every step: before or after, nothing in between, and the next one ends it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from share_server.operations.forget import forget
from share_server.operations.verify import verify
from share_server.store import forgetting as forgetting_module

KILL = """
import os, signal, sys
from pathlib import Path
from share_server.hub import collecting
from share_server.layout import Layout
from share_server.operations import forget
from share_server.store import forgetting
from share_server.store.blobs import BlobStore

def die(*rest, **named):
    os.kill(os.getpid(), signal.SIGKILL)

def half(self, digests):
    honest(self, digests[: len(digests) // 2])
    die()

honest = BlobStore.remove
POINTS = {
    "before it begins": (forget, "announce_sweep", die),
    "before the originals": (forget, "_keep_originals", die),
    "originals written and not recorded": (collecting, "keep_original", die),
    "before the replay": (forget, "_plan", die),
    "before the payload": (forget, "_write", die),
    "payload written": (forget, "commit_forgotten", die),
    "within the transaction": (forgetting, "chain_collected", die),
    "end of the transaction": (forgetting, "_announce", die),
    "committed": (forget, "sweep", die),
    "half removed": (BlobStore, "remove", half),
    "removed": (forgetting, "_end_sweep", die),
}
if __name__ == "__main__":
    started = {}
    for where, root in zip(POINTS, sys.argv[1:], strict=True):
        if not (child := os.fork()):
            owner, name, planted = POINTS[where]
            if name == "_announce":  # it is called at the beginning, too
                later = owner.chain_collected
                owner.chain_collected = lambda *rest: (setattr(owner, name, planted), later(*rest))[1]
            else:
                setattr(owner, name, planted)
            forget.forget(Layout(Path(root)), "cord")
            os._exit(3)
        started[where] = child
    for where, child in started.items():
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, where
"""

POINTS = (
    "before it begins",
    "before the originals",
    "originals written and not recorded",
    "before the replay",
    "before the payload",
    "payload written",
    "within the transaction",
    "end of the transaction",
    "committed",
    "half removed",
    "removed",
)
DONE = POINTS[POINTS.index("committed") :]
"""From here on the contributor is forgotten."""


@pytest.fixture(scope="module")
def killed(
    lived: Any,
    tmp_path_factory: pytest.TempPathFactory,
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> dict[str, Any]:
    """Copies of one server, each killed at another step."""
    folder = tmp_path_factory.mktemp("killed")
    copies = {where: lived.copy(folder / str(number)) for number, where in enumerate(POINTS)}
    done = run_program(KILL, *(str(one.layout.root) for one in copies.values()))
    assert done.returncode == 0, done.stderr
    return copies


async def _start(engine: Any) -> None:
    """Let a hub start, and stop it again."""


@pytest.mark.parametrize("where", POINTS)
def test_a_kill_leaves_everything_or_nothing(
    where: str, killed: dict[str, Any], expected: Any, forgetting: Any
) -> None:
    past = killed[where]
    report = verify(past.layout)
    assert report.problems == []
    assert report.versions == len(past.groups) + (where in DONE)
    assert any("cut short" in note for note in report.notes) == (where != "before it begins")
    past.open(_start)
    report = verify(past.layout)
    assert report.problems == [] and report.orphans == []  # what was left behind is gone
    assert not any("cut short" in note for note in report.notes)
    if where in DONE:
        assert forgetting.broken(past, expected, "cord") == []
        assert forget(past.layout, "cord").updates == 0
    else:
        assert len(forgetting.traces(past, "cord")) > 3  # nothing of it is lost yet
        forget(past.layout, "cord")
        assert forgetting.broken(past, expected, "cord") == []


def test_a_start_that_does_not_sweep_is_found(past: Any, forgetting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: what a kill has left behind stays for ever, here what was forgotten."""
    forget(past.layout, "cord")
    payload = next(iter(past.of("cord/dan").values()))

    async def leave(engine: Any) -> None:
        await engine.store.io(lambda: engine.store.blobs.put(payload))
        await engine.store.do(forgetting_module.announce_sweep)

    past.open(leave)
    assert forgetting.traces(past, "cord") != []
    with monkeypatch.context() as planted:
        planted.setattr("share_server.hub.engine.sweep", _start)
        past.open(_start)
        assert forgetting.traces(past, "cord") != []
    past.open(_start)
    assert forgetting.traces(past, "cord") == []
