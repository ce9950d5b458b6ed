"""A contributor is forgotten: the space is to the bit what the others' updates give, and nothing of it stays."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from share_core.errors import ConfigError, RebaseError, TaskNameError
from share_core.mixing import Staleness
from share_core.wire import decode_snapshot, encode_snapshot
from share_server.config import MergeConfig
from share_server.hub.engine import Engine
from share_server.operations import forget as forget_module
from share_server.operations.backup import backup_stopped
from share_server.operations.checks import Rows
from share_server.operations.forget import forget
from share_server.operations.restore import restore
from share_server.operations.verify import verify
from share_server.store.blobs import BlobStore
from share_server.store.journal import Journal
from share_server.store.records import UpdateRow
from share_server.store.versions import read_version


def test_forgetting_after_a_hundred_merges_is_the_replay_of_the_others(tmp_path: Path, forgetting: Any) -> None:
    past = forgetting.lived(tmp_path / "server", 103, every=20)
    expected = forgetting.replayed(past, tmp_path / "fresh", "cord")
    done = forget(past.layout, "cord")
    assert forgetting.broken(past, expected, "cord") == []
    report = verify(past.layout, replay=True)
    assert report.problems == [] and report.orphans == []
    assert report.replayed == report.bit_equal == 1
    assert done.version == 104 and done.vanished == ("cord/a", "cord/b", "cord/waits")
    assert [task.task_id for task in done.tasks] == ["acme/a", "acme/b", "bolt/a", "bolt/b", "cord/shared"]
    assert done.tasks[-1].change > 0.1  # the shared task has lost a part of what it was made of


def _leave_one(honest: Any) -> Any:
    """Forget all but one merged update."""

    def split(journal: Journal, name: str) -> tuple[list[UpdateRow], list[UpdateRow]]:
        own, others = honest(journal, name)
        left = next(row for row in own if row.version)
        return [row for row in own if row is not left], [*others, left]

    return split


def _wrong_order(honest: Any) -> Any:
    """Take the updates of every version the other way round."""

    def rows(journal: Any, head: int) -> Rows:
        found: Rows = honest(journal, head)
        return replace(found, versions=[replace(row, updates=row.updates[::-1]) for row in found.versions])

    return rows


async def _nothing(*_: object) -> None:
    """Do nothing."""


def _no_delete(honest: Any) -> Any:
    def change(self: Journal, statement: str, values: Sequence[Any] = ()) -> int:
        return 0 if "DELETE FROM evaluations" in statement else honest(self, statement, values)

    return change


BUGS: dict[str, tuple[Any, str, Callable[[Any], Any], str]] = {
    "one update is left in": (forget_module, "_split", _leave_one, "the snapshot is not"),
    "a wrong order": (forget_module, "_rows", _wrong_order, "the snapshot is not"),
    "ages do not count": (Staleness, "weight", lambda _: lambda *_: 1.0, "the snapshot is not"),
    "payloads stay": (BlobStore, "erase", lambda _: lambda *_: 0, "holds what was forgotten"),
    "originals are not kept": (forget_module, "_keep_originals", lambda _: _nothing, "no longer kept"),
    "evaluations stay": (Journal, "change", _no_delete, "evaluations of a task"),
}


@pytest.mark.parametrize("bug", ["", *BUGS])
def test_planted_bugs_are_found(
    bug: str, past: Any, expected: Any, forgetting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = "\0"
    if bug:
        owner, name, mutant, sign = BUGS[bug]
        monkeypatch.setattr(owner, name, mutant(getattr(owner, name)))
    problems: list[str] = []
    try:
        forget(past.layout, "cord")
        problems = forgetting.broken(past, expected, "cord")
    except (RebaseError, ConfigError, AssertionError) as error:
        problems = [str(error)]
    assert any(sign in problem for problem in problems) == bool(bug), problems


def test_members_one_after_the_other_are_the_organisation_at_once(past: Any, expected: Any, forgetting: Any) -> None:
    snapshot, ledger = expected
    first = forget(past.layout, "cord/cid")
    assert "cord/waits" in first.vanished and {"cord/a", "cord/b"} & {task.task_id for task in first.tasks}
    assert verify(past.layout, replay=True).problems == []
    second = forget(past.layout, "cord/dan")
    assert second.version == first.version + 1
    report = verify(past.layout, replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal == 1
    made: list[bytes] = []

    async def look(engine: Engine) -> None:
        row = await engine.store.do(lambda journal: read_version(journal, second.version))
        assert row.snapshot_sha256 is not None
        made.append(engine.store.blobs.read(row.snapshot_sha256))
        assert dict(engine.feed.state.ledger) == ledger

    past.open(look)
    space = decode_snapshot(made[0], past.spec)
    assert encode_snapshot(replace(space, version=first.version)) == snapshot
    assert forgetting.traces(past, "cord") == []
    again = forget(past.layout, "cord")
    assert (again.version, again.updates, again.tasks) == (second.version, 0, ())


def test_the_hub_goes_on_from_it_and_earlier_versions_are_gone(past: Any, tmp_path: Path, forgetting: Any) -> None:
    made = forget(past.layout, "cord").version

    async def go_on(engine: Engine) -> None:
        assert engine.feed.version == engine.feed.oldest == made
        for version in range(1, made):
            assert await engine.published.whole_is_better(version)  # followers are sent to the whole version
            for fetched in (
                engine.published.whole(version),
                engine.published.step(version),
                engine.history.bases(version),
            ):
                with pytest.raises(RebaseError, match=f"fetch version {made}"):
                    await fetched
        payload = forgetting.payload(5, past.spaces[made - 2])
        with pytest.raises(RebaseError, match="no longer kept"):
            await forgetting.take(engine, forgetting.new("bolt/bob", "bolt/a", made - 2, payload), payload)
        await forgetting.merge_waiting(engine)  # of others, based on versions that are gone
        assert engine.feed.state.space.cores.keys() >= {"acme/waits", "dusk/waits"}
        payload = forgetting.payload(6, engine.feed.state.space)
        new = forgetting.new("cord/cid", "cord/a", engine.feed.version, payload)  # it may come back
        await forgetting.take(engine, new, payload)
        await forgetting.merge_waiting(engine)
        assert "cord/a" in engine.feed.state.space.cores

    past.open(go_on)
    report = verify(past.layout, replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal > 1
    backup_stopped(past.layout, tmp_path / "backup")
    assert restore(tmp_path / "backup", tmp_path / "again") == report.versions
    report = verify(replace(past.layout, root=tmp_path / "again"), replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal > 1


def test_a_dry_run_says_what_would_be_and_changes_nothing(
    past: Any, forgetting: Any, fingerprint: Callable[[Path], Mapping[str, object]]
) -> None:
    before = fingerprint(past.layout.root)
    said = forget(past.layout, "cord/cid", dry_run=True)
    assert fingerprint(past.layout.root) == before and said.dry_run
    done = forget(past.layout, "cord/cid")
    assert replace(done, dry_run=True, tasks=()) == replace(said, tasks=())
    for one, other in zip(said.tasks, done.tasks, strict=True):  # originals are rounded to float32, which this one kept
        assert one.task_id == other.task_id
        assert dataclasses.astuple(one)[1:] == pytest.approx(dataclasses.astuple(other)[1:], abs=1e-5)


def test_what_was_never_merged_makes_no_version(past: Any, forgetting: Any) -> None:
    done = forget(past.layout, "dusk")
    assert (done.version, done.updates, done.vanished) == (len(past.groups), 1, ("dusk/waits",))
    assert forgetting.traces(past, "dusk") == []
    report = verify(past.layout, replay=True)
    assert report.problems == [] and report.replayed == len(past.groups)


def test_whoever_is_not_there_cannot_be_forgotten(past: Any) -> None:
    with pytest.raises(ConfigError, match="cord/cid, cord/dan"):
        forget(past.layout, "zeta")
    with pytest.raises(TaskNameError, match="organisation or member"):
        forget(past.layout, "../etc")


def test_a_running_hub_is_left_alone(past: Any) -> None:
    async def meanwhile(engine: Engine) -> None:
        with pytest.raises(ConfigError, match="stop it first"):
            await engine.store.io(lambda: forget(past.layout, "cord"))
        with pytest.raises(ConfigError, match="stop it first"):
            await engine.store.io(lambda: forget(past.layout, "cord", dry_run=True))

    past.open(meanwhile)
    assert verify(past.layout).versions == len(past.groups)


def test_what_the_retention_policy_makes_impossible_is_refused(tmp_path: Path, forgetting: Any) -> None:
    """A step of FedBuff is the difference to what the task was in its base: where that is gone, so is the step."""
    config = replace(forgetting.config, merge=MergeConfig(mixing="fedbuff"))
    past = forgetting.lived(tmp_path / "server", 8, config)
    forget(past.layout, "cord/cid")
    report = verify(past.layout, replay=True)
    assert report.problems == [] and any("cannot be made anew" in note for note in report.notes)
    with pytest.raises(ConfigError, match="nothing was forgotten"):
        forget(past.layout, "bolt")
    assert verify(past.layout).problems == []


def test_rows_that_say_otherwise_than_the_chain_are_found(
    past: Any, rewrite: Callable[[Path, str], None], forgetting: Any
) -> None:
    rewrite(past.layout.root, "UPDATE updates SET state = 'FORGOTTEN' WHERE task_id = 'dusk/waits'")
    assert any("FORGOTTEN, which was not chained" in problem for problem in verify(past.layout).problems)
    rewrite(past.layout.root, "UPDATE updates SET state = 'ACCEPTED' WHERE task_id = 'dusk/waits'")
    forget(past.layout, "cord")
    rewrite(past.layout.root, "UPDATE updates SET state = 'REFUSED' WHERE task_id = 'cord/waits'")
    assert any("REFUSED, which was not chained" in problem for problem in verify(past.layout).problems)


def test_the_command_says_the_same(past: Any, run_command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    said = run_command("forget", str(past.layout.root), "cord", "--dry-run", "--json")
    assert said.returncode == 0 and json.loads(said.stdout)["updates"] > 0, said.stderr
    done = run_command("forget", str(past.layout.root), "cord")
    assert done.returncode == 0 and "task cord/a is gone" in done.stdout, done.stderr
    assert f"version {len(past.groups) + 1} is the newest" in done.stdout
    assert "others may have trained in bases that cord helped to shape" in done.stdout
