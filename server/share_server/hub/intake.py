"""Submit: from a stranger's bytes to a durable, checked update.

In this order, each step refusing with its own error before the next one costs anything: header and its limits; its
signature by the key of the caller's certificate; whether the update is known already; who may contribute to the task;
whether the signer has used its number before; quotas; free space; then the payload into a staging file, counted and
hashed on the way; size and digest; the strict parser, in a process of its own; the version it was trained in and the
sizes its cores must have there; payload durable; row durable; and only then the receipt.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from share_core.errors import (
    AccessError,
    DigestError,
    OverloadError,
    PayloadTooLargeError,
    RequestError,
    SpaceMismatchError,
    TensorShapeError,
    UnavailableError,
    UnknownTaskError,
    VersionError,
)
from share_core.identity import check_update_signature, statement_of
from share_core.names import check_name, check_update_id, split_task_id
from share_core.privacy import CoefficientNoise, declaration_from_text
from share_core.types import SpaceSpec
from share_core.wire import MAX_HEAD_BYTES, PayloadSplit, UpdateFacts, max_payload_bytes
from share_proto.v1 import hub_pb2
from share_server.config import ServerConfig
from share_server.hub.access import Caller
from share_server.hub.chunks import SubmitPart
from share_server.hub.clock import now_ms
from share_server.hub.feed import Feed
from share_server.hub.gate.parsers import ParseGate
from share_server.hub.history import History
from share_server.hub.metrics import Metrics
from share_server.hub.options import CHUNK_BYTES
from share_server.hub.quota import Crowd, Quota
from share_server.hub.uploads import Upload, Uploads
from share_server.store.blobs import Staged
from share_server.store.journal import Journal
from share_server.store.records import NewUpdate, Sharing, TaskRow, UpdateRow
from share_server.store.store import Store
from share_server.store.updates import find_update, require_fresh, same_update, signed_already
from share_server.store.versions import find_task

_HEX_64 = re.compile(r"[0-9a-f]{64}")
_HEX_64_OR_NOTHING = re.compile(r"(?:[0-9a-f]{64})?")
_LEASE = re.compile(r"(?:[0-9a-f]{32})?")
_MOST_ROWS = 2**53

_CHUNKS_AT_ONCE = 4
"""Chunks that are kept in memory before they are written together."""

_FREE_S = 0.5
"""How old the figure of free disk space may be, in seconds; the reserve is much larger than what comes in then."""

GoAhead = Callable[[], Awaitable[None]]


async def _no_word() -> None:
    """Tell nobody."""


class Intake:
    """Receives updates."""

    def __init__(
        self,
        store: Store,
        spec: SpaceSpec,
        config: ServerConfig,
        feed: Feed,
        history: History,
        metrics: Metrics,
        gate: ParseGate,
    ) -> None:
        self._store = store
        self._spec = spec
        self._limits = config.limits
        self._feed = feed
        self._history = history
        self._metrics = metrics
        self._gate = gate
        self._slots: Counter[str] = Counter()
        self._free = (-math.inf, 0)
        self._crowd = Crowd()
        self.quota = Quota(config.limits)
        """What callers have used of their shares."""
        self.uploads = Uploads(store, config.retention)
        """Unfinished payloads."""
        self.max_payload_bytes = min(config.limits.max_payload_bytes, max_payload_bytes(spec))
        """The operator's limit, or what an update of this space can need if that is less."""

    async def receive(
        self, caller: Caller, messages: AsyncIterator[SubmitPart], go_ahead: GoAhead = _no_word
    ) -> tuple[UpdateRow, bool]:
        """Receive one update; return (its row, whether it was durable before this call).

        Args:
            caller: who sends it.
            messages: the header, then chunks.
            go_ahead: called when the payload may come, so that a caller who waits for it sends nothing in vain.

        Raises:
            FedshareError: a leaf of it for every way in which the update can be refused.
        """
        if self._feed.closing:
            raise UnavailableError("the hub is stopping: send the update again in a moment")
        # A call that is refused before its header was read looks to its caller like a broken one.
        header = await self._header(messages)
        self._check_slots(caller.organisation)
        self._slots[caller.organisation] += 1
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._limits.upload_total_s):
                row, duplicate = await self._receive(caller, header, messages, go_ahead)
        except TimeoutError as error:
            raise UnavailableError(
                f"the upload took longer than {self._limits.upload_total_s:g} s: send it again"
            ) from error
        finally:
            self._slots[caller.organisation] -= 1
            self._crowd.served(time.monotonic() - begun)
        self._store.require_sound()  # this update is durable, but another thread may have met a failure meanwhile
        self._metrics.acknowledged(time.monotonic() - begun, row.new.size)
        return row, duplicate

    async def progress(self, caller: Caller, update_id: str) -> tuple[int, UpdateRow | None]:
        """Return (how many bytes of an update are durable, its row if it is durable as a whole)."""
        await self.uploads.settled(caller, update_id)
        row = await self._store.do(lambda journal: find_update(journal, update_id))
        if row is not None and row.new.member == caller.member:
            return row.new.size, row
        return await self.uploads.kept(caller, update_id), None

    def _check_slots(self, organisation: str) -> None:
        """Refuse what would leave the others no slot: one organisation may hold a quarter of them."""
        most = self._limits.concurrent_uploads
        share = max(1, most // 4)
        if self._slots.total() >= most:
            hint = self._crowd.turned_away()
            raise OverloadError(f"{most} uploads are in progress, which is the most: try again in {hint} ms", hint)
        if self._slots[organisation] >= share:
            hint = self._crowd.turned_away()
            raise OverloadError(
                f"{organisation} has {share} uploads in progress, its share: try again in {hint} ms", hint
            )

    async def _receive(
        self,
        caller: Caller,
        header: hub_pb2.SubmitHeader,
        messages: AsyncIterator[SubmitPart],
        go_ahead: GoAhead,
    ) -> tuple[UpdateRow, bool]:
        self._check_header(header)
        check_update_signature(caller.certificate, statement_of(header, caller.member), header.signature)
        await self.uploads.settled(caller, header.update_id)
        known, task, signed = await self._store.do(lambda journal: _look_up(journal, caller, header))
        _check_access(caller, header, task)
        if known is not None and _same_header(known, caller, header):
            return known, True  # whatever its signature is now: a member that enrolled again has signed it anew
        require_fresh(signed, caller.signer, header.sequence)
        _check_task(header, task)
        rest = header.payload_size - header.offset
        with self.quota.in_flight(rest):
            self.quota.admit(caller.member, caller.organisation, rest)
            if await self._free_bytes() < self._limits.free_space_bytes + header.payload_size:
                raise OverloadError("the hub's disk is nearly full: try again when the operator has made space", 60_000)
            upload = await self.uploads.begin(caller, header.update_id, header.offset, header.payload_size)
            await go_ahead()
            return await self._fill(caller, messages, header, upload)

    async def _fill(
        self,
        caller: Caller,
        messages: AsyncIterator[SubmitPart],
        header: hub_pb2.SubmitHeader,
        upload: Upload,
    ) -> tuple[UpdateRow, bool]:
        staged, keep = upload.staged, False
        try:
            rest = await self._payload(messages, header, staged)
            await self._store.io(lambda: self._finish(staged, rest, header))
            facts = await self._gate.examine(staged)
            _check_privacy(header, facts.split)
            _check_head(facts.split)
            await self._check_base(facts)
        except (asyncio.CancelledError, UnavailableError):
            keep = True
            raise
        except DigestError:
            keep = staged.size < header.payload_size  # the stream ended early: another connection may go on
            raise
        else:
            upload.committing = True
        finally:
            if not upload.committing:
                await asyncio.shield(self.uploads.end(upload, keep))
        # Shielded: what is being committed goes on when its caller hangs up; it will ask for the receipt.
        return await asyncio.shield(self._commit(upload, _new_update(caller, header, facts)))

    async def _commit(self, upload: Upload, new: NewUpdate) -> tuple[UpdateRow, bool]:
        try:
            return await self._make_durable(upload.staged, new)
        finally:
            await self.uploads.end(upload, keep=False)

    async def _header(self, messages: AsyncIterator[SubmitPart]) -> hub_pb2.SubmitHeader:
        first = await self._next(messages)
        if first is None or isinstance(first, memoryview) or first.WhichOneof("part") != "header":
            raise RequestError("Submit begins with a header: expected it as first message")
        return first.header

    def _check_header(self, header: hub_pb2.SubmitHeader) -> None:
        check_update_id(header.update_id)
        if header.space_id != self._spec.space_id:
            raise SpaceMismatchError(
                f"this hub owns space {self._spec.space_id} ({self._spec.backbone}), the update is for "
                f"{header.space_id[:80]!r}: use the same backbone weights"
            )
        split_task_id(header.task_id)
        if header.payload_size <= 0:
            raise RequestError(f"payload_size must be positive, got {header.payload_size}")
        if header.payload_size > self.max_payload_bytes:
            raise PayloadTooLargeError(
                f"payload of {header.payload_size} bytes: at most {self.max_payload_bytes} are accepted"
            )
        if not _HEX_64.fullmatch(header.payload_sha256):
            raise RequestError("payload_sha256 is not 64 lower-case hexadecimal digits")
        if not _LEASE.fullmatch(header.lease_id):
            raise RequestError("lease_id is neither empty nor 32 lower-case hexadecimal digits")
        if not _HEX_64_OR_NOTHING.fullmatch(header.schema_sha256):
            raise RequestError("schema_sha256 is neither empty nor 64 lower-case hexadecimal digits")
        if not 0 <= header.offset <= header.payload_size:
            raise RequestError(f"offset must be between 0 and payload_size {header.payload_size}, got {header.offset}")
        declaration_from_text(header.privacy)
        if not 0 <= header.rows <= _MOST_ROWS:
            raise RequestError(f"rows must be between 0 and {_MOST_ROWS}, got {header.rows}")

    async def _payload(
        self, messages: AsyncIterator[SubmitPart], header: hub_pb2.SubmitHeader, staged: Staged
    ) -> list[memoryview]:
        """Read every chunk, writing to ``staged`` when several are there; return the last ones, not yet written.

        Stops at the first byte too many. When it ends early, everything that came has been written.
        """
        waiting: list[memoryview] = []
        count = staged.size
        try:
            while (message := await self._next(messages)) is not None:
                if not isinstance(message, memoryview) and message.WhichOneof("part") != "chunk":
                    raise RequestError("Submit has one header, then chunks: got another header")
                chunk = message if isinstance(message, memoryview) else memoryview(message.chunk)
                if len(chunk) > CHUNK_BYTES:
                    raise RequestError(f"a chunk holds at most {CHUNK_BYTES} bytes, got {len(chunk)}")
                count += len(chunk)
                if count > header.payload_size:
                    raise DigestError(
                        f"payload: expected {header.payload_size} bytes as announced, got more: send it again"
                    )
                waiting.append(chunk)
                if len(waiting) >= _CHUNKS_AT_ONCE:
                    written, waiting = waiting, []
                    await self._store.io(lambda written=written: staged.write(*written))  # type: ignore[misc]
            if count != header.payload_size:
                raise DigestError(f"payload: expected {header.payload_size} bytes, got {count}: send it again")
        except BaseException:
            if waiting and count <= header.payload_size:
                await asyncio.shield(self._store.io(lambda: staged.write(*waiting)))
            raise
        return waiting

    async def _next(self, messages: AsyncIterator[SubmitPart]) -> SubmitPart | None:
        try:
            async with asyncio.timeout(self._limits.upload_idle_s):
                return await anext(messages, None)
        except TimeoutError as error:
            raise UnavailableError(
                f"the upload paused for more than {self._limits.upload_idle_s:g} s: send it again"
            ) from error

    async def _free_bytes(self) -> int:
        """Return the free space of the disk, asked for at most every half second."""
        if time.monotonic() - self._free[0] > _FREE_S:
            self._free = (time.monotonic(), await self._store.io(self._store.blobs.free_bytes))
        return self._free[1]

    def _finish(self, staged: Staged, rest: Sequence[memoryview], header: hub_pb2.SubmitHeader) -> None:
        """Write the last chunks and compare the digest; runs on a thread."""
        staged.write(*rest)
        if staged.sha256 != header.payload_sha256:
            raise DigestError(f"payload: expected SHA-256 {header.payload_sha256}, got {staged.sha256}: send it again")

    async def _check_base(self, facts: UpdateFacts) -> None:
        """Refuse what could not be merged anyway: a version nobody has, cores of another size than its bases."""
        base = facts.base_version
        if base > self._feed.version:
            raise VersionError(
                f"the update is based on version {base}, but the newest is {self._feed.version}: "
                "it was trained against another hub or a lost state"
            )
        sizes = await self._history.sizes(base)
        for site, got in facts.cores.items():
            expected = sizes[site]
            if got != expected:
                raise TensorShapeError(
                    f"core at {site!r}: version {base} has {expected[0]} x {expected[1]} coordinates, "
                    f"got {got[0]} x {got[1]}"
                )

    async def _make_durable(self, staged: Staged, new: NewUpdate) -> tuple[UpdateRow, bool]:
        """Payload durable, then row durable; the caller may be told when this returns."""
        return await self._store.accept(staged, new, now_ms())


def _check_access(caller: Caller, header: hub_pb2.SubmitHeader, task: TaskRow | None) -> None:
    """Raise AccessError unless the task is the organisation's own or shared with it."""
    organisation, _ = split_task_id(header.task_id)
    if organisation != caller.organisation and (task is None or not task.sharing.allows(caller.organisation)):
        raise AccessError(
            f"task {header.task_id} belongs to {organisation}: members of {caller.organisation} may not submit to it"
        )


def _check_task(header: hub_pb2.SubmitHeader, task: TaskRow | None) -> None:
    """Refuse an update of a task that is not there, or that was trained for other labels.

    Raises:
        UnknownTaskError, RequestError.
    """
    sharing = _sharing(header)
    if task is None:
        if not header.create:
            raise UnknownTaskError(f"there is no task {header.task_id!r}: set create to make it with this update")
        if sharing.shared and not header.schema_sha256:
            raise RequestError(f"task {header.task_id} is to be shared: say which label schema (schema_sha256) it has")
    elif task.sharing.shared and header.schema_sha256 != task.schema_sha256:
        raise RequestError(
            f"task {header.task_id} has label schema {task.schema_sha256}, the update was trained for "
            f"{header.schema_sha256 or 'none'}: use the same labels in the same order"
        )


def _check_privacy(header: hub_pb2.SubmitHeader, split: PayloadSplit) -> None:
    """Refuse an update that declares noise on its coefficients and carries something that has none.

    Raises:
        RequestError: free directions or a head beside noisy coefficients.
    """
    exposed = split.directions + split.heads
    if exposed and isinstance(declaration_from_text(header.privacy), CoefficientNoise):
        raise RequestError(
            "privacy: an update that declares noise on its coefficients holds nothing else, got "
            f"{split.directions} bytes of free directions and {split.heads} of heads without noise: leave them out, or "
            "declare nothing"
        )


def _check_head(split: PayloadSplit) -> None:
    """Refuse a head that is too large to be handed on.

    Raises:
        PayloadTooLargeError: with both sizes.
    """
    if split.heads > MAX_HEAD_BYTES:
        raise PayloadTooLargeError(
            f"the shared head has {split.heads} bytes, at most {MAX_HEAD_BYTES} are accepted: send it with "
            "share_head = false"
        )


def _sharing(header: hub_pb2.SubmitHeader) -> Sharing:
    names = tuple(sorted(set(header.sharing.organisations)))
    for name in names:
        check_name(name, "organisation")
    return Sharing(header.sharing.open, names)


def _look_up(
    journal: Journal, caller: Caller, header: hub_pb2.SubmitHeader
) -> tuple[UpdateRow | None, TaskRow | None, Mapping[tuple[str, int], str]]:
    """Return what the journal knows of the update, of its task, and of its signer's number."""
    signed = signed_already(journal, [(caller.signer, header.sequence)])
    return find_update(journal, header.update_id), find_task(journal, header.task_id), signed


def _same_header(known: UpdateRow, caller: Caller, header: hub_pb2.SubmitHeader) -> bool:
    """Return whether the header announces the known update again; raises UpdateConflictError if it is another."""
    return same_update(
        known,
        update_id=header.update_id,
        member=caller.member,
        task_id=header.task_id,
        sha256=header.payload_sha256,
        size=header.payload_size,
    )


def _new_update(caller: Caller, header: hub_pb2.SubmitHeader, facts: UpdateFacts) -> NewUpdate:
    return NewUpdate(
        update_id=header.update_id,
        member=caller.member,
        task_id=header.task_id,
        create=header.create,
        base_version=facts.base_version,
        sha256=header.payload_sha256,
        size=header.payload_size,
        coefficients=facts.split.coefficients,
        directions=facts.split.directions,
        heads=facts.split.heads,
        envelope=facts.split.envelope,
        lease_id=header.lease_id,
        rows=header.rows,
        sharing=_sharing(header),
        schema_sha256=header.schema_sha256,
        signer=caller.signer,
        sequence=header.sequence,
        signature=header.signature,
        privacy=header.privacy,
    )
