"""What a relay holds: a run of steps without a gap, and one whole version from which late readers begin.

On the disk each step and the whole version are two files: the payload, then its header with the signed manifests, which
makes it count. Nothing needs to be durable here, since it can be fetched again: at the start every file is checked
against its signature, and what does not hold is dropped with everything after it.

Invariant: the steps are ``base + 1 .. head``; if ``base`` is not 0, the whole version is between ``base`` and ``head``.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import OrderedDict
from pathlib import Path

from google.protobuf.message import DecodeError

from share_core.errors import DigestError, ManifestError, RebaseError, StorageError, VersionError
from share_proto.v1 import hub_pb2
from share_server.hub import log
from share_server.hub.once import Once
from share_server.hub.streams import SMALL_CHAIN_BYTES
from share_server.relay.verify import Checker, check_payload

KEPT_BYTES = 2**30
"""Most bytes of steps on the disk; below it everything is kept."""

_MEMORY_BYTES = 64 * 2**20


class Replica:
    """The versions of one relay. Everything runs on the event loop; files are read and written on threads."""

    def __init__(self, root: Path, kept_bytes: int = KEPT_BYTES) -> None:
        """Make the directory. Nothing is held before :meth:`load`."""
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._kept_bytes = kept_bytes
        self._steps: dict[int, hub_pb2.DeltaHeader] = {}
        self._step_bytes = 0
        self._memory: OrderedDict[int, bytes] = OrderedDict()
        self._memory_bytes = 0
        self._whole_memory: tuple[int, bytes] | None = None
        self._reading: Once[Path, bytes] = Once()
        self._writing = asyncio.Lock()
        self._changed = asyncio.Event()
        self.whole: hub_pb2.SnapshotHeader | None = None
        """Header of the whole version that is held."""
        self.head = 0
        """The newest version held; 0 for none."""
        self.link = ""
        """SHA-256 of the manifest body of :attr:`head`, to which the next must link."""
        self.closing = False
        """Whether the relay is about to stop."""

    @property
    def base(self) -> int:
        """The oldest version from which the steps lead on."""
        return self.head - len(self._steps)

    def chain_bytes(self, after: int) -> int:
        """Return the bytes of all steps after a version, which must not be before :attr:`base`."""
        return sum(self._steps[version].payload_size for version in range(after + 1, self.head + 1))

    def whole_is_stale(self) -> bool:
        """Return whether a newer whole version would spare late readers much, or is needed to drop old steps."""
        if self.whole is None:
            return self._step_bytes > self._kept_bytes
        return self.chain_bytes(self.whole.version) > max(SMALL_CHAIN_BYTES, self.whole.payload_size // 2)

    async def wait_after(self, version: int, timeout_s: float) -> None:
        """Return when a version after ``version`` is held, when the relay closes, or after ``timeout_s``."""
        if self.head > version or self.closing:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # not wait_for: it can forget a cancellation
                await self._changed.wait()

    def close(self) -> None:
        """Tell everybody who waits that the relay stops."""
        self.closing = True
        self._wake()

    async def load(self, checker: Checker) -> None:
        """Take over what an earlier life left on the disk, as far as its signatures hold, and remove the rest."""
        loaded = await asyncio.to_thread(_load, self._root, checker)
        self.whole, self._steps, self.head, self.link = loaded
        self._step_bytes = self.chain_bytes(self.base)
        log.info("versions on disk", whole=self.whole.version if self.whole else 0, head=self.head)
        self._wake()

    async def append(self, header: hub_pb2.DeltaHeader, payload: bytes, link: str) -> None:
        """Hold the next step, which was verified; ``link`` is the digest of its manifest.

        Raises:
            VersionError: a whole version has replaced what it follows. OSError: the disk refused.
        """
        kept = hub_pb2.DeltaHeader()
        kept.CopyFrom(header)
        kept.ClearField("data")
        async with self._writing:
            if header.version != self.head + 1:
                raise VersionError(f"the step to version {header.version} does not follow version {self.head}")
            await asyncio.to_thread(_write, self._step_path(header.version), payload, kept.SerializeToString())
            self._steps[header.version] = kept
            self._step_bytes += kept.payload_size
            self._remember(header.version, payload)
            self.head, self.link = header.version, link
            self._wake()
            await self._drop_old()

    async def put_whole(self, header: hub_pb2.SnapshotHeader, payload: bytes, link: str) -> None:
        """Hold a whole version, which was verified. One after :attr:`head` replaces everything held before.

        Raises:
            OSError: the disk refused.
        """
        async with self._writing:
            before = self.whole
            path = self._whole_path(header.version)
            await asyncio.to_thread(_write, path, payload, header.SerializeToString())
            self.whole = header
            gone = [self._whole_path(before.version)] if before and before.version != header.version else []
            if header.version > self.head:
                gone += [self._step_path(version) for version in self._steps]
                self._steps.clear()
                self._memory.clear()
                self._step_bytes = self._memory_bytes = 0
                self.head, self.link = header.version, link
                self._wake()
            await asyncio.to_thread(_remove, gone)
            await self._drop_old()

    async def step(self, version: int) -> tuple[hub_pb2.DeltaHeader, bytes]:
        """Return header and payload of a step that is held.

        Raises:
            RebaseError: it is held no more. StorageError: its file cannot be read.
        """
        header = self._steps.get(version)
        if header is not None and version in self._memory:
            self._memory.move_to_end(version)
            return header, self._memory[version]
        payload = None if header is None else await self._read(self._step_path(version))
        held = version in self._steps  # it may have been dropped while its file was read
        if header is not None and payload is not None:
            if held:
                self._remember(version, payload)
            return header, payload
        if held:
            raise _gone(self._step_path(version))
        raise RebaseError(f"the step to version {version} is no longer held: fetch a whole version")

    async def whole_payload(self) -> tuple[hub_pb2.SnapshotHeader, bytes]:
        """Return header and payload of the whole version; there must be one.

        Raises:
            StorageError: its file cannot be read.
        """
        while True:
            assert self.whole is not None
            header = self.whole
            if self._whole_memory is not None and self._whole_memory[0] == header.version:
                return header, self._whole_memory[1]
            payload = await self._read(self._whole_path(header.version))
            if header is self.whole:  # else it was replaced meanwhile
                if payload is None:
                    raise _gone(self._whole_path(header.version))
                self._whole_memory = (header.version, payload)

    async def _read(self, path: Path) -> bytes | None:
        """Return what a file holds, read once for all who ask at the same time; None if it is not there."""

        async def work() -> bytes:
            return await asyncio.to_thread(path.read_bytes)

        try:
            return await self._reading.run(path, work)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"the relay's disk refused: {error.strerror}") from error

    async def _drop_old(self) -> None:
        """Drop the oldest steps when there are too many, as far as the whole version makes up for them."""
        gone = []
        while self._step_bytes > self._kept_bytes and self.whole is not None and self.base < self.whole.version:
            oldest = self.base + 1
            self._step_bytes -= self._steps.pop(oldest).payload_size
            self._memory_bytes -= len(self._memory.pop(oldest, b""))
            gone.append(self._step_path(oldest))
        if gone:
            await asyncio.to_thread(_remove, gone)

    def _remember(self, version: int, payload: bytes) -> None:
        self._memory_bytes += len(payload) - len(self._memory.pop(version, b""))
        self._memory[version] = payload
        while len(self._memory) > 1 and self._memory_bytes > _MEMORY_BYTES:
            self._memory_bytes -= len(self._memory.popitem(last=False)[1])

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _step_path(self, version: int) -> Path:
        return self._root / f"{version}.step"

    def _whole_path(self, version: int) -> Path:
        return self._root / f"{version}.whole"


def _gone(path: Path) -> StorageError:
    return StorageError(f"the relay's file {path.name} is gone: start the relay again, it fetches what is missing")


def _head(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _write(path: Path, payload: bytes, header: bytes) -> None:
    """Write payload, then header, each whole or not at all. After a power cut either may be torn: it is checked."""
    for target, data in ((path, payload), (_head(path), header)):
        temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
        temporary.write_bytes(data)
        temporary.rename(target)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        _head(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _load(
    root: Path, checker: Checker
) -> tuple[hub_pb2.SnapshotHeader | None, dict[int, hub_pb2.DeltaHeader], int, str]:
    """Return (whole version, steps after it, newest version, link) of what holds; remove everything else."""
    whole, link = None, ""
    for version in sorted(_versions(root, "whole"), reverse=True):
        if (found := _whole(root / f"{version}.whole", checker)) is not None:
            whole, link = found
            break
    head = whole.version if whole is not None else 0
    steps: dict[int, hub_pb2.DeltaHeader] = {}
    while (step := _step(root / f"{head + 1}.step", checker, head, link)) is not None:
        header, link = step
        head = header.version
        steps[head] = header
    kept = {f"{version}.step" for version in steps} | ({f"{whole.version}.whole"} if whole is not None else set())
    for path in root.iterdir():
        if path.name.removesuffix(".head") not in kept:
            path.unlink(missing_ok=True)
    return whole, steps, head, link


def _versions(root: Path, kind: str) -> list[int]:
    return [int(path.name.split(".")[0]) for path in root.glob(f"*.{kind}") if path.name.split(".")[0].isdigit()]


def _whole(path: Path, checker: Checker) -> tuple[hub_pb2.SnapshotHeader, str] | None:
    try:
        header = hub_pb2.SnapshotHeader.FromString(_head(path).read_bytes())
        link = checker.whole(header)
        check_payload(path.read_bytes(), header.payload_sha256, header.payload_size, path.name)
    except (OSError, DecodeError, ManifestError, DigestError) as error:
        log.warning("dropped from disk", file=path.name, reason=str(error))
        return None
    return header, link


def _step(path: Path, checker: Checker, head: int, link: str) -> tuple[hub_pb2.DeltaHeader, str] | None:
    if not _head(path).exists():
        return None
    try:
        header = hub_pb2.DeltaHeader.FromString(_head(path).read_bytes())
        own = checker.step(header, head, link)
        check_payload(path.read_bytes(), header.payload_sha256, header.payload_size, path.name)
    except (OSError, DecodeError, ManifestError, DigestError) as error:
        log.warning("dropped from disk", file=path.name, reason=str(error))
        return None
    return header, own
