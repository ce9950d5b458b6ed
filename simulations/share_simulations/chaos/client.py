"""``share-sim chaos client``: SIGKILL a real client session at any moment of training, saving and sending.

Each round enrols a client of its own at a real hub. It owns two tasks with real rows and the packaged backbone, is
killed several times, and at last left alone until it has nothing left to do. Then its directory and the hub's journal
are compared: nothing that was trained and kept is lost or trained again, and nothing is taken twice.
"""

from __future__ import annotations

import contextlib
import platform
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from share_client.backbones import load_backbone
from share_client.egress_check import look
from share_client.enrol import enrol
from share_client.member import ClientLayout
from share_client.outbox import list_outbox
from share_client.records import Records
from share_core.errors import ConfigError, FedshareError
from share_core.fingerprint import describe_space
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.local import LocalHub
from share_simulations.chaos.client_bugs import BUGS
from share_simulations.chaos.client_life import PLACES, Bench, Kill, Life, Order, open_bench
from share_simulations.chaos.ptrace import require_tracer
from share_simulations.chaos.show import Meter
from share_simulations.digits import task_rows, write_npz
from share_simulations.interrupts import reporting
from share_simulations.journal import read_journal

TASKS = ("first", "second")
_ROWS = 24
_KILLS_PER_ROUND = 3
_ROUNDS_PER_HUB = 20
_TIMED = 0.3
"""Share of the kills that come after some time, wherever the process is; the others hit a file-changing call."""
_MOST_PROBLEMS = 20
_BUG_ROUNDS = 25
"""Rounds after which a planted bug counts as not caught."""

FINDINGS = {
    "lost": "an update that was kept in the outbox never reached the hub, or was not merged",
    "double": "the hub took two updates for one training",
    "again": "a task was trained again although its training was kept",
    "unrecorded": "what was merged is not what the client remembers",
    "stuck": "a session could not continue after a kill",
    "egress": "the log of what left does not hold",
}
"""Every way in which a promise can be broken."""


@dataclass(frozen=True)
class ClientOptions:
    """One campaign."""

    kills: int = 300
    """SIGKILLs in all."""
    seed: int = 0
    """Seed of the moments."""
    mutants: bool = False
    """Whether the planted bugs are tried as well."""
    directory: Path | None = None
    """Where directories are made; None: the system's place for temporary files."""


@dataclass
class Finding:
    """One broken promise."""

    kind: str
    """A key of :data:`FINDINGS`."""
    text: str
    """What exactly."""


@dataclass
class Tally:
    """What the campaign has reached."""

    kills: int = 0
    lives: int = 0
    rounds: int = 0
    trainings: int = 0
    updates: int = 0
    duplicates: int = 0
    places: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    caught: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Site:
    """Where rounds are held: one hub after the other and the bench."""

    folder: Path
    """Where directories are made."""
    spec: SpaceSpec
    """The packaged backbone."""
    bench: Bench
    """Leads the lives."""
    hub: LocalHub | None = None
    """The hub that runs."""
    rounds: int = 0
    """Clients made so far."""
    calls: dict[str, int] = field(default_factory=dict)
    """File-changing calls of a life without a kill, by place."""
    span_s: float = 0.0
    """Length of such a life."""

    def fresh(self) -> tuple[LocalHub, ClientLayout, str]:
        """Return a running hub, a new client directory enrolled at it, and its organisation."""
        if self.hub is None or self.rounds % _ROUNDS_PER_HUB == 0:
            self.close()
            self.hub = LocalHub(self.folder / f"server-{self.rounds}", self.spec)
            self.hub.start()
        self.rounds += 1
        organisation = f"c{self.rounds}"
        layout = ClientLayout(self.folder / organisation)
        enrol(self.hub.invite(f"{organisation}/main"), layout, datetime.now(UTC))
        return self.hub, layout, organisation

    def close(self) -> None:
        """End the hub that runs."""
        if self.hub is not None and self.hub.running:
            self.hub.kill()


def run_client_kills(options: ClientOptions) -> dict[str, Any]:
    """Run the campaign and return its report; ``problems`` is empty when every promise was kept.

    Raises:
        ConfigError: the numbers make no campaign, or this machine cannot trace.
        Interrupted: with the report of what was reached.
    """
    require_tracer()
    if options.kills < 1:
        raise ConfigError(f"expected at least one kill, got {options.kills}")
    began, tally = time.monotonic(), Tally()

    def report() -> dict[str, Any]:
        return _report(options, tally, began)

    with reporting(report), open_site(options.directory) as site, Meter("chaos client", options.kills) as meter:
        _measure(site)
        moments = _moments(site, random.Random(options.seed))
        while tally.kills < options.kills:
            before = tally.kills
            count = min(_KILLS_PER_ROUND, options.kills - tally.kills)
            findings = play(site, moments, count, tally)
            _note(tally, findings, f"round {tally.rounds}")
            for _ in range(tally.kills - before):
                meter.step(f"{tally.rounds} clients, {tally.updates} updates, {len(tally.problems)} broken promises")
        for bug in BUGS if options.mutants else ():
            tally.caught[bug] = catch(site, bug, options.seed)
            after = tally.caught[bug]["caught_after"]
            meter.note(f"planted bug {bug}: " + (f"caught after {after} clients" if after else "NOT CAUGHT"))
    return report()


@contextlib.contextmanager
def open_site(directory: Path | None) -> Iterator[Site]:
    """Prepare everything below a fresh folder in ``directory``, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="fedshare-client-", dir=directory) as name:
        folder = Path(name).resolve()
        tasks_file = write_tasks(folder)
        backbone = load_backbone("digits-vit", "cpu")
        spec = describe_space(backbone.name, backbone.site_weights(), k_max=16)
        with open_bench(tasks_file, folder / "client.log") as bench:
            site = Site(folder, spec, bench)
            try:
                yield site
            finally:
                site.close()


def write_tasks(folder: Path) -> Path:
    """Write the tasks file of every client and its few rows; return its path."""
    images, labels = task_rows()
    lines = ['backbone = "digits-vit"', 'device = "cpu"', "[defaults]", 'kind = "image-classification"', "epochs = 2"]
    lines.append("refit = true")
    for number, task in enumerate(TASKS):
        view = np.ascontiguousarray(np.rot90(images, number, axes=(1, 2)))
        begin = number * 2 * _ROWS
        for part, rows in (("train", slice(begin, begin + _ROWS)), ("test", slice(begin + _ROWS, begin + 2 * _ROWS))):
            write_npz(folder / "data" / f"{task}-{part}.npz", view[rows], labels[rows])
        lines += ["[[task]]", f'name = "{task}"', f'train = "data/{task}-train.npz"', f'test = "data/{task}-test.npz"']
    path = folder / "tasks.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _measure(site: Site) -> None:
    """Lead one life without any kill, to know how many calls there are to die before.

    Raises:
        ConfigError: it breaks a promise without a kill.
    """
    hub, layout, organisation = site.fresh()
    began = time.monotonic()
    life = site.bench.live(Order(layout.root, Kill()))
    site.span_s, site.calls = time.monotonic() - began, life.calls
    findings = check(hub, layout, organisation, [life])
    if findings:
        raise ConfigError(f"the client does not even work without a kill: {findings[0].text}")


def play(site: Site, moments: Iterator[Kill], kills: int, tally: Tally, bug: str = "") -> list[Finding]:
    """Let one new client live and die until it was killed ``kills`` times, leave it alone, and check its promises."""
    hub, layout, organisation = site.fresh()
    lives: list[Life] = []
    dead = 0
    tally.rounds += 1
    while dead < kills:
        kill = next(moments)
        life = site.bench.live(Order(layout.root, kill, bug))
        lives.append(life)
        if not life.killed:
            break  # it came to its end before that moment: nothing is left to kill
        dead += 1
        tally.places["time" if kill.after_s else kill.place] += 1
    if lives[-1].killed:
        lives.append(site.bench.live(Order(layout.root, Kill(), bug)))
    tally.kills += dead
    tally.lives += len(lives)
    tally.trainings += sum(mark.startswith("trained ") for life in lives for mark in life.marks)
    sent = Counter(mark.split()[1] for life in lives for mark in life.marks if mark.startswith("sent "))
    tally.duplicates += sum(times - 1 for times in sent.values())
    tally.updates += sum(mark.startswith("put ") for life in lives for mark in life.marks)
    return check(hub, layout, organisation, lives)


def _moments(site: Site, draw: random.Random) -> Iterator[Kill]:
    """Yield moments to die at, for ever."""
    while True:
        if draw.random() < _TIMED:
            yield Kill(after_s=draw.uniform(0.01, site.span_s))
        else:
            place = draw.choice(sorted(PLACES))
            yield Kill(place=place, call=draw.randint(1, max(1, site.calls[place])))


def check(hub: LocalHub, layout: ClientLayout, organisation: str, lives: list[Life]) -> list[Finding]:
    """Compare what the lives told with the client's directory and the hub's journal."""
    for life in lives:
        if not life.killed and life.code != 0:
            return [Finding("stuck", f"a session ended with code {life.code}: {life.words[-300:]}")]
    with hub.hub(hub.own("operator")) as stub:
        journal = [row for row in read_journal(stub) if row.task_id.startswith(f"{organisation}/")]
    marks = [mark.split() for life in lives for mark in life.marks]
    try:
        return [*_at_hub(journal, marks), *_again(marks), *_remembered(layout, journal)]
    except FedshareError as error:
        return [Finding("unrecorded", f"the client's directory cannot be read: {error}")]


def _at_hub(journal: list[hub_pb2.UpdateRecord], marks: list[list[str]]) -> Iterator[Finding]:
    merged = {row.update_id for row in journal if row.state == hub_pb2.UPDATE_STATE_MERGED}
    for mark in marks:
        if mark[0] == "put" and mark[1] not in merged:
            yield Finding("lost", f"update {mark[1]} of {mark[2]} was in the outbox and is not merged")
        if mark[0] == "receipt" and mark[1] not in merged:
            yield Finding("lost", f"update {mark[1]} was acknowledged and is not merged")


def _again(marks: list[list[str]]) -> Iterator[Finding]:
    kept: set[str] = set()
    for mark in marks:
        if mark[0] == "put":
            kept.add(mark[2])
        elif mark[0] == "trained" and mark[1] in kept:
            yield Finding("again", f"task {mark[1]} was trained again although its training was in the outbox")


def _remembered(layout: ClientLayout, journal: list[hub_pb2.UpdateRecord]) -> Iterator[Finding]:
    waiting, refused = list_outbox(layout.outbox)
    if waiting or refused:
        yield Finding("unrecorded", f"{len(waiting)} updates wait and {len(refused)} are refused at the end")
    records = Records(layout.tasks)
    lines = [line for task in TASKS for line in records.history(task)]
    merges = [line["update_id"] for line in lines if line["event"] == "merged"]
    at_hub = [row.update_id for row in journal]
    for update_id in set(at_hub) - set(merges):
        yield Finding("double", f"the hub took update {update_id}, of which the client knows nothing at the end")
    if len(merges) != len(set(merges)) or set(merges) - set(at_hub):
        yield Finding("unrecorded", f"the history tells of the merges {merges}, the hub of {at_hub}")
    for task in TASKS:
        kinds = Counter(line["refit"] for line in records.history(task) if line["event"] == "merged")
        if kinds[False] != 1 or kinds[True] > 1:
            kind = "double" if kinds[False] > 1 or kinds[True] > 1 else "lost"
            yield Finding(kind, f"{task}: {kinds[False]} trainings and {kinds[True]} refits were merged, expected one")
    newest = {row.task_id.partition("/")[2]: row.version for row in sorted(journal, key=lambda row: row.version)}
    for task, version in newest.items():
        heads = [head.version for head in records.get(task).heads]
        if version not in heads:
            yield Finding("unrecorded", f"no head of {task} is kept for version {version}, only for {heads}")
        if not records.is_evaluated(task, version):
            yield Finding("unrecorded", f"{task} was not evaluated at version {version}")
    problems = look(layout, None).problems
    if problems:
        yield Finding("egress", problems[0])


def catch(site: Site, bug: str, seed: int) -> dict[str, Any]:
    """Kill clients with a planted bug until it shows; return after how many, and the sign.

    Raises:
        ConfigError: the bug shows without any kill: then kills are not what finds it.
    """
    hub, layout, organisation = site.fresh()
    unharmed = check(hub, layout, organisation, [site.bench.live(Order(layout.root, Kill(), bug))])
    if unharmed:
        raise ConfigError(f"planted bug {bug} shows without a kill: {unharmed[0].text}")
    moments = _moments(site, random.Random(seed * 1000 + 77))
    for number in range(1, _BUG_ROUNDS + 1):
        findings = play(site, moments, _KILLS_PER_ROUND, Tally(), bug)
        if findings:
            return {"what": BUGS[bug].what, "caught_after": number, "sign": findings[0].text}
    return {"what": BUGS[bug].what, "caught_after": 0, "sign": ""}


def _note(tally: Tally, findings: list[Finding], where: str) -> None:
    for kind in {finding.kind for finding in findings}:
        tally.counts[kind] += 1
    if findings and len(tally.problems) < _MOST_PROBLEMS:
        tally.problems.append(f"{where}: {findings[0].text}")


def _report(options: ClientOptions, tally: Tally, began: float) -> dict[str, Any]:
    surviving = [bug for bug, found in tally.caught.items() if not found["caught_after"]]
    return {
        "campaign": "client",
        "seed": options.seed,
        "kills": tally.kills,
        "clients": tally.rounds,
        "lives": tally.lives,
        "updates": tally.updates,
        "trainings": tally.trainings,
        "sent_again": tally.duplicates,
        "kills_by_place": dict(tally.places),
        **{kind: tally.counts[kind] for kind in FINDINGS},
        "mutants": len(tally.caught),
        "mutants_caught": len(tally.caught) - len(surviving),
        "mutants_by_name": tally.caught,
        "surviving": surviving,
        "problems": tally.problems,
        "seconds": round(time.monotonic() - began, 1),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "complete": True,
        "ok": not tally.problems and not surviving,
    }
