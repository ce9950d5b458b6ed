"""Keeping the served version new while it is used: one thread that follows the hub and replaces whole versions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol

from torch import nn

from share_client.chain import open_chain
from share_client.feed import VersionFeed, fetch_newest
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials, load_member
from share_client.records import Records
from share_client.serving.serving import Serving
from share_client.serving.stacks import Heads, is_linear
from share_client.sources import Sources, open_relay
from share_core.space import advance, empty_space
from share_core.types import Delta, Space


class Feed(Protocol):
    """What is followed, as :class:`share_client.feed.VersionFeed` is."""

    def events(self) -> Iterator[Delta | Space]:
        """Yield every version after the one held."""
        ...

    def close(self) -> None:
        """End the iteration, from any thread."""
        ...


class Follower:
    """Applies what a feed brings to a :class:`Serving`.

    Each version is built beside the current one and replaces it between batches. When the feed ends or brings something
    that cannot be applied, the last good version stays and :attr:`failure` says why.
    """

    def __init__(
        self,
        serving: Serving,
        space: Space,
        feed: Feed,
        heads: Callable[[int], Heads | None] = lambda version: None,
        done: Callable[[int], None] = lambda version: None,
    ) -> None:
        """Follow from ``space``; leave the block, or call :meth:`close`, outside a batch.

        Args:
            serving: what is kept new.
            space: the version it serves now.
            feed: brings the versions after it.
            heads: gives the heads that belong to a version; None keeps those there are.
            done: called with each version that is served.
        """
        self._serving = serving
        self._space = space
        self._feed = feed
        self._heads = heads
        self._done = done
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="follow-serving", daemon=True)

    @property
    def failure(self) -> Exception | None:
        """Why no further version will come; None while the feed is followed."""
        return self._failure

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        self._feed.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            for event in self._feed.events():
                space = advance(self._space, event) if isinstance(event, Delta) else event
                self._serving.update(space, self._heads(space.version))
                self._space = space
                self._done(space.version)
        except Exception as error:  # whatever ends this thread must be seen: lack of memory, a damaged head, a refusal
            self._failure = error


@contextmanager
def serve_directory(
    layout: ClientLayout, model: nn.Module, tell: Callable[[str], None] = lambda text: None
) -> Iterator[tuple[Serving, Follower]]:
    """Serve the newest version of a member's federation, and every later one, with its linear private heads.

    Args:
        layout: an enrolled client directory; ``share-client join`` may run on it at the same time.
        model: the backbone of the space; the fingerprints of its weights are compared.
        tell: called with a sentence whenever the hub is waited for.

    Raises:
        SpaceMismatchError: another backbone.
        ConfigError: the directory is not enrolled.
        FedshareError: the hub refuses.
    """
    member, credentials = load_member(layout), load_credentials(layout, datetime.now(UTC))
    with HubLink(member.hub_address, credentials) as link, open_relay(member.follow_address, credentials) as relay:
        description = link.describe()
        spec = description.spec
        chain = open_chain(description, credentials, None, datetime.now(UTC))
        space = fetch_newest(link, spec, chain)[0] if description.version else empty_space(spec)

        def heads(version: int) -> Heads:
            return _private_heads(layout, member.organisation, version)

        feed = VersionFeed(Sources(link, relay, tell), spec, space.version, lambda error: tell(str(error)), chain)
        with (
            Serving(model, space, heads(space.version), spec) as serving,
            # Nothing is kept on disk: what led to a served version is of no use any more.
            Follower(serving, space, feed, heads, chain.before_cached) as follower,
        ):
            yield serving, follower


def _private_heads(layout: ClientLayout, organisation: str, version: int) -> Heads:
    """Return the heads that belong to the cores of a version, by task id; heads that are no linear map are left out."""
    records = Records(layout.tasks)
    heads = {}
    for record in records.all():
        head = record.head_at(version)
        if head is None:
            continue
        try:
            tensors = records.read_head(record.task, head)
        except FileNotFoundError:
            continue  # 'share-client join' has pruned it meanwhile: a newer version, and its head, are on the way
        if is_linear(tensors):
            heads[record.id_for(organisation)] = tensors
    return heads
