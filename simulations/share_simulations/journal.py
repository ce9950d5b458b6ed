"""The journal of a hub as its operator reads it over gRPC."""

from __future__ import annotations

from share_proto.v1 import hub_pb2, hub_pb2_grpc

_DEADLINE_S = 60.0


def read_journal(hub: hub_pb2_grpc.HubStub) -> list[hub_pb2.UpdateRecord]:
    """Return every update of a hub in order of arrival; ``hub`` must be open as operator."""
    records: list[hub_pb2.UpdateRecord] = []
    after = 0
    while page := hub.ListUpdates(hub_pb2.ListUpdatesRequest(after_seq=after), timeout=_DEADLINE_S).updates:
        records += page
        after = page[-1].ingest_seq
    return records
