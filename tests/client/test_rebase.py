"""What was learned is expressed in newer bases without training: exact, small, once; also with a hub that forgets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import safetensors.torch
import torch

from share_client import rebase as module
from share_client.link import HubLink
from share_client.member import ClientLayout, Credentials
from share_client.outbox import Entry, Outbox, Training, list_outbox
from share_client.rebase import MOST_REBASES, Rebaser, express, kept_adapter
from share_client.records import Records
from share_client.sending import Sender
from share_client.session import SessionOptions, run_session
from share_client.session_log import SessionLog
from share_client.signing import SubmissionSigner, sign_submission
from share_core.errors import RebaseError
from share_core.linalg import difference_norm, product_norm
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import empty_space, task_adapter, update_adapter
from share_core.types import Adapter, Core, Factors, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import decode_adapter, decode_snapshot, decode_update, encode_update
from share_proto.v1 import hub_pb2
from share_server.config import RetentionConfig, config_to_toml
from share_server.local import member_of_no_hub

SITES = {"one": (12, 8), "two": (10, 10)}
OPTIONS = SessionOptions(linger_s=0.5, poll_s=0.02, lock_s=5.0)


def grown(spec: SpaceSpec, fake: Any, seeds: list[int], start: Space | None = None) -> Space:
    """Return a space after some merges."""
    state = empty_state(spec)
    for seed in seeds:
        adapter = update_adapter(fake.make_update(state.space, seed), state.space.bases)
        state = merge(state, f"org/t{seed}", adapter, MergePolicy(k_max=32)).state
    return state.space


def with_cores(space: Space, seed: int, phi: int = 1, rank: int = 2) -> Update:
    """Return an update with cores and ``phi`` free directions."""
    draw = torch.Generator().manual_seed(seed)
    sites = {}
    for name, basis in space.bases.items():
        core = Core(torch.randn(basis.k_out, rank, generator=draw), torch.randn(basis.k_in, rank, generator=draw))
        out = torch.randn(basis.left.shape[0], phi, generator=draw)
        residual = Factors(out, torch.randn(basis.right.shape[0], phi, generator=draw)) if phi else None
        sites[name] = SiteUpdate(core=core, residual=residual)
    return Update(base_version=space.version, sites=sites, head={"weight": torch.ones(2, 2)})


def distance(a: Adapter, b: Adapter) -> float:
    """Return the largest relative difference over the sites."""
    return max(
        float(difference_norm(a[site].out, a[site].in_, b[site].out, b[site].in_))
        / float(product_norm(a[site].out, a[site].in_))
        for site in a
    )


@pytest.mark.parametrize("phi", [0, 1, 3])
@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3, 7], [1, 2, 3, *range(10, 20)]])
def test_nothing_is_lost(phi: int, seeds: list[int], spec: SpaceSpec, fake: Any) -> None:
    old, new = grown(spec, fake, [1, 2, 3]), grown(spec, fake, seeds)
    update = with_cores(old, 5, phi)
    before = update_adapter(update, old.bases)
    kept = decode_adapter(kept_adapter(update, old), spec)
    fresh = Update(new.version, express(kept, new, spec.rank_limit))
    read = decode_update(encode_update(fresh), spec)
    assert distance(before, update_adapter(read, new.bases)) < 1e-6


def test_coordinates_and_rest_together_are_exact_and_the_planted_bug_without_the_rest_is_not(
    spec: SpaceSpec, fake: Any
) -> None:
    old, new = grown(spec, fake, list(range(1, 7))), grown(spec, fake, list(range(1, 6)))
    before = update_adapter(with_cores(old, 5, phi=0, rank=6), old.bases)
    sites = express(before, new, spec.rank_limit)
    assert sites.keys() == SITES.keys()
    assert all(part.core is not None and part.residual is not None for part in sites.values())
    assert distance(before, update_adapter(Update(new.version, sites), new.bases)) < 1e-6
    lossy = {site: replace(part, residual=None) for site, part in sites.items()}
    assert distance(before, update_adapter(Update(new.version, lossy), new.bases)) > 1e-3


def test_the_smaller_form_is_sent(spec: SpaceSpec, fake: Any) -> None:
    old = grown(spec, fake, [1, 2, 3])
    inside = update_adapter(with_cores(old, 5, phi=0), old.bases)
    cores = express(inside, grown(spec, fake, [1, 2, 3, 7]), spec.rank_limit)
    factors = express(inside, empty_space(spec), spec.rank_limit)
    draw = torch.Generator().manual_seed(3)
    outside = {
        name: Factors(torch.randn(rows, 2, generator=draw), torch.randn(columns, 2, generator=draw))
        for name, (rows, columns) in SITES.items()
    }
    short = express(outside, old, rank_limit=2)
    assert cores.keys() == factors.keys() == short.keys() == SITES.keys()
    for part in cores.values():
        assert part.core is not None, "a core is smaller than factors"
        assert part.residual is None, "what rounding left over is no direction"
    for part in factors.values():
        assert part.core is None
    for part in short.values():
        assert part.residual is not None
        assert (part.core.rank if part.core else 0) + part.residual.rank <= 2
    nothing = {name: Factors(torch.zeros(rows, 1), torch.zeros(columns, 1)) for name, (rows, columns) in SITES.items()}
    assert express(nothing, old, 2) == {}


def test_only_updates_with_cores_need_more_than_their_payload(spec: SpaceSpec, fake: Any) -> None:
    space = grown(spec, fake, [1])
    assert kept_adapter(fake.make_update(space, 4), space) == b""
    assert decode_adapter(kept_adapter(with_cores(space, 4), space), spec).keys() == SITES.keys()


class Link:
    """A hub that keeps updates based on ``oldest`` or newer ones."""

    def __init__(self, spec: SpaceSpec, oldest: int) -> None:
        self.spec = spec
        self.oldest = oldest
        self.at_merge = False
        self.sent: list[tuple[str, Update]] = []

    def submit_until_answered(self, submission: Any, payload: bytes, stop: Any, on_wait: Any) -> Any:
        update = decode_update(payload, self.spec)
        if update.base_version < self.oldest and not self.at_merge:
            raise RebaseError(f"version {update.base_version} is no longer kept")
        self.sent.append((submission.update_id, update))
        return SimpleNamespace(ingest_seq=1, entry_hash="ab", duplicate=False)

    def get_update(self, update_id: str) -> Any:
        update = dict(self.sent)[update_id]
        old = update.base_version < self.oldest
        return SimpleNamespace(
            state=hub_pb2.UPDATE_STATE_REFUSED if old else hub_pb2.UPDATE_STATE_MERGED,
            reason="RebaseError: no longer kept" if old else "",
            version=9,
            staleness=0,
            relative_error=0.0,
        )


class Bench:
    """A client with one update in its outbox, trained in version 3; the client holds ``newest``, the hub has 5."""

    def __init__(self, root: Path, spec: SpaceSpec, fake: Any, oldest: int = 4) -> None:
        self.spec = spec
        self.old = grown(spec, fake, [1, 2, 3])
        self.newest = grown(spec, fake, [1, 2, 3, 7, 8])
        self.link = Link(spec, oldest)
        self.hub = (5, oldest)
        self.outbox = Outbox(root / "outbox")
        self.records = Records(root / "tasks")
        self.log = SessionLog(root / "session.jsonl")
        self.log_path = root / "session.jsonl"
        self.update = with_cores(self.old, 5)
        sender = member_of_no_hub("org/one")
        credentials = Credentials(sender.key, sender.certificate, b"")
        self.signer = SubmissionSigner(root / "sequence.json", lambda: credentials)

    def put(self, adapter: bytes | None = None, **changes: Any) -> Entry:
        training = replace(Training("task", "hash", 3, loss=0.1, steps=1, seconds=1.0, rows=5), **changes)
        kept = kept_adapter(self.update, self.old) if adapter is None else adapter
        return self.outbox.put(
            encode_update(self.update), b"head", training, space_id="s", task_id="org/task", create=True, adapter=kept
        )

    def sender(self) -> Sender:
        rebaser = Rebaser(self.spec, lambda: self.newest, lambda: self.hub)
        link = cast(HubLink, self.link)
        return Sender(link, self.outbox, self.records, self.signer, self.log, threading.Event(), rebaser)

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.log_path.read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path, spec: SpaceSpec, fake: Any) -> Iterator[Bench]:
    made = Bench(tmp_path, spec, fake)
    yield made
    made.log.close()


@pytest.mark.parametrize("at_merge", [False, True], ids=["refused at the door", "refused at the merge"])
def test_an_update_that_is_too_old_is_expressed_anew(at_merge: bool, bench: Bench) -> None:
    bench.link.at_merge = at_merge
    first = bench.put()
    sender = bench.sender()
    assert sender.pass_once().unsettled == 1
    assert sender.pass_once().unsettled == 0
    update_id, update = bench.link.sent[-1]
    assert update_id != first.update_id
    assert update.base_version == 5
    before = update_adapter(bench.update, bench.old.bases)
    assert distance(before, update_adapter(update, bench.newest.bases)) < 1e-6
    assert update.head["weight"].equal(torch.ones(2, 2))
    assert [sent for sent, _ in bench.link.sent if sent == update_id] == [update_id]
    assert bench.events()[-3:] == ["rebased", "acknowledged", "merged"]
    assert not bench.records.get("task").wants("hash")
    assert bench.outbox.entries() == []


@pytest.mark.parametrize("create", [False, True])
def test_what_may_not_make_its_task_may_not_when_it_is_expressed_anew(create: bool, bench: Bench) -> None:
    bench.outbox.put(
        encode_update(bench.update),
        b"head",
        Training("task", "hash", 3, loss=0.1, steps=1, seconds=1.0, rows=5),
        space_id="s",
        task_id="acme/task",
        create=create,
        adapter=kept_adapter(bench.update, bench.old),
        share_with=("lab",),
    )
    bench.sender().pass_once()
    (fresh,) = bench.outbox.entries()
    assert (fresh.training.rebases, fresh.submission.task_id in bench.newest.cores) == (1, False)
    assert (fresh.submission.create, fresh.submission.share_with) == (create, ("lab",))


def test_after_a_crash_between_both_entries_only_the_new_one_is_sent(bench: Bench) -> None:
    old = bench.put()
    steps: list[str] = []

    class Killed(Exception):
        pass

    def step(name: str) -> None:
        steps.append(name)
        if name == "remove entry":
            raise Killed

    bench.outbox._step = step
    with pytest.raises(Killed):
        bench.sender().pass_once()
    assert steps[-2:] == ["put done", "remove entry"]
    bench.outbox._step = lambda name: None
    bench.link.oldest = 0  # even if the hub took the old one now
    assert len(bench.outbox.entries()) == 2
    assert bench.sender().pass_once().unsettled == 0
    assert [update.base_version for _, update in bench.link.sent] == [5]
    assert old.update_id not in [sent for sent, _ in bench.link.sent]


def test_planted_bug_a_replaced_entry_is_sent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put()
    monkeypatch.setattr(bench.outbox, "remove", lambda entry: None)
    bench.sender().pass_once()
    monkeypatch.undo()
    monkeypatch.setattr(Sender, "_current", lambda sender: sender._outbox.entries())
    bench.link.oldest = 0
    bench.sender().pass_once()
    assert len(bench.link.sent) == 2, "so the test above would fail"


def test_waits_for_a_version_that_is_new_enough(bench: Bench, spec: SpaceSpec, fake: Any) -> None:
    bench.put()
    newest, bench.newest = bench.newest, bench.old
    sender = bench.sender()
    state = sender.pass_once()
    assert (state.unsettled, state.certain, bench.events()) == (1, False, ["waiting"])
    bench.newest = newest
    again = bench.sender()
    again.pass_once()
    assert again.pass_once().unsettled == 0


@pytest.mark.parametrize("case", ["no adapter", "damaged adapter", "damaged payload", "too often", "nothing newer"])
def test_what_cannot_be_expressed_is_trained_again(case: str, bench: Bench) -> None:
    entry = bench.put(adapter=b"" if case == "no adapter" else None, rebases=MOST_REBASES if case == "too often" else 0)
    if case == "damaged adapter":
        (entry.directory / "adapter.safetensors").write_bytes(b"x" * 200)
    if case == "nothing newer":
        bench.newest, bench.hub = bench.old, (3, 4)
    if case == "damaged payload":
        bench.link.at_merge = True
        bench.sender()._send(entry)
        (entry.directory / "payload.safetensors").write_bytes(b"x" * 200)
    bench.sender().pass_once()
    assert bench.outbox.entries() == []
    assert bench.records.get("task").wants("hash")
    assert bench.events()[-1] == "retrain"


def test_free_factors_need_no_second_file(bench: Bench, fake: Any) -> None:
    bench.update = fake.make_update(bench.old, 9)
    entry = bench.put()
    assert not (entry.directory / "adapter.safetensors").exists()
    sender = bench.sender()
    sender.pass_once()
    assert sender.pass_once().unsettled == 0
    before = update_adapter(bench.update, bench.old.bases)
    assert distance(before, update_adapter(bench.link.sent[0][1], bench.newest.bases)) < 1e-6


@pytest.fixture
def forgetful(tmp_path: Path, spec: SpaceSpec, own_hub_class: Any) -> Iterator[Any]:
    """A real hub that keeps two versions behind the newest."""
    hub = own_hub_class(tmp_path / "server", spec)
    config = replace(hub.config, retention=RetentionConfig(horizon_versions=2, snapshot_every=1))
    hub.layout.config.write_text(config_to_toml(config))
    hub.start()
    yield hub
    hub.stop()


def wait_for_version(link: HubLink, version: int) -> None:
    never = threading.Event()
    while link.describe().version < version:
        never.wait(0.02)


@pytest.mark.parametrize("bug", ["", "another adapter"])
def test_a_real_hub_that_no_longer_keeps_the_base(
    bug: str,
    forgetful: Any,
    spec: SpaceSpec,
    fake: Any,
    tmp_path: Path,
    connect: Callable[..., HubLink],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An update trained in version 3 waits in the outbox while the others reach version 12; it arrives untrained."""
    others = connect(forgetful.client(tmp_path / "others", "others/main"))

    def publish(first: int, last: int) -> None:
        for version in range(first, last + 1):
            update = replace(fake.make_update(empty_space(spec), version), base_version=version - 1)
            payload = encode_update(update)
            box = Outbox(tmp_path / f"box-{version}")
            training = Training("t", "h", version - 1, loss=0.0, steps=1, seconds=0.0, rows=1)
            entry = box.put(payload, b"", training, space_id=spec.space_id, task_id=f"others/t{version}", create=True)
            sent = sign_submission(entry.submission, others.credentials, version)
            assert others.submit_until_answered(sent, payload, threading.Event()) is not None
            wait_for_version(others, version)

    publish(1, 3)
    layout = forgetful.client(tmp_path / "c", "org/main")
    base = decode_snapshot(others.fetch_snapshot(spec.space_id)[1], spec)
    update = with_cores(base, 5)
    put_untrained(layout, spec, base, update)
    publish(4, 12)
    assert others.describe().oldest_base_version > 3
    if bug:
        real = module.express
        monkeypatch.setattr(
            module,
            "express",
            lambda adapter, space, limit: real(
                {site: Factors(f.out * 1.5, f.in_) for site, f in adapter.items()}, space, limit
            ),
        )
    path = layout.root / "tasks.json"
    counters = run_session(layout.root, path, trainer=fake.FakeTrainer(path), options=OPTIONS)
    assert (counters.submitted, counters.merged, counters.refused) == (1, 1, 0)
    assert not (layout.root / "trained.jsonl").exists(), "it was trained again"
    assert list_outbox(layout.outbox) == ([], [])
    space = decode_snapshot(others.fetch_snapshot(spec.space_id)[1], spec)
    error = distance(update_adapter(update, base.bases), task_adapter(space, "org/task", torch.float64))
    assert (error > 0.1) == bool(bug), error
    mine = connect(layout).hub.ListUpdates(hub_pb2.ListUpdatesRequest()).updates
    assert [u.state for u in mine] == [hub_pb2.UPDATE_STATE_MERGED]


def put_untrained(layout: ClientLayout, spec: SpaceSpec, base: Space, update: Update) -> None:
    """Leave what a training of ``tasks.json`` would have left in the outbox."""
    (layout.root / "tasks.json").write_text(json.dumps({"task": "data"}))
    content = hashlib.sha256(b"data").hexdigest()
    head = safetensors.torch.save({"seed": torch.tensor([float(int(content[:8], 16) % 1000)])})
    training = Training("task", content, base.version, loss=0.1, steps=1, seconds=1.0, rows=5)
    Outbox(layout.outbox).put(
        encode_update(update),
        head,
        training,
        space_id=spec.space_id,
        task_id="org/task",
        create=True,
        adapter=kept_adapter(update, base),
    )
