"""The link and the feed against a real hub, also one that dies."""

from __future__ import annotations

import hashlib
import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from share_client.feed import VersionFeed
from share_client.link import HubLink, collect, patiently
from share_client.signing import sign_submission
from share_client.uploading import Submission
from share_client.view import View
from share_core.errors import (
    AccessError,
    DigestError,
    FedshareError,
    NonFiniteError,
    UnavailableError,
    UnknownTaskError,
    UnknownUpdateError,
    UpdateConflictError,
    VersionError,
)
from share_core.space import advance, empty_space
from share_core.types import Delta, Space
from share_core.wire import decode_snapshot, encode_update
from share_proto.v1 import hub_pb2

NEVER = threading.Event()
NUMBERS = itertools.count(1)


def submission_of(link: HubLink, payload: bytes, spec: Any, task_id: str, **changes: Any) -> Submission:
    made = Submission(
        update_id=uuid.uuid4().hex,
        space_id=spec.space_id,
        task_id=task_id,
        create=True,
        payload_size=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
    )
    return sign_submission(replace(made, **changes), link.credentials, next(NUMBERS))


def newest(link: HubLink, spec: Any) -> Space:
    if link.describe().version == 0:
        return empty_space(spec)
    return decode_snapshot(link.fetch_snapshot(spec.space_id)[1], spec)


@contextmanager
def following(link: HubLink, spec: Any, start: Space) -> Iterator[View]:
    view = View(start)
    feed = VersionFeed(link, spec, start.version)

    def follow() -> None:
        try:
            for event in feed.events():
                view.apply(event)
        except FedshareError as error:
            view.fail(error)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield view
    finally:
        feed.close()
        thread.join()


def walk_to(view: View, version: int) -> list[Space]:
    """Wait for a version; return every one on the way."""
    spaces = []
    while view.walked.version < version:
        view.check()
        space = view.walk()
        if space is None:
            view.wait(1.0)
        else:
            spaces.append(space)
    return spaces


def test_submitted_merged_and_followed(
    hub: Any, spec: Any, fake: Any, tmp_path: Path, connect: Callable[..., HubLink]
) -> None:
    link = connect(hub.client(tmp_path / "c", "linkorg/one"))
    start = newest(link, spec)
    assert link.describe().spec == spec
    with following(link, spec, start) as view:
        for number, name in enumerate(("a", "b"), start=1):
            base = view.newest
            payload = encode_update(fake.make_update(base, number))
            sent = submission_of(link, payload, spec, f"linkorg/{name}")
            receipt = link.submit(sent, payload)
            assert (receipt.update_id, receipt.duplicate) == (sent.update_id, False)
            spaces = walk_to(view, base.version + 1)
            assert [space.version for space in spaces] == [base.version + 1]
            assert f"linkorg/{name}" in spaces[-1].cores
            record = link.get_update(sent.update_id)
            assert (record.state, record.version) == (hub_pb2.UPDATE_STATE_MERGED, base.version + 1)
    whole = newest(link, spec)
    assert whole.version == view.newest.version
    for site, basis in whole.bases.items():
        assert basis.left.equal(view.newest.bases[site].left)


def test_refusals_keep_their_class(
    hub: Any, spec: Any, fake: Any, tmp_path: Path, connect: Callable[..., HubLink]
) -> None:
    link = connect(hub.client(tmp_path / "c", "linkorg/two"))
    payload = encode_update(fake.make_update(newest(link, spec), 3))
    nan = bytearray(payload)
    nan[-4:] = b"\x00\x00\xc0\x7f"
    cases: list[tuple[type[FedshareError], bytes, dict[str, Any]]] = [
        (UnknownTaskError, payload, {"create": False}),
        (DigestError, payload, {"payload_sha256": "0" * 64}),
        (NonFiniteError, bytes(nan), {}),
    ]
    for expected, body, changes in cases:
        with pytest.raises(expected):
            link.submit(submission_of(link, body, spec, "linkorg/refused", **changes), body)
    with pytest.raises(AccessError):
        link.submit(submission_of(link, payload, spec, "somebodyelse/task"), payload)
    with pytest.raises(UnknownUpdateError):
        link.get_update(uuid.uuid4().hex)
    sent = submission_of(link, payload, spec, "linkorg/conflict")
    link.submit(sent, payload)
    other = encode_update(fake.make_update(newest(link, spec), 4))
    with pytest.raises(UpdateConflictError):
        link.submit(submission_of(link, other, spec, "linkorg/conflict", update_id=sent.update_id), other)


class DropsFirstAnswer(HubLink):
    """The hub does its work, then the answer is lost on the way."""

    dropped = 0

    def submit(self, submission: Submission, payload: bytes, offset: int = 0) -> hub_pb2.SubmitResponse:
        answer = super().submit(submission, payload)
        if not self.dropped:
            self.dropped += 1
            raise UnavailableError("the connection broke before the answer came")
        return answer


class NewIdEachTime(DropsFirstAnswer):
    """The planted bug: every attempt has an id of its own."""

    def submit(self, submission: Submission, payload: bytes, offset: int = 0) -> hub_pb2.SubmitResponse:
        fresh = replace(submission, update_id=uuid.uuid4().hex)
        return super().submit(sign_submission(fresh, self.credentials, next(NUMBERS)), payload)


@pytest.mark.parametrize(("kind", "times"), [(DropsFirstAnswer, 1), (NewIdEachTime, 2)])
def test_a_lost_answer(hub: Any, spec: Any, fake: Any, tmp_path: Path, kind: type[HubLink], times: int) -> None:
    """Sent again under the same id, an update is applied once; the planted bug is seen to apply it twice."""
    from datetime import UTC, datetime

    from share_client.member import load_credentials, load_member

    layout = hub.client(tmp_path / "c", f"lost-{times}/one")
    with kind(load_member(layout).hub_address, load_credentials(layout, datetime.now(UTC))) as link:
        payload = encode_update(fake.make_update(newest(link, spec), 5))
        sent = submission_of(link, payload, spec, f"lost-{times}/task")
        waits: list[FedshareError] = []
        receipt = link.submit_until_answered(sent, payload, NEVER, waits.append)
        assert receipt is not None
        assert len(waits) == 1
        records = link.hub.ListUpdates(hub_pb2.ListUpdatesRequest()).updates
        mine = [record for record in records if record.member == f"lost-{times}/one"]
        assert len(mine) == times
        assert receipt.duplicate == (times == 1)


def test_the_feed_outlives_the_hub(
    own_hub: Any, spec: Any, fake: Any, tmp_path: Path, connect: Callable[..., HubLink]
) -> None:
    link = connect(own_hub.client(tmp_path / "c", "org/one"))
    with following(link, spec, empty_space(spec)) as view:
        for version in (1, 2):
            payload = encode_update(fake.make_update(view.newest, version))
            if version > 1:
                own_hub.kill()
                own_hub.start()
            assert (
                link.submit_until_answered(submission_of(link, payload, spec, "org/task"), payload, NEVER) is not None
            )
            assert [space.version for space in walk_to(view, version)] == [version]
    ahead = VersionFeed(link, spec, since_version=9)
    with pytest.raises(VersionError):
        next(ahead.events())


def test_nobody_answers(spec: Any, hub: Any, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from share_client.member import load_credentials

    layout = hub.client(tmp_path / "c", "linkorg/four")
    stop = threading.Event()
    seen: list[str] = []

    def on_wait(error: FedshareError) -> None:
        seen.append(str(error))
        stop.set()

    with HubLink("127.0.0.1:1", load_credentials(layout, datetime.now(UTC))) as link:
        assert patiently(link.describe, stop, on_wait) is None
    assert "127.0.0.1:1" in seen[0]


def test_collect_refuses_what_was_not_announced() -> None:
    good = hashlib.sha256(b"abcd").hexdigest()
    assert collect(4, good, iter([b"ab", b"cd"]), "delta") == b"abcd"
    for chunks in ([b"ab"], [b"ab", b"cde"], [b"ab", b"ce"]):
        with pytest.raises(DigestError, match="delta"):
            collect(4, good, iter(chunks), "delta")


def test_the_walk_sees_every_version_in_order_whatever_the_speed(fake: Any, spec: Any) -> None:
    from share_core.merge import MergePolicy, empty_state, merge
    from share_core.space import update_adapter

    state, deltas = empty_state(spec), []
    for number in range(5):
        update = fake.make_update(state.space, number)
        adapter = update_adapter(update, state.space.bases)
        merged = merge(state, f"org/t{number}", adapter, MergePolicy(k_max=32, tau=0.05, sweeps=1))
        state = merged.state
        deltas.append(merged.delta)
    view = View(empty_space(spec))
    for delta in deltas[:3]:
        view.apply(delta)
    limited = view.walk(limit=0)
    assert limited is None
    seen = [view.walk(), view.walk(limit=2)]
    assert view.walk(limit=2) is None
    for delta in deltas[3:]:
        view.apply(delta)
    while (space := view.walk()) is not None:
        seen.append(space)
    assert [space.version for space in seen if space] == [1, 2, 3, 4, 5]
    expected = empty_space(spec)
    for space, delta in zip(seen, deltas, strict=True):
        assert isinstance(delta, Delta)
        expected = advance(expected, delta)
        assert space is not None
        assert all(space.bases[site].left.equal(basis.left) for site, basis in expected.bases.items())
    with pytest.raises(VersionError):
        view.apply(deltas[1])
