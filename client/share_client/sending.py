"""Emptying the outbox: send, keep the receipt, wait for the merge, record it, remove.

What each answer of the hub leads to:

* a receipt: the update is durable there; it stays in the outbox until it is merged;
* merged: the private head is recorded under the version, then the entry goes;
* a version no longer kept: what was learned is expressed in the newest one and sent as a new update;
* a task that is gone, or a version that cannot be replaced: the entry moves to ``refused``, the task is trained again;
* set aside until the operator decides: it stays, is asked for now and then, and holds nothing else up;
* a signature that the hub does not take: it is signed anew and sent again, a limited number of times;
* a refusal that another try cannot change: the entry moves to ``refused`` and the task waits for other data;
* anything else (hub away, disk full, a fault of the hub): the entry stays and is sent again later.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

from share_client.backoff import Backoff
from share_client.link import HubLink
from share_client.outbox import Entry, Outbox
from share_client.rebase import Rebaser
from share_client.records import MOST_RETRAININGS, Records
from share_client.session_log import SessionLog
from share_client.signing import SubmissionSigner
from share_core.errors import (
    AccessError,
    DigestError,
    FedshareError,
    IdentityError,
    PayloadError,
    RebaseError,
    RequestError,
    SignatureError,
    SpaceMismatchError,
    UnavailableError,
    UnknownTaskError,
    UnknownUpdateError,
    UpdateConflictError,
    VersionError,
)
from share_proto.v1 import hub_pb2

TRAIN_AGAIN: tuple[type[FedshareError], ...] = (VersionError, UnknownTaskError, DigestError)
"""Refusals that training again answers. RebaseError is a VersionError: it comes here if there is no other way."""

FOR_GOOD: tuple[type[FedshareError], ...] = (
    PayloadError,
    RequestError,
    SpaceMismatchError,
    UpdateConflictError,
    AccessError,
)
"""Refusals that sending the same update again cannot change."""

_MOST_SIGNATURES = 40
"""How often one update is signed anew before it is given up: the count of the client doubles its steps each time."""

_SET_ASIDE_S = 30.0
"""Seconds between two questions after an update that waits for the operator, while no new version arrives."""


@dataclass(frozen=True)
class Pass:
    """What one pass over the outbox left."""

    unsettled: int
    """Updates not yet merged or refused, without those set aside."""
    certain: bool
    """Whether the hub said of each of them that it is not in any version published so far."""
    set_aside: frozenset[str] = frozenset()
    """Names of the tasks whose update waits for the operator: not to be trained meanwhile."""


class Sender:
    """Takes what is in the outbox to its end, one pass at a time."""

    def __init__(
        self,
        link: HubLink,
        outbox: Outbox,
        records: Records,
        signer: SubmissionSigner,
        log: SessionLog,
        stop: threading.Event,
        rebaser: Rebaser | None = None,
    ) -> None:
        self._link = link
        self._signer = signer
        self._resigned: Counter[str] = Counter()  # by update id
        self._outbox = outbox
        self._records = records
        self._log = log
        self._stop = stop
        self._rebaser = rebaser
        self._backoff = Backoff(longest=5.0)
        self._not_before = 0.0
        self._version = 0
        # By update id: when to ask again, and the newest version at the last question.
        self._set_aside: dict[str, tuple[float, int]] = {}
        self.submitted = 0
        self.merged = 0
        self.refused = 0
        self.merged_in = 0
        """The newest version that the hub named: it is published."""

    def pass_once(self, version: int = 0) -> Pass:
        """Send and settle what can be now; ``version`` is the newest one received.

        Raises:
            IdentityError: the hub does not accept our certificate; everything stays in the outbox.
        """
        self._version = version
        entries = self._current()
        if not entries:
            return Pass(unsettled=0, certain=True)
        certain = time.monotonic() >= self._not_before
        for entry in entries if certain else ():
            certain = certain and self._take(entry)
        left = self._outbox.entries()
        aside = {entry.training.task for entry in left if entry.update_id in self._set_aside}
        unsettled = sum(entry.update_id not in self._set_aside for entry in left)
        return Pass(unsettled=unsettled, certain=certain, set_aside=frozenset(aside))

    def _current(self) -> list[Entry]:
        """Return the entries, without those that a newer one has replaced: a crash left them, and now they go."""
        entries = []
        for entry in self._outbox.entries():
            if self._outbox.replacement(entry) is None:
                entries.append(entry)
            else:
                self._outbox.remove(entry)
        return entries

    def _take(self, entry: Entry) -> bool:
        """Bring one entry as far as it goes; False when its state could not be found out."""
        again_at, version = self._set_aside.get(entry.update_id, (0.0, -1))
        if version == self._version and time.monotonic() < again_at:
            return True  # no new version can hold it
        try:
            if not self._advance(entry):
                return False
        except IdentityError:
            raise
        except SignatureError as error:
            self._sign_again(entry, error)
        except TRAIN_AGAIN as error:
            self._train_again(entry, error)
        except FOR_GOOD as error:
            self._refuse(entry, type(error).__name__, str(error))
        except FedshareError as error:
            self._log.write("waiting", task=entry.training.task, reason=str(error))
            self._not_before = time.monotonic() + self._backoff.next_wait(error)
            return False
        self._backoff.reset()
        return True

    def _advance(self, entry: Entry) -> bool:
        """Send and settle one entry, or express it anew; False when the session was stopped before."""
        try:
            sent = entry if entry.acknowledged else self._send(entry)
            if sent is None:
                return False
            self._settle(sent)
        except RebaseError as error:
            self._rebase(entry, error)
        return True

    def _send(self, entry: Entry) -> Entry | None:
        payload = entry.read_payload()
        if not self._signer.has_signed(entry.submission):
            entry = self._outbox.sign(entry, self._signer.sign(entry.submission))
        receipt = self._link.submit_until_answered(entry.submission, payload, self._stop, self._waiting(entry))
        if receipt is None:
            return None
        kept = {
            "ingest_seq": receipt.ingest_seq,
            "entry_hash": receipt.entry_hash,
            "duplicate": receipt.duplicate,
        }
        sent = self._outbox.acknowledge(entry, kept)
        self.submitted += 1
        self._log.write("acknowledged", task=entry.training.task, update_id=entry.update_id, **kept)
        return sent

    def _settle(self, entry: Entry) -> None:
        try:
            record = self._link.get_update(entry.update_id)
        except UnknownUpdateError as error:
            # Only a hub restored from an older state forgets what it acknowledged. The id keeps this harmless.
            self._outbox.forget_receipt(entry)
            raise UnavailableError(f"the hub has forgotten update {entry.update_id}") from error
        if record.state == hub_pb2.UPDATE_STATE_QUARANTINED:
            if entry.update_id not in self._set_aside:
                self._log.write("set_aside", task=entry.training.task, update_id=entry.update_id, reason=record.reason)
            self._set_aside[entry.update_id] = (time.monotonic() + _SET_ASIDE_S, self._version)
            return
        self._set_aside.pop(entry.update_id, None)
        if record.state == hub_pb2.UPDATE_STATE_MERGED:
            self._keep(entry, record)
            self.merged_in = max(self.merged_in, record.version)
        elif record.state == hub_pb2.UPDATE_STATE_REFUSED:
            name, _, reason = record.reason.partition(": ")
            if name == RebaseError.__name__:
                raise RebaseError(reason)
            self._refuse(entry, "REFUSED", record.reason)

    def _keep(self, entry: Entry, record: hub_pb2.UpdateRecord) -> None:
        """Record a merge; the order matters: what must outlive the entry is durable before the entry goes."""
        training = entry.training
        known = any(line.get("update_id") == entry.update_id for line in self._records.history(training.task))
        self._records.merged(
            training.task,
            training.content_hash,
            record.version,
            entry.read_head(),
            refit=training.refit,
            columns=training.columns,
            captured=training.captured,
            task_id=entry.submission.task_id,
            update_id=entry.update_id,
        )
        merge = {
            "event": "merged",
            "update_id": entry.update_id,
            "version": record.version,
            "staleness": record.staleness,
            "relative_error": record.relative_error,
            "payload_bytes": entry.submission.payload_size,
            "privacy": entry.submission.privacy,
            **asdict(training),
        }
        if not known:
            self._records.add_history(training.task, merge)
        self._outbox.remove(entry)
        self.merged += 1
        self._log.write(**{**merge, "event": "merged"})

    def _rebase(self, entry: Entry, error: RebaseError) -> None:
        """Express the update in the newest version and put it in anew; its next pass sends it.

        Raises:
            RebaseError: ``error``, if only training again helps.
            UnavailableError: later.
        """
        made = self._rebaser.express(entry) if self._rebaser is not None else None
        if made is None:
            raise error
        create = entry.submission.create and entry.submission.task_id not in made.space.cores
        fresh = self._outbox.rebase(entry, made.payload, made.space.version, create, made.adapter)
        self._log.write(
            "rebased",
            task=entry.training.task,
            update_id=fresh.update_id,
            previous=entry.update_id,
            base_version=entry.training.base_version,
            version=made.space.version,
            payload_bytes=len(made.payload),
            reason=str(error),
        )

    def _sign_again(self, entry: Entry, error: SignatureError) -> None:
        """Sign under a number further ahead: the hub may know those of this directory before it was restored."""
        tries = self._resigned[entry.update_id]
        if tries >= _MOST_SIGNATURES:
            self._refuse(entry, type(error).__name__, f"{error} (signed {tries} times)")
            return
        self._resigned[entry.update_id] += 1
        self._signer.move(2**tries)
        self._outbox.sign(entry, self._signer.sign(entry.submission))
        self._log.write("signed_again", task=entry.training.task, update_id=entry.update_id, reason=str(error))

    def _train_again(self, entry: Entry, error: FedshareError) -> None:
        training = entry.training
        reason = f"{type(error).__name__}: {error}"
        if not self._records.retrain(training.task):
            self._refuse(entry, type(error).__name__, f"{error} ({MOST_RETRAININGS} times in a row)")
            return
        self._outbox.refuse(entry, type(error).__name__, str(error))
        self._log.write("retrain", task=training.task, update_id=entry.update_id, reason=reason)

    def _refuse(self, entry: Entry, error: str, reason: str) -> None:
        training = entry.training
        self._records.refused(training.task, training.attempt or training.content_hash, f"{error}: {reason}")
        moved = self._outbox.refuse(entry, error, reason)
        self.refused += 1
        self._log.write(
            "refused",
            task=training.task,
            update_id=entry.update_id,
            reason=f"{error}: {reason}",
            kept_in=str(moved),
        )

    def _waiting(self, entry: Entry) -> Callable[[FedshareError], None]:
        return lambda error: self._log.write("waiting", task=entry.training.task, reason=str(error))
