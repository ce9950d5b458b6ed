"""Rows of the journal as messages."""

from __future__ import annotations

from share_core.errors import RequestError
from share_core.ledger import TaskLedger
from share_core.privacy import PrivacyLedger
from share_core.types import SpaceSpec
from share_proto.v1 import fleet_pb2, hub_pb2
from share_server.store.records import (
    EvaluationRow,
    NodeRow,
    TaskRow,
    TrafficRow,
    UpdateRow,
    UpdateState,
)

_STATES = {
    UpdateState.ACCEPTED: hub_pb2.UPDATE_STATE_ACCEPTED,
    UpdateState.MERGED: hub_pb2.UPDATE_STATE_MERGED,
    UpdateState.REFUSED: hub_pb2.UPDATE_STATE_REFUSED,
    UpdateState.QUARANTINED: hub_pb2.UPDATE_STATE_QUARANTINED,
    UpdateState.FORGOTTEN: hub_pb2.UPDATE_STATE_FORGOTTEN,
}


def describe(spec: SpaceSpec, version: int, max_payload_bytes: int) -> hub_pb2.DescribeSpaceResponse:
    """Return the space as a message, sites sorted by name."""
    sites = [
        hub_pb2.SiteSpec(name=site.name, d_out=site.d_out, d_in=site.d_in, sha256=site.sha256)
        for _, site in sorted(spec.sites.items())
    ]
    return hub_pb2.DescribeSpaceResponse(
        space_id=spec.space_id,
        backbone=spec.backbone,
        sites=sites,
        version=version,
        k_max=spec.k_max,
        tau=spec.tau,
        rank_limit=spec.rank_limit,
        max_payload_bytes=max_payload_bytes,
    )


def receipt(row: UpdateRow, duplicate: bool) -> hub_pb2.SubmitResponse:
    """Return the receipt of a durable update."""
    return hub_pb2.SubmitResponse(
        update_id=row.new.update_id, ingest_seq=row.ingest_seq, entry_hash=row.entry_hash, duplicate=duplicate
    )


def update_record(row: UpdateRow) -> hub_pb2.UpdateRecord:
    """Return one update as a message."""
    new = row.new
    return hub_pb2.UpdateRecord(
        update_id=new.update_id,
        ingest_seq=row.ingest_seq,
        member=new.member,
        task_id=new.task_id,
        state=_STATES[row.state],
        reason=row.reason,
        base_version=new.base_version,
        version=row.version,
        staleness=row.version - 1 - new.base_version if row.version else 0,
        bytes=hub_pb2.PayloadBytes(
            coefficients=new.coefficients, directions=new.directions, heads=new.heads, envelope=new.envelope
        ),
        received_unix_ms=row.received_ms,
        relative_error=row.relative_error,
        payload_sha256=new.sha256,
        signer=new.signer,
        sequence=new.sequence,
        signature=new.signature,
        privacy=new.privacy,
        lease_id=new.lease_id,
        rows=new.rows,
        create=new.create,
        sharing=hub_pb2.TaskSharing(open=new.sharing.open, organisations=new.sharing.organisations),
        schema_sha256=new.schema_sha256,
    )


def task_record(
    row: TaskRow, ledger: TaskLedger, tau: float, coefficients: int, spent: PrivacyLedger | None = None
) -> hub_pb2.TaskRecord:
    """Return one task as a message; ``spent`` is what its published updates declared of noise on coefficients."""
    return hub_pb2.TaskRecord(
        task_id=row.task_id,
        owner=row.owner,
        created_version=row.created_version,
        updated_version=row.updated_version,
        updates=row.updates,
        error_bound=ledger.bound,
        over_budget=ledger.bound > tau,
        coefficients=coefficients,
        epsilon=None if spent is None else spent.epsilon,
        delta=None if spent is None else spent.delta,
    )


def evaluation(row: EvaluationRow) -> hub_pb2.Evaluation:
    """Return one scalar as a message."""
    return hub_pb2.Evaluation(
        task_id=row.task_id, version=row.version, metric=row.metric, value=row.value, rows=row.rows
    )


def traffic(row: TrafficRow) -> hub_pb2.MemberTraffic:
    """Return the byte counters of one member as a message."""
    return hub_pb2.MemberTraffic(
        member=row.member,
        up=hub_pb2.PayloadBytes(
            coefficients=row.coefficients, directions=row.directions, heads=row.heads, envelope=row.envelope
        ),
        down_deltas=row.down_deltas,
        down_snapshots=row.down_snapshots,
        down_heads=row.down_heads,
        updates=row.updates,
    )


def node(row: NodeRow) -> fleet_pb2.Node:
    """Return one node as a message."""
    return fleet_pb2.Node(
        member=row.member,
        public_key_pem=row.public_key,
        node_id=row.node_id,
        revoked=row.revoked,
        key_sha256=row.key_sha256,
    )


def limit(value: int, most: int) -> int:
    """Return a page size: 0 means ``most``, which is also the largest.

    Raises:
        RequestError: it is negative.
    """
    if value < 0:
        raise RequestError(f"limit must not be negative, got {value}")
    return min(value or most, most)
