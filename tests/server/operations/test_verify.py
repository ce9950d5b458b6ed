"""Verification finds every damage that is planted, all at once, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from share_core.errors import ConfigError
from share_core.identity import make_authority, make_signer
from share_core.merge import Merged, merge_all
from share_core.types import Adapter, Factors, SpaceSpec
from share_server.hub import stepping
from share_server.layout import Layout
from share_server.local import LocalHub
from share_server.operations.verify import verify
from share_server.provision import SIGNER

Rewrite = Callable[[Path, str], None]


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def _payload(root: Path, column: str) -> Path:
    """Return the payload file of some version (``delta_sha256``, ``snapshot_sha256``) or update (``sha256``)."""
    table = "updates" if column == "sha256" else "versions"
    with sqlite3.connect(root / "store" / "journal.db") as other:
        digest = str(other.execute(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL").fetchone()[0])
    other.close()
    found = root / "store" / "blobs" / digest[:2] / digest
    assert found.is_file()
    return found


def _foreign_signer(root: Path) -> None:
    authority, key = make_authority("somebody else", datetime.now(UTC))
    certificate, _ = make_signer(authority, key, SIGNER, datetime.now(UTC), 30)
    Layout(root).signing_certificate.write_bytes(certificate)


DAMAGE: dict[str, tuple[Callable[[Path, Rewrite], object], str]] = {
    "page": (lambda root, _: _flip(root / "store/journal.db", 3 * 4096 + 9), "page 4 of the journal is damaged"),
    "journal cut": (lambda root, _: os.truncate(root / "store/journal.db", 5 * 4096), "the journal ends after 5"),
    "page sums": (lambda root, _: _flip(root / "store/journal.sums", 40), "page sums"),
    "anchor": (lambda root, _: _flip(root / "store/anchor", 40), "anchor"),
    "anchor gone": (lambda root, _: (root / "store/anchor").unlink(), "anchor (store/anchor) is gone"),
    "end lost": (
        lambda root, sql: sql(root, "UPDATE meta SET value = '3' WHERE name = 'transactions'"),
        "its end is lost",
    ),
    "entry": (
        lambda root, sql: sql(root, "UPDATE entries SET body = body || ' ' WHERE seq = 3"),
        "entry 3 of the hash chain was changed",
    ),
    "entry exchanged": (
        lambda root, sql: sql(root, "UPDATE entries SET hash = zeroblob(32) WHERE seq = 5"),
        "breaks before entry 6",
    ),
    "update": (
        lambda root, sql: sql(root, "UPDATE updates SET task_id = 'acme/t2' WHERE ingest_seq = 2"),
        "does not say what was chained",
    ),
    "version": (
        lambda root, sql: sql(root, "UPDATE versions SET delta_size = delta_size + 1 WHERE version = 4"),
        "the manifest of version 4 is of something else",
    ),
    "policy": (
        lambda root, sql: sql(root, "UPDATE versions SET policy = replace(policy, '0.05', '0.06') WHERE version = 4"),
        "version 4 does not say what was chained",
    ),
    "signature": (
        lambda root, sql: sql(root, "UPDATE versions SET signature = zeroblob(64) WHERE version = 5"),
        "version 5: manifest: the signature is not the hub's",
    ),
    "other signer": (lambda root, _: _foreign_signer(root), "manifests: "),
    "member": (
        lambda root, sql: sql(root, f"UPDATE members SET key_sha256 = '{'0' * 64}' WHERE member = 'bolt/bob'"),
        "member bolt/bob has another key",
    ),
    "sharing": (
        lambda root, sql: sql(root, "UPDATE tasks SET sharing = '' WHERE task_id = 'acme/shared'"),
        "shared on other terms",
    ),
    "counter": (
        lambda root, sql: sql(root, "UPDATE tasks SET updates = 9 WHERE task_id = 'acme/t2'"),
        "task acme/t2 counts other",
    ),
    "collected": (
        lambda root, sql: sql(root, "UPDATE versions SET collected = 1 WHERE version = 1"),
        "version 1 is collected, which was not chained",
    ),
    "sizes": (
        lambda root, sql: sql(root, "UPDATE versions SET sizes = replace(sizes, '[2', '[1') WHERE version = 1"),
        "version 1 has other sizes",
    ),
    "ledger": (
        lambda root, sql: sql(
            root, 'UPDATE tasks SET ledger = replace(ledger, \'"bounds": {"a": 5\', \'"bounds": {"a": 4\')'
        ),
        "than its ledger says",
    ),
    "step damaged": (lambda root, _: _flip(_payload(root, "delta_sha256"), 200), "is damaged"),
    "snapshot damaged": (lambda root, _: _flip(_payload(root, "snapshot_sha256"), 200), "is damaged"),
    "update gone": (lambda root, _: _payload(root, "sha256").unlink(), "is missing"),
    "journal gone": (lambda root, _: (root / "store/journal.db").unlink(), "journal.db) is gone"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_planted_damage_is_found(name: str, server: Path, rewrite: Rewrite) -> None:
    damage, expected = DAMAGE[name]
    damage(server, rewrite)
    problems = verify(Layout(server)).problems
    assert any(expected in problem for problem in problems), problems


def test_all_problems_are_found_at_once(server: Path, rewrite: Rewrite) -> None:
    together = ["version", "signature", "member", "counter", "step damaged", "update gone"]
    for name in together:
        DAMAGE[name][0](server, rewrite)
    problems = verify(Layout(server)).problems
    for name in together:
        assert any(DAMAGE[name][1] in problem for problem in problems), (name, problems)


def test_a_sound_store_holds_and_is_not_changed(
    server: Path, fingerprint: Callable[[Path], Mapping[str, object]]
) -> None:
    before = fingerprint(server)
    report = verify(Layout(server), replay=True)
    assert report.problems == []
    assert (report.versions, report.updates) == (11, 11)
    assert report.replayed == report.bit_equal == 11  # this build made them
    assert report.ledger_violations == 0 and report.orphans == []
    assert fingerprint(server) == before


def test_the_command_says_the_same(server: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    command = ["verify", str(server), "--replay", "--json"]
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert (said["versions"], said["bit_equal"], said["problems"]) == (11, 11, [])
    _flip(_payload(server, "sha256"), 100)
    done = run_command(*command)
    assert done.returncode == 1 and "is damaged" in json.loads(done.stdout)["problems"][0]


def test_what_a_crash_left_is_listed_and_no_problem(server: Path) -> None:
    rest = server / "store" / "blobs" / "ab" / ("ab" * 32)
    rest.parent.mkdir(exist_ok=True)
    rest.write_bytes(b"left over")
    report = verify(Layout(server))
    assert report.orphans == [rest.name] and report.problems == []


def test_payloads_are_proved_also_where_the_journal_cannot_be_read(server: Path) -> None:
    (server / "store" / "journal.db").write_bytes(b"rubbish" * 4096)
    _flip(next((server / "store" / "blobs").glob("*/*")), 100)
    problems = verify(Layout(server)).problems
    assert any("journal cannot be read" in problem for problem in problems), problems
    assert any("payload" in problem and "is damaged" in problem for problem in problems), problems


def test_a_running_hub_is_left_alone(server: Path, reopen: Callable[..., LocalHub]) -> None:
    hub = reopen(server)
    hub.start()
    with pytest.raises(ConfigError, match="stop it first"):
        verify(Layout(server))
    hub.kill()  # its log is not folded in: that is how most stores are found
    assert verify(Layout(server), replay=True).problems == []


OTHER_RULE = """
import dataclasses, sys
from share_core.merge import MergePolicy
from share_server.hub import __main__
from share_server.hub.policy import StepPolicy

StepPolicy.merge = property(lambda self: MergePolicy(k_max=self.k_max, tau=0.6, refits=self.refits))
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_version_that_was_made_by_another_rule_is_found_by_the_replay(
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
    live: Callable[[LocalHub], Any],
    new_hub: Callable[..., LocalHub],
    tmp_path: Path,
) -> None:
    """A planted bug: the hub merges with another tau than it records. Rows, signatures and ledger are all in order."""
    script = tmp_path / "hub.py"
    script.write_text(OTHER_RULE)
    life = live(new_hub(script=script))
    life.hub.start()
    for number in range(3):
        life.submit("acme/alice", f"acme/t{number}", make_payload(number))
    life.hub.stop()
    assert verify(life.hub.layout).problems == []
    report = verify(life.hub.layout, replay=True)
    assert report.bit_equal < report.replayed == 3
    assert any("is not what its updates give" in problem for problem in report.problems)


def test_another_build_may_round_otherwise(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_build(state: Any, adapters: Mapping[str, Adapter], *rest: Any) -> Merged:
        rounded = {
            task: {site: Factors(f.out * (1 + 1e-9), f.in_) for site, f in adapter.items()}
            for task, adapter in adapters.items()
        }
        return merge_all(state, rounded, *rest)

    monkeypatch.setattr(stepping, "merge_all", other_build)
    report = verify(Layout(server), replay=True)
    assert report.problems == [] and report.bit_equal < report.replayed == 11
    assert 0 < report.largest_distance <= 1e-6


def test_what_is_no_server_is_refused(tmp_path: Path, server: Path) -> None:
    with pytest.raises(ConfigError, match="no server directory"):
        verify(Layout(tmp_path / "nothing"))
    shutil.rmtree(server / "store" / "blobs")
    assert any("is missing" in problem for problem in verify(Layout(server)).problems)
