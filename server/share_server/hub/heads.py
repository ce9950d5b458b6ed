"""Shared heads: computed when somebody asks, from the updates that are kept, and from nothing else.

The head of a task in a version is the mean of the newest heads of its contributors, weighed as their cores are (see
:mod:`share_server.hub.judging`), over those who share one. Nothing of it is stored, so a crash, a rebuild or a replay
changes nothing, and the head of a forgotten contributor is gone with its update. docs/adr/0020 says why.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from share_core.errors import AccessError, UnknownTaskError, VersionError
from share_core.linalg import float64
from share_core.names import split_task_id
from share_core.types import SharedHead
from share_core.wire import MAX_HEAD_BYTES, encode_head
from share_proto.v1 import hub_pb2
from share_server.hub.access import Caller
from share_server.hub.contents import Contents
from share_server.hub.feed import Feed
from share_server.hub.once import Once
from share_server.hub.signing import sign_head
from share_server.store.records import TaskRow, UpdateRow
from share_server.store.store import Store
from share_server.store.updates import newest_merged
from share_server.store.versions import find_task, no_longer_kept, read_manifest

_KEPT = 4
"""Published heads kept in memory, of at most :data:`share_core.wire.MAX_HEAD_PAYLOAD_BYTES` each."""

PublishedHead = tuple[hub_pb2.HeadHeader, bytes]
"""Header, with its manifest, and payload."""


class Heads:
    """What :class:`share_server.hub.streams.Streams` sends of shared heads."""

    def __init__(self, store: Store, feed: Feed, contents: Contents, signing_key: bytes) -> None:
        self._store = store
        self._feed = feed
        self._contents = contents
        self._signing_key = signing_key
        self._made: OrderedDict[tuple[str, int], PublishedHead] = OrderedDict()
        self._making: Once[tuple[str, int], PublishedHead] = Once()

    async def of_task(self, caller: Caller, task_id: str, version: int) -> PublishedHead:
        """Return the head of a task in a version, 0 for the newest; without tensors where nobody shares one.

        Raises:
            TaskNameError, VersionError, RebaseError, UnknownTaskError: there is no such task or version here.
            AccessError: the task is none of the caller's organisation, and not shared with it.
        """
        organisation, _ = split_task_id(task_id)
        version = self._checked(version)
        task = await self._store.do(lambda journal: find_task(journal, task_id))
        if task is None or not 0 < task.created_version <= version:
            raise UnknownTaskError(f"version {version} holds no task {task_id!r}: ListTasks tells which there are")
        if caller.identity.role != "operator" and not _may_have(caller.organisation, organisation, task):
            raise AccessError(
                f"the head of task {task_id} is for those who may contribute to it: members of {caller.organisation} "
                f"may not; ask {organisation} to share the task"
            )
        key = (task_id, version)
        if key not in self._made:
            self._made[key] = await self._making.run(key, lambda: self._make(task, version))
        self._made.move_to_end(key)
        found = self._made[key]
        while len(self._made) > _KEPT:
            self._made.popitem(last=False)
        return found

    def _checked(self, version: int) -> int:
        newest = self._feed.version
        if not 0 <= version <= newest:
            raise VersionError(f"this hub has no version {version}: its newest is {newest}")
        if 0 < version < self._feed.oldest:
            raise no_longer_kept(version, newest)
        return version or newest

    async def _make(self, task: TaskRow, version: int) -> PublishedHead:
        head = await self._mean(task, version)
        payload = await asyncio.to_thread(encode_head, head)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(payload).hexdigest())
        own = await self._store.do(lambda journal: read_manifest(journal, version))
        signed = sign_head(self._signing_key, self._feed.space_id, version, (digest, len(payload)), own)
        header = hub_pb2.HeadHeader(version=version, payload_size=len(payload), payload_sha256=digest)
        header.manifest.CopyFrom(hub_pb2.Manifest(body=signed.body, signature=signed.signature))
        return header, payload

    async def _mean(self, task: TaskRow, version: int) -> SharedHead:
        """Return the weighted mean. The newest head stays; one of other names or shapes is left out."""
        rows = await self._store.do(lambda journal: newest_merged(journal, task.task_id, version))
        weighed = [(row, weight) for row, weight in await self._contents.weights_of(task, rows, version) if weight > 0]
        sharing = sorted((one for one in weighed if one[0].new.heads), key=lambda one: one[0].ingest_seq)
        fitting = [one for one in sharing if one[0].new.heads <= MAX_HEAD_BYTES]
        expected = await self._contents.head_shapes(fitting[-1][0]) if fitting else {}
        total: dict[str, Tensor] = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in expected.items()}
        whole, organisations = 0.0, []
        for row, weight in fitting:
            head = await self._contents.head_of(row)
            if {name: tuple(tensor.shape) for name, tensor in head.items()} == expected:
                await asyncio.to_thread(_add, total, weight, head)
                whole += weight
                organisations.append(row.new.organisation)
        return SharedHead(
            task_id=task.task_id,
            version=version,
            organisations=tuple(sorted(organisations)),
            left_out=tuple(sorted({row.new.organisation for row, _ in sharing} - set(organisations))),
            schema_sha256=fitting[-1][0].new.schema_sha256 if fitting else "",
            tensors={name: tensor / whole for name, tensor in total.items()},
        )


def _may_have(organisation: str, owner: str, task: TaskRow) -> bool:
    return organisation == owner or task.sharing.allows(organisation)


def _add(total: Mapping[str, Tensor], weight: float, head: Mapping[str, Tensor]) -> None:
    for name, tensor in head.items():
        total[name].add_(float64(tensor), alpha=weight)


async def misfit(contents: Contents, row: UpdateRow, known: Sequence[UpdateRow]) -> str | None:
    """Return why the head of an update cannot be averaged with those of the other organisations; None if it can.

    A mean over tensors of different shapes does not exist, and one organisation alone must not decide what the others
    share: so it is the odd one that is refused, before it is merged.

    Args:
        contents: access to what was submitted.
        row: the update.
        known: updates of the same task that are merged, or will be before it.
    """
    others = [one for one in known if one.new.organisation != row.new.organisation and one.new.heads]
    if not row.new.heads or not others:
        return None
    newest = max(others, key=lambda one: one.ingest_seq)
    expected, got = await contents.head_shapes(newest), await contents.head_shapes(row)
    if expected == got:
        return None
    name = sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name))[0]
    return (
        f"TensorShapeError: the head of task {row.new.task_id}: expected the names and shapes that "
        f"{newest.new.organisation} shares, but tensor {name!r} is {_shown(expected, name)} there and "
        f"{_shown(got, name)} here: train the same kind of head on the same labels, or send it with share_head = false"
    )


def _shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "missing"
