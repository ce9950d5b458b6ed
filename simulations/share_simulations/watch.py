"""What the hub knows, read over its gRPC service with the operator's certificate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import grpc

from share_core.errors import AccessError, FedshareError, IdentityError, UnavailableError
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_simulations.metrics import Measured, Site, Submission

_PAGE = 1000
_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Observation:
    """The hub's records at one moment."""

    version: int = 0
    submissions: tuple[Submission, ...] = ()
    """Every durable update, in journal order."""
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Task and reason of updates that could not be merged."""
    measured: tuple[Measured, ...] = ()
    """Accuracies that clients reported."""
    down_bytes: int = 0
    """Deltas and snapshots sent."""
    down_heads: int = 0
    """Shared heads sent."""
    sites: tuple[Site, ...] = ()
    k_left: int = 0
    """Largest number of left basis vectors over the sites."""
    k_right: int = 0
    subspace_bytes: int = 0
    compactions: int = 0
    tau: float = 0.0
    k_max: int = 0

    @property
    def merged_tasks(self) -> frozenset[str]:
        """Tasks with at least one merged update."""
        return frozenset(s.task for s in self.submissions if s.version)

    def evaluated(self, task: str) -> int:
        """Return the newest version at which a task's accuracy was reported; 0 if none was."""
        return max((m.version for m in self.measured if m.task == task), default=0)

    def complete(self, tasks: Iterable[str]) -> bool:
        """Return whether all tasks are merged, nothing waits, and each is evaluated at the newest version."""
        wanted = tuple(tasks)
        return (
            self.merged_tasks.issuperset(wanted)
            and all(s.version for s in self.submissions)
            and all(self.evaluated(t) == self.version for t in wanted)
        )


class HubWatch:
    """A reader of the hub's records. Close it after use."""

    def __init__(self, address: str, authority: bytes, certificate: bytes, key: bytes) -> None:
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        self._channel = grpc.secure_channel(address, credentials)
        self._hub = hub_pb2_grpc.HubStub(self._channel)
        self._sites: tuple[Site, ...] = ()
        self._limits = (0.0, 0)

    @classmethod
    def of_server(cls, folder: Path, address: str) -> HubWatch:
        """Watch the hub of the server in ``folder`` with the operator's certificate made by ``init``."""
        tls = folder / "tls"
        authority = (folder / "ca" / "ca.pem").read_bytes()
        return cls(address, authority, (tls / "operator.pem").read_bytes(), (tls / "operator.key").read_bytes())

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def observe(self) -> Observation:
        """Read everything once.

        Raises:
            UnavailableError: the hub does not answer now; try again.
            FedshareError: it answers, but refuses.
        """
        try:
            return self._observe()
        except grpc.RpcError as error:
            raise _translated(error) from error

    def _observe(self) -> Observation:
        if not self._sites:
            space = self._hub.DescribeSpace(hub_pb2.DescribeSpaceRequest(), timeout=_CALL_TIMEOUT_S)
            self._sites = tuple(Site(s.d_out, s.d_in) for s in space.sites)
            self._limits = (space.tau, space.k_max)
        # The order matters: what is evaluated was merged before, so the newest version is asked for last.
        evaluations = self._hub.ListEvaluations(hub_pb2.ListEvaluationsRequest(), timeout=_CALL_TIMEOUT_S)
        submissions, refused = self._updates()
        status = self._hub.GetStatus(hub_pb2.GetStatusRequest(), timeout=_CALL_TIMEOUT_S)
        return Observation(
            version=status.version,
            submissions=submissions,
            refused=refused,
            measured=tuple(
                Measured(e.task_id, e.version, e.value, e.rows)
                for e in evaluations.evaluations
                if e.metric == "accuracy"
            ),
            down_bytes=sum(t.down_deltas + t.down_snapshots for t in status.traffic),
            down_heads=sum(t.down_heads for t in status.traffic),
            sites=self._sites,
            k_left=status.k_left_max,
            k_right=status.k_right_max,
            subspace_bytes=status.subspace_bytes,
            compactions=status.compactions,
            tau=self._limits[0],
            k_max=self._limits[1],
        )

    def _updates(self) -> tuple[tuple[Submission, ...], dict[str, str]]:
        """Return the whole journal and the refusals in it, page by page."""
        submissions: list[Submission] = []
        refused: dict[str, str] = {}
        after = 0
        while True:
            request = hub_pb2.ListUpdatesRequest(after_seq=after, limit=_PAGE)
            page = self._hub.ListUpdates(request, timeout=_CALL_TIMEOUT_S).updates
            for record in page:
                after = record.ingest_seq
                submissions.append(submission_of(record))
                if record.state == hub_pb2.UPDATE_STATE_REFUSED:
                    refused[record.task_id] = record.reason
            if len(page) < _PAGE:
                return tuple(submissions), refused


def submission_of(record: hub_pb2.UpdateRecord) -> Submission:
    """Return the journal's record of one update as a plain value."""
    return Submission(
        task=record.task_id,
        member=record.member,
        base_version=record.base_version,
        version=record.version,
        coefficients=record.bytes.coefficients,
        directions=record.bytes.directions,
        heads=record.bytes.heads,
        envelope=record.bytes.envelope,
        received_unix_ms=record.received_unix_ms,
        relative_error=record.relative_error,
    )


def _translated(error: grpc.RpcError) -> FedshareError:
    """Return the error a caller can act on."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    text = f"the hub answered {code.name}: {error.details() if isinstance(error, grpc.Call) else error}"
    kinds: dict[grpc.StatusCode, type[FedshareError]] = {
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
        grpc.StatusCode.UNAUTHENTICATED: IdentityError,
        grpc.StatusCode.PERMISSION_DENIED: AccessError,
    }
    return kinds.get(code, FedshareError)(text)
