"""One session: follow versions, send what is in the outbox, train the next task, evaluate every version.

A session works under a Flower lease or without one, and knows nothing of Flower. It may be killed at any moment: what
was trained is in the outbox, what was merged in the records, what was evaluated in the history, and the next session
continues from there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch

from share_client.attempts import Attempts
from share_client.cache import SpaceCache, chain_path
from share_client.chain import ManifestChain, open_chain
from share_client.evaluations import Evaluations
from share_client.faults import in_words
from share_client.feed import VersionFeed, fetch_newest
from share_client.heads import first_head
from share_client.link import HubLink, SpaceDescription, patiently
from share_client.member import ClientLayout, Member, load_credentials, load_member
from share_client.others_tasks import OthersTasks
from share_client.outbox import Outbox, Training
from share_client.rebase import Rebaser, kept_adapter
from share_client.records import Records
from share_client.refits import Refits
from share_client.renewal import kept_renewed
from share_client.restored import forget_lost
from share_client.sending import Sender
from share_client.session_lock import only_session
from share_client.session_log import SessionLog
from share_client.signing import SubmissionSigner
from share_client.sources import Sources, open_relay
from share_client.spending import Spending
from share_client.trainer import BackboneTrainer, LocalTask, Step, Trained, Trainer
from share_client.view import View
from share_client.watched import SETTLE_S, Settling
from share_core.errors import ConfigError, FedshareError, ManifestError, SpaceMismatchError, UnavailableError
from share_core.fingerprint import check_backbone
from share_core.space import empty_space
from share_core.types import Space
from share_core.wire import encode_update

if TYPE_CHECKING:
    from share_core.lease import Lease

FILLING_S = 60.0
"""Seconds after which a task whose files are not at rest is mentioned in the log."""


@dataclass(frozen=True)
class SessionOptions:
    """How a session paces itself."""

    linger_s: float = 20.0
    """Seconds to stay and follow versions after the last thing that happened."""
    poll_s: float = 0.2
    """Seconds between two looks at the outbox, the tasks file and the versions."""
    settle_s: float = 60.0
    """Seconds after the lease's deadline to wait for the merge of what was sent."""
    cache_every: int = 10
    """Versions between two saves of the space."""
    lock_s: float = 15.0
    """Seconds to wait for an earlier session on the same directory to end."""


@dataclass(frozen=True)
class SessionCounters:
    """What a session did."""

    submitted: int
    """Updates the hub acknowledged."""
    merged: int
    """Updates seen merged."""
    refused: int
    """Updates the hub will never take."""
    evaluated: int
    """Evaluations reported."""
    version: int
    """The newest version held at the end."""
    idle: bool
    """Whether nothing was left to do."""


def run_session(
    root: Path,
    tasks_path: Path,
    lease: Lease | None = None,
    *,
    trainer: Trainer | None = None,
    options: SessionOptions = SessionOptions(),
    stop: threading.Event | None = None,
) -> SessionCounters:
    """Work until nothing is left to do, the lease is over, or ``stop`` is set.

    Raises:
        ConfigError: the directory is not enrolled, or the tasks file cannot be used at the start.
        SpaceMismatchError: the hub's space is another one, or the backbone is not the space's.
        IdentityError, AccessError: the hub does not let us in.
        VersionError: the hub is at an older version than this client.
        ManifestError: a version that arrived is not what the hub has signed, or does not follow the one held.
    """
    layout = ClientLayout(root)
    stop = stop or threading.Event()
    member = load_member(layout)
    credentials = load_credentials(layout, datetime.now(UTC))
    log = SessionLog(layout.session_log)
    address = (lease.hub_address if lease else "") or member.hub_address
    with (
        contextlib.closing(log),
        only_session(layout, options.lock_s),
        HubLink(address, credentials) as link,
        open_relay(member.follow_address, credentials) as relay,
        kept_renewed(layout, [link, relay], lambda text: log.write("certificate", reason=text)),
    ):
        try:
            description = patiently(link.describe, stop, lambda error: log.write("waiting", reason=str(error)))
            if description is None:
                return SessionCounters(0, 0, 0, 0, version=0, idle=False)
            check_space(description, member, lease)
            trainer = trainer or BackboneTrainer(tasks_path, Settling(), lambda text: log.write("tasks", reason=text))
            trainer.tasks()  # a tasks file that cannot be used at the start is told at once
            chain = open_chain(description, credentials, chain_path(layout.cache, description.spec), datetime.now(UTC))
            sources = Sources(link, relay, lambda text: log.write("source", reason=text))
            session = _Session(layout, member, lease, sources, chain, description, trainer, options, log, stop)
            return session.run()
        except Exception as error:
            with contextlib.suppress(OSError):  # such as the full disk that this is about
                log.write("failed", error=type(error).__name__, reason=in_words(error))
            raise


class _Session:
    """The state of one session."""

    def __init__(
        self,
        layout: ClientLayout,
        member: Member,
        lease: Lease | None,
        sources: Sources,
        chain: ManifestChain,
        description: SpaceDescription,
        trainer: Trainer,
        options: SessionOptions,
        log: SessionLog,
        stop: threading.Event,
    ) -> None:
        self._member = member
        self._lease = lease
        self._link = sources.hub
        self._sources = sources
        self._chain = chain
        self._published = description.version
        self._spec = description.spec
        self._trainer = trainer
        self._options = options
        self._log = log
        self._stop = stop
        self._outbox = Outbox(layout.outbox)
        self._records = Records(layout.tasks)
        self._spending = Spending(layout.tasks)
        self._others = OthersTasks(self._link, chain, member.organisation, log)
        self._refits = Refits(trainer, self._records, self._spending, log)
        self._cache = SpaceCache(layout.cache, self._spec, chain)
        self._view = View(self._first_space(description))
        rebaser = Rebaser(self._spec, lambda: self._view.newest, self._hub_versions)
        signer = SubmissionSigner(layout.sequence, lambda: self._link.credentials)
        self._sender = Sender(self._link, self._outbox, self._records, signer, log, stop, rebaser)
        self._attempts = Attempts(self._records, log)
        self._evaluations = Evaluations(
            trainer, self._records, self._link, log, stop, self._task_id, self._check_backbone
        )
        self._set_aside: frozenset[str] = frozenset()
        self._taken = 0
        self._tasks_error = ""
        self._filling: dict[str, float] = {}  # since when, by name
        self._told: set[str] = set()
        self._backbone_checked = False

    def run(self) -> SessionCounters:
        """Follow versions in a thread and work in this one."""
        start = self._view.newest
        self._log.write("started", member=self._member.member, space=self._spec.space_id, version=start.version)
        feed = VersionFeed(self._sources, self._spec, start.version, self._waiting, self._chain)
        follower = threading.Thread(target=self._follow, args=(feed,), name="follow-versions", daemon=True)
        follower.start()
        try:
            idle = self._work(feed)
        finally:
            feed.close()
            follower.join()
            self._cache.save(self._view.walked)
        counters = SessionCounters(
            submitted=self._sender.submitted,
            merged=self._sender.merged,
            refused=self._sender.refused,
            evaluated=self._evaluations.reported,
            version=self._view.newest.version,
            idle=idle,
        )
        self._log.write("ended", **vars(counters))
        return counters

    def _work(self, feed: VersionFeed) -> bool:
        """Repeat the loop until the end; return whether nothing was left to do."""
        self._let_settle()
        last_event = time.monotonic()
        if self._sender.pass_once(self._view.walked.version).certain:
            self._evaluations.evaluate(self._tasks(), self._view.walked)
        while not self._stop.is_set():
            self._view.check()
            feed.expect(max(self._published, self._sender.merged_in))
            evaluated, unsettled = self._evaluate_waiting()
            task = None if unsettled else self._next_task()
            if task is not None and self._may_train():
                self._train(task)
                last_event = time.monotonic()
                continue
            if task is None and not unsettled and self._may_train() and self._refit():
                last_event = time.monotonic()
                continue
            # What is being written will be whole soon, and a version that holds an own update is on its way.
            if evaluated or self._filling or self._view.walked.version < self._sender.merged_in:
                last_event = time.monotonic()
            if unsettled:
                if self._deadline_passed(self._options.settle_s):
                    return False
                last_event = time.monotonic()
            elif task is not None or self._deadline_passed():
                return task is None
            elif time.monotonic() - last_event >= self._options.linger_s:
                return True
            self._view.wait(self._options.poll_s)
        return False

    def _let_settle(self) -> None:
        """Wait until folders of trained tasks are known to be whole: no version before is evaluated for them."""
        until = time.monotonic() + 3 * SETTLE_S
        while not self._stop.is_set() and time.monotonic() < until:
            self._tasks()
            if not any(self._records.get(name).heads for name in self._filling):
                return
            self._stop.wait(self._options.poll_s)

    def _first_space(self, description: SpaceDescription) -> Space:
        """Return the space to begin with: the one kept, or the newest, or the empty one."""
        kept = self._cache.load()
        if kept is None:
            forget_lost(self._records, self._link, description.version, self._stop, self._waiting, self._log)
        if kept is not None or description.version == 0:
            return kept or empty_space(self._spec)
        space = patiently(self._fetch_space, self._stop, self._waiting)
        if space is None:
            return empty_space(self._spec)
        self._cache.save(space)
        return space

    def _fetch_space(self) -> Space:
        link = self._sources.current()
        try:
            return fetch_newest(link, self._spec, self._chain)[0]
        except ManifestError:
            raise
        except FedshareError as error:
            self._sources.failed(link, error)
            if self._sources.is_relay(link):
                raise UnavailableError(f"the relay {link.address} gives no snapshot: {error}") from error
            raise

    def _hub_versions(self) -> tuple[int, int]:
        """Return the hub's newest version and the oldest one an update may be based on."""
        description = self._link.describe()
        return description.version, description.oldest_base_version

    def _follow(self, feed: VersionFeed) -> None:
        """Thread: apply what the hub sends until the feed is closed."""
        try:
            for event in feed.events():
                before = self._view.newest.version
                self._view.apply(event)
                if event.version > before + 1:
                    self._log.write("skipped", first=before + 1, last=event.version - 1)
                self._log.write("version", version=event.version)
        except FedshareError as error:
            self._view.fail(error)
        except BaseException as error:
            self._view.fail(FedshareError(f"following versions failed: {type(error).__name__}: {error}"))
            raise

    def _next_task(self) -> LocalTask | None:
        """Return the first task whose data has not been trained; a broken tasks file counts as nothing to do."""
        for task in self._tasks():
            if task.only_coefficients and not any(basis.k_out for basis in self._view.newest.bases.values()):
                continue  # as long as the space has no bases there are no coefficients
            wanted = task.name not in self._set_aside and self._attempts.is_open(task)
            if wanted and not self._others.is_closed(task, self._view.newest.version):
                return task
        return None

    def _tasks(self) -> list[LocalTask]:
        try:
            tasks = list(self._trainer.tasks())
        except ConfigError as error:
            if str(error) != self._tasks_error:
                self._log.write("tasks", reason=str(error))
            self._tasks_error = str(error)
            return []
        self._tasks_error = ""
        now = time.monotonic()
        self._filling = {task.name: self._filling.get(task.name, now) for task in tasks if not task.is_whole}
        for name, since in self._filling.items():
            if now - since >= FILLING_S and name not in self._told:
                self._told.add(name)
                self._log.write("tasks", reason=f"{name}: its files are still changing, or there are none: it waits")
        return [task for task in tasks if task.is_whole]

    def _check_backbone(self) -> None:
        """Before the first use of the backbone: refuse one whose weights are not the space's.

        Raises:
            SpaceMismatchError: naming the site and both fingerprints.
        """
        if not self._backbone_checked:
            check_backbone(self._spec, self._trainer.weights())
            self._backbone_checked = True

    def _may_train(self) -> bool:
        """Whether the lease allows another training."""
        if self._lease is None:
            return True
        enough = self._lease.max_updates and self._taken >= self._lease.max_updates
        return not enough and not self._deadline_passed()

    def _deadline_passed(self, grace_s: float = 0.0) -> bool:
        """Whether the lease is over for longer than ``grace_s``."""
        return self._lease is not None and time.time() > self._lease.deadline_unix_ms / 1000 + grace_s

    def _train(self, task: LocalTask) -> None:
        """Train one task in the newest version and put the result into the outbox."""
        self._check_backbone()
        space = self._view.newest
        task_id = self._task_id(task)
        try:
            rows = self._trainer.rows(task)
        except Exception as error:
            if isinstance(error, ConfigError) and not task.dropped:
                raise
            self._attempts.failed(task, error)
            return
        self._log.write("training", task=task.name, rows=rows, version=space.version)
        try:
            if task.config is not None:
                self._spending.check(task.config, rows)
            known = bool(self._records.get(task.name).heads)
            shared = None if known else first_head(self._link, self._chain, space, task_id, self._log)
            trained = self._trainer.train(task, space, task_id, self._progress(task, space.version), shared)
        except Exception as error:
            self._attempts.failed(task, error)
            return
        why = "its data changed" if known else "it was new"
        try:
            self._keep(task, trained, space, why, refit=False, ready=partial(self._spend, task, trained))
        except OSError as error:
            self._attempts.failed(task, error)

    def _spend(self, task: LocalTask, trained: Trained) -> None:
        """Write down what a training spends of the privacy: before anything of it can leave, and only if it will."""
        if trained.declared is not None:
            self._log.write("spent", **{**self._spending.add(task.name, trained.declared), "task": task.name})

    def _refit(self) -> bool:
        """Refit a task for which the subspace has grown usefully; return whether there was one to look at."""
        space = self._view.walked
        if space.version != self._view.newest.version:
            return False
        tasks = [task for task in self._tasks() if task.name not in self._set_aside]
        task = self._refits.next(tasks, space, self._task_id)
        if task is None:
            return False
        self._check_backbone()
        trained = self._refits.run(task, space, self._task_id(task), self._progress(task, space.version))
        if trained is not None:
            self._keep(task, trained, space, "the subspace had grown", refit=True)
        return True

    def _task_id(self, task: LocalTask) -> str:
        return f"{task.owner or self._member.organisation}/{task.name}"

    def _keep(
        self,
        task: LocalTask,
        trained: Trained,
        space: Space,
        why: str,
        refit: bool,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Put what was trained into the outbox: from here on no crash loses it. ``ready`` is called just before."""
        task_id = self._task_id(task)
        payload = encode_update(trained.update)
        training = Training(
            task=task.name,
            content_hash=task.content_hash,
            base_version=trained.update.base_version,
            loss=trained.loss,
            steps=trained.steps,
            seconds=trained.seconds,
            rows=trained.rows,
            trained_numbers=trained.trained_numbers,
            why=why,
            refit=refit,
            columns=trained.columns,
            captured=trained.captured,
            attempt=task.attempt,
        )
        self._outbox.put(
            payload,
            safetensors.torch.save({name: tensor.contiguous() for name, tensor in trained.head.items()}),
            training,
            space_id=self._spec.space_id,
            task_id=task_id,
            create=not task.owner and task_id not in space.cores,
            lease_id=self._lease.lease_id if self._lease else "",
            adapter=kept_adapter(trained.update, space),
            declared=trained.declared,
            schema_sha256=trained.schema_sha256,
            share_with=() if task.config is None else task.config.share_with,
            ready=ready,
        )
        self._taken += 1
        self._log.write("plan", task=task.name, sites=dict(trained.plan))
        self._log.write("trained", **{**vars(training), "payload_bytes": len(payload)})

    def _progress(self, task: LocalTask, version: int) -> Callable[[Step], None]:
        """Return a callback that logs at most one line a second, and the last one."""
        last = [0.0]

        def log(step: Step) -> None:
            if time.monotonic() - last[0] >= 1.0 or step.step == step.steps:
                last[0] = time.monotonic()
                self._log.write("progress", task=task.name, version=version, **vars(step))

        return log

    def _evaluate_waiting(self) -> tuple[bool, int]:
        """Evaluate every own task at every version that arrived, in order.

        A version is evaluated only once it is certain which of our updates it holds: the private head that belongs
        to a merged core is recorded when the outbox learns of the merge. The hub publishes a version after it has
        recorded the merge, so what it answers after a version arrived is true of that version.

        Returns (whether there was any version, the number of our updates still open).
        """
        some = False
        while True:
            limit = self._view.newest.version
            state = self._sender.pass_once(limit)
            self._set_aside = state.set_aside
            if not state.certain or self._stop.is_set() or self._view.walked.version >= limit:
                return some, state.unsettled
            while not self._stop.is_set() and (space := self._view.walk(limit)) is not None:
                some = True
                self._evaluations.evaluate(self._tasks(), space)
                if space.version % self._options.cache_every == 0:
                    self._cache.save(space)
                    self._records.prune(space.version)

    def _waiting(self, error: FedshareError) -> None:
        self._log.write("waiting", reason=str(error))


def check_space(description: SpaceDescription, member: Member, lease: Lease | None = None) -> None:
    """Refuse a hub whose space is not the lease's, or without a lease the one that this client was enrolled for.

    Raises:
        SpaceMismatchError: naming both.
    """
    expected = lease.space_id if lease else member.space_id
    if description.spec.space_id != expected:
        raise SpaceMismatchError(
            f"the hub serves space {description.spec.space_id} ({description.spec.backbone}), expected {expected}: "
            "this client was enrolled for another backbone; join again with a new token"
        )
