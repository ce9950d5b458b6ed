"""The egress log: everything that leaves this building, written down and flushed before it leaves.

::

    CDIR/egress/00000001.jsonl    one JSON object a line; older files are kept when the next one is begun
                00000002.jsonl

Every line has ``number`` (from 1, without gaps), ``previous`` (SHA-256 of the line before it, without its newline;
zeros for the first), ``time`` (UTC), ``event``, ``to`` (host:port) and ``bytes``. The events:

``call``     one gRPC message but a payload: ``method``, ``sha256`` of the message, ``fields`` with what is in it
``upload``   the payload of one update, from ``offset`` on: ``space``, ``task``, ``update_id``, every tensor's name,
             dtype, shape and bytes, ``payload_bytes``, ``payload_sha256``, ``privacy``. An upload that is sent again is
             a line again: those bytes left twice.
``fleet``    one piece of what Flower's SuperNode sent through the forwarder: ``sha256``, and the ``request`` it begins
``receipt``  no bytes: the hub has said that it holds an update, with its ``ingest_seq`` and ``entry_hash``

What is counted are messages and payloads, not the framing of TLS, HTTP/2 and gRPC around them. A line is written before
its bytes go out, so after a crash the log may tell of bytes that stayed, and never misses bytes that left. If it cannot
be written, nothing is sent. Secrets (join tokens) stand there as their hash.

The chain shows that no line in between was changed or taken out. The end of the log is proved by comparing it with what
the hub says it received: :mod:`share_client.egress_check`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from share_client.durable import make_private_directory
from share_core.durable import PRIVATE, flush_directory
from share_core.errors import PayloadError, StorageError
from share_proto.v1 import hub_pb2

START = "0" * 64
"""What the first line names as the line before it."""

_LARGEST = 16 << 20
"""Bytes after which the next file is begun."""
_LONGEST_TEXT = 200
"""Characters of a text that are shown; longer ones are hashed."""
_SECRET = ("token",)
_REQUEST = re.compile(rb"([A-Z]{3,10} [!-~]{1,200}) HTTP/1\.[01]\r\n")


@dataclass
class _End:
    """Where the log ends."""

    path: Path
    size: int
    number: int
    digest: str


class EgressLog:
    """Appends to one egress log. Threads and processes may share the directory; making one touches no disk."""

    def __init__(self, directory: Path, largest: int = _LARGEST) -> None:
        self._directory = directory
        self._largest = largest
        self._end: _End | None = None
        self._mutex = threading.Lock()

    def call(self, to: str, method: str, message: Message) -> None:
        """Write down one gRPC message that is about to leave."""
        data = message.SerializeToString()
        self.record("call", to, len(data), method=method, sha256=_sha256(data), fields=_shown(message))

    def upload(self, to: str, header: hub_pb2.SubmitHeader, payload: bytes) -> None:
        """Write down the payload of one update that is about to leave, from ``header.offset`` on."""
        self.record(
            "upload",
            to,
            len(payload) - header.offset,
            space=header.space_id,
            task=header.task_id,
            update_id=header.update_id,
            offset=header.offset,
            payload_bytes=len(payload),
            payload_sha256=_sha256(payload),
            privacy=header.privacy,
            tensors=_tensors(payload),
        )

    def receipt(self, to: str, receipt: hub_pb2.SubmitResponse) -> None:
        """Write down that the hub holds an update."""
        self.record(
            "receipt",
            to,
            0,
            update_id=receipt.update_id,
            ingest_seq=receipt.ingest_seq,
            entry_hash=receipt.entry_hash,
            duplicate=receipt.duplicate,
        )

    def fleet(self, to: str, piece: bytes) -> None:
        """Write down one piece of the Flower plane that is about to leave."""
        begins = _REQUEST.match(piece)
        request = begins[1].decode("ascii") if begins else ""
        self.record("fleet", to, len(piece), sha256=_sha256(piece), request=request)

    def record(self, event: str, to: str, count: int, **fields: Any) -> None:
        """Append one line and flush it.

        Raises:
            StorageError: it could not be written: what it is about must not leave.
        """
        try:
            with self._mutex, self._locked():
                end = self._end if self._end is not None and self._is_end(self._end) else _find_end(self._directory)
                line = _line(end, event, to, count, fields)
                self._end = self._append(end, line)
        except OSError as error:
            raise StorageError(
                f"the egress log in {self._directory} cannot be written ({error}): nothing is sent without it"
            ) from error

    def _is_end(self, end: _End) -> bool:
        """Whether nobody has appended since."""
        following = _path(self._directory, int(end.path.stem) + 1)
        return end.path.exists() and end.path.stat().st_size == end.size and not following.exists()

    def _append(self, end: _End, line: bytes) -> _End:
        begin = end.size > 0 and end.size + len(line) > self._largest
        path = _path(self._directory, int(end.path.stem) + 1) if begin else end.path
        size = 0 if begin else end.size
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, PRIVATE)
        with os.fdopen(handle, "wb") as file:
            file.truncate(size)  # a crash may have left a part of a line: what it was about has not left
            file.seek(size)
            file.write(line)
            file.flush()  # one bare write may take a part and report no error
            os.fsync(file.fileno())
        if size == 0:
            flush_directory(self._directory)
        return _End(path, size + len(line), end.number + 1, _sha256(line[:-1]))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        make_private_directory(self._directory)
        with (self._directory / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def egress_files(directory: Path) -> list[Path]:
    """Return the files of a log, oldest first."""
    return sorted(directory.glob("[0-9]*.jsonl"))


def read_egress(directory: Path) -> list[bytes]:
    """Return every whole line of a log as it stands on the disk, oldest first; what a crash cut short is left out."""
    lines: list[bytes] = []
    for path in egress_files(directory):
        lines += path.read_bytes().split(b"\n")[:-1]
    return lines


def _find_end(directory: Path) -> _End:
    files = egress_files(directory)
    number, digest = 0, START
    for path in reversed(files):
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole:
            last = whole[:-1].rpartition(b"\n")[2]
            number, digest = int(json.loads(last)["number"]), _sha256(last)
            if path == files[-1]:
                return _End(path, len(whole), number, digest)
            break
    return _End(files[-1] if files else _path(directory, 1), 0, number, digest)


def _line(end: _End, event: str, to: str, count: int, fields: dict[str, Any]) -> bytes:
    body = {
        "number": end.number + 1,
        "previous": end.digest,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "to": to,
        "bytes": count,
        **fields,
    }
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def _path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.jsonl"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tensors(payload: bytes) -> list[dict[str, Any]]:
    """Return what the tensors of a payload are; none for one that the hub will refuse anyway."""
    from share_core.tensorfile import describe_tensors

    try:
        return describe_tensors(payload)
    except PayloadError:
        return []


def _shown(message: Message) -> dict[str, Any]:
    """Return what a message holds: short values as they are, bytes, long texts and secrets as size and hash."""
    shown: dict[str, Any] = {}
    for field, value in message.ListFields():
        many = field.is_repeated
        values: Sequence[Any] = value if many else [value]
        parts = [_shown_value(field, one) for one in values]
        shown[field.name] = parts if many else parts[0]
    return shown


def _shown_value(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Message):
        return _shown(value)
    if isinstance(value, str) and field.name not in _SECRET and len(value) <= _LONGEST_TEXT:
        return value
    if isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        return {"bytes": len(data), "sha256": _sha256(data)}
    return value
