"""The Hub service: each method says who is asking, does one thing, and answers."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from grpc import aio

from share_core.errors import GO_AHEAD_KEY, AccessError, RequestError, UnknownUpdateError, VersionError
from share_core.names import check_update_id, split_task_id
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.hub import convert, log
from share_server.hub.access import CALLER, Caller
from share_server.hub.clock import now_ms
from share_server.hub.engine import Engine
from share_server.hub.feed import bases_bytes, coefficients
from share_server.hub.membership import Membership
from share_server.hub.streams import Streams
from share_server.hub.traffic import Traffic
from share_server.operations.backup import backup_running
from share_server.store.members import list_certificates, list_members
from share_server.store.privacy import read_privacy
from share_server.store.records import EvaluationRow, UpdateState
from share_server.store.reports import list_evaluations, list_traffic, record_evaluations
from share_server.store.updates import count_states, decide_update, find_update, list_updates
from share_server.store.versions import count_compactions, list_tasks

_METRIC = re.compile(r"[a-z0-9_.-]{1,64}")
_PAGE = 1000
_MOST_EVALUATIONS = 1000
_MOST_REASON = 500

Context = aio.ServicerContext[Any, Any]


class HubService(hub_pb2_grpc.HubServicer):
    """See ``hub.proto`` for what each method promises."""

    def __init__(
        self,
        spec: SpaceSpec,
        engine: Engine,
        streams: Streams,
        traffic: Traffic,
        membership: Membership,
        signer_certificate: bytes,
    ) -> None:
        self._store = engine.store
        self._spec = spec
        self._feed = engine.feed
        self._published = engine.published
        self._intake = engine.intake
        self._loop = engine.loop
        self._collector = engine.collector
        self._heads = engine.heads
        self._streams = streams
        self._traffic = traffic
        self._membership = membership
        self._signer_certificate = signer_certificate
        self._started_ms = now_ms()

    async def DescribeSpace(
        self, request: hub_pb2.DescribeSpaceRequest, context: Context
    ) -> hub_pb2.DescribeSpaceResponse:
        """Sites, limits, newest version."""
        answer = convert.describe(self._spec, self._feed.version, self._intake.max_payload_bytes)
        answer.signer_certificate_pem = self._signer_certificate
        answer.oldest_base_version = self._feed.oldest
        return answer

    async def Submit(
        self, request_iterator: AsyncIterator[hub_pb2.SubmitRequest], context: Context
    ) -> hub_pb2.SubmitResponse:
        """Receive one update; answer when it is durable."""

        async def go_ahead() -> None:
            await context.send_initial_metadata(((GO_AHEAD_KEY, "1"),))

        row, duplicate = await self._intake.receive(CALLER.get(), aiter(request_iterator), go_ahead)
        self._loop.wake()
        return convert.receipt(row, duplicate)

    async def GetUpdate(self, request: hub_pb2.GetUpdateRequest, context: Context) -> hub_pb2.GetUpdateResponse:
        """One update of the caller's organisation; operators see all."""
        caller = CALLER.get()
        update_id = check_update_id(request.update_id)
        row = await self._store.do(lambda journal: find_update(journal, update_id))
        visible = _visible_organisation(caller)
        if row is None or visible not in (None, row.new.member.split("/", 1)[0]):
            raise UnknownUpdateError(f"there is no update {update_id} of {caller.organisation}")
        return hub_pb2.GetUpdateResponse(update=convert.update_record(row))

    async def GetUpload(self, request: hub_pb2.GetUploadRequest, context: Context) -> hub_pb2.GetUploadResponse:
        """How much of an unfinished upload is durable, or the receipt of a finished one."""
        offset, row = await self._intake.progress(CALLER.get(), check_update_id(request.update_id))
        receipt = None if row is None else convert.receipt(row, duplicate=True)
        return hub_pb2.GetUploadResponse(offset=offset, receipt=receipt)

    async def ListUpdates(self, request: hub_pb2.ListUpdatesRequest, context: Context) -> hub_pb2.ListUpdatesResponse:
        """The updates of the caller's organisation in ingest order; operators see all."""
        organisation = _visible_organisation(CALLER.get())
        after, most = request.after_seq, convert.limit(request.limit, _PAGE)
        rows = await self._store.do(lambda journal: list_updates(journal, after, most, organisation))
        return hub_pb2.ListUpdatesResponse(updates=[convert.update_record(row) for row in rows])

    def FollowVersions(
        self, request: hub_pb2.FollowVersionsRequest, context: Context
    ) -> AsyncIterator[hub_pb2.FollowVersionsResponse]:
        """Every version after the caller's, then new ones as they come."""
        return self._streams.follow(CALLER.get(), request)

    def FetchSnapshot(
        self, request: hub_pb2.FetchSnapshotRequest, context: Context
    ) -> AsyncIterator[hub_pb2.FetchSnapshotResponse]:
        """One whole version."""
        return self._streams.fetch(CALLER.get(), request)

    def FetchHead(
        self, request: hub_pb2.FetchHeadRequest, context: Context
    ) -> AsyncIterator[hub_pb2.FetchHeadResponse]:
        """The shared head of one task in one version."""
        return self._streams.fetch_head(CALLER.get(), request, self._heads.of_task)

    async def ListTasks(self, request: hub_pb2.ListTasksRequest, context: Context) -> hub_pb2.ListTasksResponse:
        """Every task that the newest version holds, with its ledger."""
        rows, spent = await self._store.do(lambda journal: (list_tasks(journal), read_privacy(journal)))
        state = self._feed.state
        tasks = [
            convert.task_record(
                row,
                state.ledger[row.task_id],
                self._spec.tau,
                coefficients(state.space, row.task_id),
                spent.get(row.task_id),
            )
            for row in rows
            if row.task_id in state.ledger
        ]
        return hub_pb2.ListTasksResponse(tasks=tasks, version=state.space.version)

    async def ReportEvaluation(
        self, request: hub_pb2.ReportEvaluationRequest, context: Context
    ) -> hub_pb2.ReportEvaluationResponse:
        """Record scalars of the caller's own tasks; durable when answered."""
        if len(request.evaluations) > _MOST_EVALUATIONS:
            raise RequestError(f"at most {_MOST_EVALUATIONS} evaluations at once, got {len(request.evaluations)}")
        rows = [self._evaluation(CALLER.get(), one) for one in request.evaluations]
        await self._store.do(lambda journal: record_evaluations(journal, rows))
        return hub_pb2.ReportEvaluationResponse()

    async def ListEvaluations(
        self, request: hub_pb2.ListEvaluationsRequest, context: Context
    ) -> hub_pb2.ListEvaluationsResponse:
        """Every reported scalar."""
        rows = await self._store.do(list_evaluations)
        return hub_pb2.ListEvaluationsResponse(evaluations=[convert.evaluation(row) for row in rows])

    async def GetStatus(self, request: hub_pb2.GetStatusRequest, context: Context) -> hub_pb2.GetStatusResponse:
        """Counters; traffic of the caller's organisation, operators see all."""
        await self._traffic.flush()
        states = await self._store.do(count_states)
        members = await self._store.do(list_traffic)
        compactions = await self._store.do(count_compactions)
        organisation = _visible_organisation(CALLER.get())
        space = self._feed.state.space
        return hub_pb2.GetStatusResponse(
            space_id=self._spec.space_id,
            version=space.version,
            tasks=len(space.cores),
            accepted=states[UpdateState.ACCEPTED],
            merged=states[UpdateState.MERGED],
            refused=states[UpdateState.REFUSED],
            quarantined=states[UpdateState.QUARANTINED],
            k_left_max=max((basis.k_out for basis in space.bases.values()), default=0),
            k_right_max=max((basis.k_in for basis in space.bases.values()), default=0),
            subscribers=self._published.subscribers,
            traffic=[convert.traffic(row) for row in members if organisation in (None, row.member.split("/", 1)[0])],
            started_unix_ms=self._started_ms,
            subspace_bytes=bases_bytes(space),
            compactions=compactions,
        )

    async def GetRoster(self, request: hub_pb2.GetRosterRequest, context: Context) -> hub_pb2.GetRosterResponse:
        """Every member with the key it enrolled last, for relays."""
        rows = await self._store.do(list_members)
        return hub_pb2.GetRosterResponse(
            members=[
                hub_pb2.RosterMember(member=row.member, role=row.role, key_sha256=row.key_sha256, revoked=row.revoked)
                for row in rows
            ]
        )

    async def ListCertificates(
        self, request: hub_pb2.ListCertificatesRequest, context: Context
    ) -> hub_pb2.ListCertificatesResponse:
        """A page of the certificates that were issued, for operators."""
        after, most = request.after, convert.limit(request.limit, _PAGE)
        rows = await self._store.do(lambda journal: list_certificates(journal, after, most))
        return hub_pb2.ListCertificatesResponse(
            certificates=[
                hub_pb2.IssuedCertificate(
                    number=row.number, key_sha256=row.key_sha256, member=row.member, certificate_pem=row.certificate
                )
                for row in rows
            ]
        )

    async def Backup(self, request: hub_pb2.BackupRequest, context: Context) -> AsyncIterator[hub_pb2.BackupProgress]:
        """Copy the server directory while serving; nothing is collected meanwhile."""
        async with self._collector.held, aclosing(backup_running(self._store, Path(request.directory))) as steps:
            async for done, total, version in steps:
                yield hub_pb2.BackupProgress(done=done, total=total, version=version, finished=done == total)

    async def Renew(self, request: hub_pb2.RenewRequest, context: Context) -> hub_pb2.RenewResponse:
        """A new certificate over the caller's present key."""
        return await self._membership.renew(CALLER.get())

    async def Revoke(self, request: hub_pb2.RevokeRequest, context: Context) -> hub_pb2.RevokeResponse:
        """Shut a member out, or let it in again."""
        await self._membership.revoke(request.member, request.undo)
        return hub_pb2.RevokeResponse()

    async def DecideUpdate(
        self, request: hub_pb2.DecideUpdateRequest, context: Context
    ) -> hub_pb2.DecideUpdateResponse:
        """Release or refuse one update that is set aside."""
        update_id, release, reason = check_update_id(request.update_id), request.release, request.reason.strip()
        if not release and not reason:
            raise RequestError(f"update {update_id}: say why it is refused, its owner reads it")
        if len(reason) > _MOST_REASON:
            raise RequestError(f"a reason has at most {_MOST_REASON} characters, got {len(reason)}")
        row = await self._store.do(lambda journal: decide_update(journal, update_id, release, reason))
        log.info("decided", update_id=update_id, task_id=row.new.task_id, release=release, reason=reason)
        self._loop.wake()
        return hub_pb2.DecideUpdateResponse(update=convert.update_record(row))

    def _evaluation(self, caller: Caller, one: hub_pb2.Evaluation) -> EvaluationRow:
        organisation, _ = split_task_id(one.task_id)
        if organisation != caller.organisation:
            raise AccessError(f"task {one.task_id} belongs to {organisation}, not to {caller.organisation}")
        if not 0 <= one.version <= self._feed.version:
            raise VersionError(
                f"evaluation of {one.task_id} at version {one.version}: the newest is {self._feed.version}"
            )
        if not _METRIC.fullmatch(one.metric):
            raise RequestError(f"metric {one.metric[:80]!r} is not 1 to 64 of a-z 0-9 _ . -")
        if not math.isfinite(one.value):
            raise RequestError(f"evaluation {one.metric} of {one.task_id} is {one.value}, expected a finite number")
        if one.rows < 0:
            raise RequestError(f"evaluation {one.metric} of {one.task_id}: rows must not be negative")
        return EvaluationRow(one.task_id, one.version, one.metric, one.value, one.rows)


def _visible_organisation(caller: Caller) -> str | None:
    """Return the organisation whose records the caller may see; None: all."""
    return None if caller.identity.role in ("operator", "fleet") else caller.organisation
