"""Members that use the client's real code: one thread that follows versions, and one that uploads."""

from __future__ import annotations

import hashlib
import itertools
import random
import secrets
import threading
from dataclasses import dataclass

from share_client.feed import VersionFeed
from share_client.link import HubLink
from share_client.member import Credentials
from share_client.signing import sign_submission
from share_client.uploading import Submission
from share_client.view import View
from share_core.errors import FedshareError
from share_core.space import empty_space
from share_core.types import Space, SpaceSpec
from share_core.wire import encode_snapshot, encode_update
from share_server.local import Holder, LocalHub
from share_simulations.chaos.endcheck import Book
from share_simulations.chaos.load import toy_update


def credentials_of(server: LocalHub, holder: Holder) -> Credentials:
    """Return what a link needs to speak as ``holder``."""
    return Credentials(holder.key, holder.certificate, server.layout.ca_cert.read_bytes())


class Follower(threading.Thread):
    """Follows versions with the client's feed and view until it is closed."""

    def __init__(self, link: HubLink, spec: SpaceSpec, until: int | None = None) -> None:
        """``until`` plants a bug: nothing after this version is taken over."""
        super().__init__(name="follower", daemon=True)
        self._view = View(empty_space(spec))
        self._feed = VersionFeed(link, spec, 0)
        self._until = until
        self.failure: FedshareError | None = None
        """Why it ended, if it did not end because it was closed."""

    @property
    def space(self) -> Space:
        """The newest version it holds."""
        return self._view.newest

    def digest(self) -> str:
        """Return the SHA-256 of the version it holds, as a snapshot."""
        return hashlib.sha256(encode_snapshot(self.space)).hexdigest()

    def run(self) -> None:
        """Take over every version until closed."""
        try:
            for event in self._feed.events():
                if self._until is None or event.version <= self._until:
                    self._view.apply(event)
        except FedshareError as error:
            self.failure = error

    def close(self) -> None:
        """End the thread."""
        self._feed.close()
        self.join()


@dataclass(frozen=True)
class Diet:
    """What an uploader sends."""

    smallest: int
    """Bytes of the smallest large payload, about."""
    largest: int
    """Bytes of the largest one."""
    small: float = 0.2
    """Share of the updates that are small, and sent once more after they were acknowledged."""


class Uploader(threading.Thread):
    """Sends one update after the other with the client's link until it is told to begin no more."""

    def __init__(self, link: HubLink, spec: SpaceSpec, task: str, diet: Diet, book: Book, seed: int) -> None:
        super().__init__(name=f"uploader {task}", daemon=True)
        self._link = link
        self._spec = spec
        self._task = task
        self._diet = diet
        self._book = book
        self._seed = seed
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        self.enough = threading.Event()
        """Set it to let the update under way be the last one."""
        self.give_up = threading.Event()
        """Set it to end without an answer."""
        self.updates = 0
        """Updates that were begun."""
        self.delivered = 0
        """Updates that were acknowledged."""
        self.payload_bytes = 0
        """Bytes of the delivered payloads, each counted as often as it had to be delivered."""
        self.interruptions = 0
        """Attempts that ended without an answer."""
        self.reuploads = 0
        """Updates that were sent once more after they were acknowledged."""
        self.failure: Exception | None = None
        """Why it ended too early."""

    def run(self) -> None:
        """Send until it is enough."""
        try:
            while not self.enough.is_set():
                self._one()
        except Exception as error:
            self.failure = error

    def close(self) -> None:
        """End the thread at once, its call under way and its link too; nothing happens if it has ended."""
        self.enough.set()
        self.give_up.set()
        if self.is_alive():
            self._link.close()
            self.join()

    def _one(self) -> None:
        self._seed += 1
        small = self._random.random() < self._diet.small
        size = 20_000 if small else self._random.randint(self._diet.smallest, self._diet.largest)
        payload = encode_update(toy_update(self._spec, empty_space(self._spec), self._seed, head=size // 4))
        submission = Submission(
            update_id=secrets.token_hex(16),
            space_id=self._spec.space_id,
            task_id=self._task,
            create=True,
            payload_size=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
        )
        submission = sign_submission(submission, self._link.credentials, next(self._numbers))
        self._book.send(submission.update_id, submission.payload_sha256)
        self.updates += 1
        if not self._deliver(submission, payload):
            return
        self.delivered += 1
        if small:  # as a client does that lost its receipt
            self.reuploads += 1
            self._deliver(submission, payload)

    def _deliver(self, submission: Submission, payload: bytes) -> bool:
        receipt = self._link.submit_until_answered(submission, payload, self.give_up, self._interrupted)
        if receipt is None:
            return False
        self._book.acknowledge(submission.update_id, receipt)
        self.payload_bytes += len(payload)
        return True

    def _interrupted(self, error: FedshareError) -> None:
        self.interruptions += 1
