"""Following a relay: a real line to a real hub that goes away, comes back, lies or lags; the hub takes its place."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from share_client.chain import ManifestChain
from share_client.cli import app
from share_client.feed import VersionFeed
from share_client.join import remember_follow
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials, load_member, save_member
from share_client.session import SessionOptions, run_session
from share_client.sources import PATIENCE, Sources
from share_core.errors import (
    AccessError,
    ConfigError,
    DigestError,
    FedshareError,
    ManifestError,
    UnavailableError,
    VersionError,
)
from share_core.identity import Identity
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.provision import free_ports, invite_member

FORGING_HUB = Path(__file__).parents[1] / "forging_hub.py"
OPTIONS = SessionOptions(linger_s=0.5, poll_s=0.02, lock_s=5.0)


class Link:
    """A link whose streams are what a test says: errors to raise, or versions to send; None ends it in silence."""

    def __init__(self, address: str, *answers: Any) -> None:
        self.address = address
        self.answers = list(answers)
        self.asked = 0


def feed_over(monkeypatch: pytest.MonkeyPatch, sources: Sources, spec: SpaceSpec, count: int) -> list[tuple[str, int]]:
    """Return (address, version) of the first events of a feed over such links."""
    seen: list[tuple[str, int]] = []

    def subscribe(feed: VersionFeed, link: Any) -> Iterator[Any]:
        link.asked += 1
        answer = link.answers.pop(0) if len(link.answers) > 1 else link.answers[0]
        if isinstance(answer, FedshareError):
            raise answer
        for _ in range(answer):
            seen.append((link.address, feed._version + 1))
            yield SimpleNamespace(version=feed._version + 1)

    monkeypatch.setattr(VersionFeed, "_subscribe", subscribe)
    with closing(VersionFeed(sources, spec, 0)) as feed:
        list(itertools.islice(feed.events(), count))
    return seen


def sources_of(hub: Link, relay: Link | None, again_s: float = 3600.0) -> tuple[Sources, list[str]]:
    told: list[str] = []
    return Sources(cast(HubLink, hub), cast(HubLink, relay) if relay else None, told.append, again_s), told


AWAY = UnavailableError("connection refused")


@pytest.mark.usefixtures("waits")
def test_a_relay_that_is_away_is_replaced_by_the_hub(monkeypatch: pytest.MonkeyPatch, spec: SpaceSpec) -> None:
    hub, relay = Link("hub", 3), Link("relay", 2, AWAY)
    sources, told = sources_of(hub, relay)
    seen = feed_over(monkeypatch, sources, spec, 5)
    assert seen == [("relay", 1), ("relay", 2), ("hub", 3), ("hub", 4), ("hub", 5)]
    # The end of its first stream is the first failure.
    assert relay.asked == PATIENCE
    assert len(told) == 1
    assert "relay" in told[0]
    assert "connection refused" in told[0]


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (DigestError("damaged"), PATIENCE),
        (AccessError("the relay does not know you yet"), 1),
        (VersionError("version 7 is not known here"), 1),
    ],
)
@pytest.mark.usefixtures("waits")
def test_what_a_relay_refuses_is_asked_of_the_hub(
    error: FedshareError, asked: int, monkeypatch: pytest.MonkeyPatch, spec: SpaceSpec
) -> None:
    hub, relay = Link("hub", 1), Link("relay", error)
    sources, _ = sources_of(hub, relay)
    assert feed_over(monkeypatch, sources, spec, 1) == [("hub", 1)]
    assert relay.asked == asked


@pytest.mark.parametrize("source", ["hub", "relay"])
def test_a_breach_stops_the_feed_wherever_it_comes_from(
    source: str, monkeypatch: pytest.MonkeyPatch, spec: SpaceSpec
) -> None:
    breach = ManifestError("mixed histories")
    hub, relay = Link("hub", breach), Link("relay", breach)
    sources, _ = sources_of(hub, relay if source == "relay" else None)
    with pytest.raises(ManifestError):
        feed_over(monkeypatch, sources, spec, 1)
    assert (hub.asked, relay.asked) == ((1, 0) if source == "hub" else (0, 1))


def test_what_the_hub_refuses_is_raised(monkeypatch: pytest.MonkeyPatch, spec: SpaceSpec) -> None:
    hub, relay = Link("hub", AccessError("revoked")), Link("relay", AccessError("revoked"))
    sources, _ = sources_of(hub, relay)
    with pytest.raises(AccessError):
        feed_over(monkeypatch, sources, spec, 1)


@pytest.mark.usefixtures("waits")
def test_a_relay_that_works_again_is_followed_again(monkeypatch: pytest.MonkeyPatch, spec: SpaceSpec) -> None:
    hub, relay = Link("hub", 9), Link("relay", AccessError("not yet"), AWAY, 2)
    sources, told = sources_of(hub, relay, again_s=0.0)
    seen = feed_over(monkeypatch, sources, spec, 3)
    assert seen[-2:] == [("relay", seen[-1][1] - 1), ("relay", seen[-1][1])]
    assert [text.split(" ")[3] for text in told] == ["fails:", "works"], "said once each"


class Worker:
    """A session in a thread, which is ended with the block."""

    def __init__(self, layout: ClientLayout, fake: Any, **options: Any) -> None:
        self.layout = layout
        self.stop = threading.Event()
        path = layout.root / "tasks.json"
        path.write_text("{}")
        self.pool = ThreadPoolExecutor(1)
        chosen = replace(OPTIONS, linger_s=120.0, **options)
        self.future = self.pool.submit(
            run_session, layout.root, path, trainer=fake.FakeTrainer(path), options=chosen, stop=self.stop
        )

    def lines(self, event: str) -> list[dict[str, Any]]:
        text = self.layout.session_log.read_text() if self.layout.session_log.exists() else ""
        found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [line for line in found if line["event"] == event]

    def wait(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        while len(self.lines(event)) < count:
            assert not self.future.done(), self.future.exception() or "the session ended"
            time.sleep(0.02)
        return self.lines(event)

    def add(self, **tasks: str) -> None:
        path = self.layout.root / "tasks.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **tasks}))

    def end(self) -> Any:
        """Let it end and return what it counted."""
        self.stop.set()
        return self.future.result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.pool.shutdown()


def test_a_session_outlives_its_relay(own_hub: Any, fake: Any, tmp_path: Path, line: Callable[..., Any]) -> None:
    layout = own_hub.client(tmp_path / "c", "org/main")
    relay = line(load_member(layout).hub_address)
    remember_follow(layout, load_member(layout), relay.address)
    with Worker(layout, fake) as worker:
        worker.wait("started")
        worker.add(first="one")
        worker.wait("version", 1)
        assert relay.connections == 1, "versions come over the relay"
        assert relay.forwarded > 0
        relay.close()
        (left,) = worker.wait("source")
        assert relay.address in left["reason"]
        worker.add(second="two")
        assert [found["version"] for found in worker.wait("version", 2)] == [1, 2]
        worker.wait("merged", 2)
        counters = worker.end()
    assert (counters.submitted, counters.merged, counters.version) == (2, 2, 2)


def test_a_relay_that_brings_nothing_is_left(own_hub: Any, fake: Any, tmp_path: Path, spec: SpaceSpec) -> None:
    """The relay is connected and silent, and the hub has published more: only the caller can know that."""
    layout = own_hub.client(tmp_path / "c", "org/main")
    credentials = load_credentials(layout, datetime.now(UTC))
    read, cancelled = threading.Event(), threading.Event()

    class Silent:
        """A stream without an end or a message."""

        address = "silent"
        hub = SimpleNamespace(FollowVersions=lambda request: Silent())

        def __iter__(self) -> Silent:
            return self

        def __next__(self) -> hub_pb2.FollowVersionsResponse:
            read.set()
            cancelled.wait()
            raise StopIteration

        def cancel(self) -> None:
            cancelled.set()

    with HubLink(load_member(layout).hub_address, credentials) as link:
        with Worker(layout, fake) as worker:
            worker.wait("started")
            worker.add(first="one")
            worker.wait("merged")
            worker.end()
        told: list[str] = []
        chain = ManifestChain(None, spec.space_id)
        sources = Sources(link, cast(HubLink, Silent()), told.append)
        with ThreadPoolExecutor(1) as pool, closing(VersionFeed(sources, spec, 0, chain=chain)) as feed:
            first = pool.submit(lambda: next(feed.events()))
            assert read.wait(30)
            feed.expect(0, behind_s=0.0)
            assert not cancelled.is_set(), "nothing is missing yet"
            feed.expect(1, behind_s=3600.0)
            assert not cancelled.is_set(), "it is given time"
            while not first.done():
                feed.expect(1, behind_s=0.0)
                time.sleep(0.02)
            assert first.result().version == 1
    assert "the hub has published more" in told[0]


def test_join_remembers_the_relay(offline: Any) -> None:
    layout = offline[0]
    layout.member.write_text(
        json.dumps({"member": "org/one", "hub_address": "h:1", "gateway_address": "g:1", "space_id": "s", "node_id": 3})
    )
    member = load_member(layout)
    assert member.follow_address == "", "a directory of an older release"
    assert remember_follow(layout, member, None) == member
    assert remember_follow(layout, member, "relay.example:7443").follow_address == "relay.example:7443"
    assert load_member(layout).follow_address == "relay.example:7443"
    assert remember_follow(layout, load_member(layout), None).follow_address == "relay.example:7443"
    assert remember_follow(layout, load_member(layout), "hub").follow_address == ""
    assert load_member(layout) == member
    for wrong in ("", "relay", ":7443", "relay:", "relay:port", "relay:0", "relay:70000"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            remember_follow(layout, member, wrong)


def test_watch_takes_only_versions_from_the_relay(hub: Any, tmp_path: Path, line: Callable[..., Any]) -> None:
    layout = hub.client(tmp_path / "c", "watchers/one")
    relay = line(load_member(layout).hub_address)
    save_member(layout, replace(load_member(layout), hub_address="127.0.0.1:1"))
    answer = CliRunner().invoke(app, ["watch", "--dir", str(layout.root), "--follow", relay.address])
    assert answer.exit_code != 0, "the hub says what the space is and who signs; a relay is not asked"
    assert relay.connections == 0
    bad = CliRunner().invoke(app, ["watch", "--dir", str(layout.root), "--follow", "nonsense"])
    assert "HOST:PORT" in bad.output


@contextmanager
def real_relay(hub: Any, root: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run ``share-server relay`` against a hub; give its address and process."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    identity = Identity("relay", "relays", "one")
    token = invite_member(hub.layout, hub.config, identity, 1.0, datetime.now(UTC), ("127.0.0.1",))
    command = [sys.executable, "-m", "share_server.cli", "relay", token, "--dir", str(root), "--listen", address]
    with (root.parent / "relay.log").open("wb") as log:
        process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    try:
        assert process.stdout.readline(), (root.parent / "relay.log").read_text()
        yield address, process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_session_follows_a_real_relay_and_outlives_it(own_hub: Any, fake: Any, tmp_path: Path) -> None:
    """Signed versions over the relay; submissions, questions and evaluations at the hub; then the relay is killed."""
    layout = own_hub.client(tmp_path / "c", "org/main")
    with real_relay(own_hub, tmp_path / "relay") as (address, process):
        remember_follow(layout, load_member(layout), address)
        with Worker(layout, fake) as worker:
            worker.wait("started")
            worker.add(first="one", second="two")
            worker.wait("evaluation", 2)
            assert worker.lines("source") == [], "the relay was followed all the time"
            process.kill()
            worker.wait("source")
            worker.add(third="three")
            worker.wait("merged", 3)
            counters = worker.end()
    assert (counters.submitted, counters.merged) == (3, 3)
    (chain,) = layout.cache.glob("*.chain.json")
    assert json.loads(chain.read_text())["highest"] == counters.version


@pytest.mark.parametrize("bug", ["", "no verifier"])
def test_a_hub_that_signs_with_another_key_is_not_believed(
    bug: str, own_hub_class: Any, spec: SpaceSpec, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = own_hub_class(tmp_path / "server", spec, script=FORGING_HUB)
    hub.start()
    try:
        layout = hub.client(tmp_path / "c", "org/main")
        path = layout.root / "tasks.json"
        path.write_text(json.dumps({"first": "one"}))
        if bug:
            unsigned = lambda description, *rest: ManifestChain(None, description.spec.space_id)  # noqa: E731
            monkeypatch.setattr("share_client.session.open_chain", unsigned)
            counters = run_session(layout.root, path, trainer=fake.FakeTrainer(path), options=OPTIONS)
            assert counters.version == 1, "so the test would fail"
            return
        with pytest.raises(ManifestError, match="signature is not the hub's"):
            run_session(layout.root, path, trainer=fake.FakeTrainer(path), options=replace(OPTIONS, linger_s=60.0))
        assert not list(layout.cache.glob("*.safetensors")) or cached_version(layout) == 0
    finally:
        hub.stop()


def cached_version(layout: ClientLayout) -> int:
    """Return the version in the cache."""
    (cached,) = layout.cache.glob("*.safetensors")
    with safe_open(cached, "pt") as file:
        return int(json.loads(file.metadata()["fedshare"])["version"])
