"""Contributing adapters that exist already: no data, no training, no Flower.

An adapter goes the way of everything that is trained: into the outbox, signed, sent, written into the egress log, kept
until it is merged. It may be killed anywhere; the same command, or the next session of ``share-client join``, goes on
from what is on disk. What it learned leaves as plain factors; its head and everything else that is no LoRA stays here,
in the private head file of the task, unless the head is shared by choice.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import safetensors.torch
from torch import Tensor

from share_client.chain import open_chain
from share_client.feed import fetch_newest
from share_client.frames import read_frame
from share_client.link import HubLink, patiently
from share_client.member import ClientLayout, load_member
from share_client.others_tasks import require_open
from share_client.outbox import Entry, Outbox, Training
from share_client.rebase import Rebaser, express
from share_client.records import Records
from share_client.sending import Pass, Sender
from share_client.session import check_space
from share_client.session_lock import only_session
from share_client.session_log import SessionLog
from share_client.sharing import OWN, Terms
from share_client.signing import SubmissionSigner
from share_core.errors import AccessError, AdapterError, ConfigError, SpaceMismatchError
from share_core.identity import check_approval
from share_core.names import check_name
from share_core.peft.names import WRAPPER
from share_core.peft.reader import PeftAdapter, read_adapter, task_name
from share_core.space import empty_space
from share_core.types import Space, SpaceSpec, Update
from share_core.wire import MAX_HEAD_BYTES, encode_adapter, encode_update

FRAME_KEY = "peft"
"""Key of a private head file's metadata under which the frame of the adapter stands."""

_LOCK_S = 15.0
_POLL_S = 0.2
_T = TypeVar("_T")


@dataclass(frozen=True)
class Contribution:
    """One adapter, read and checked as far as it can be without the hub."""

    directory: Path
    """Where it lies."""
    task: str
    """Name of its task inside the organisation."""
    adapter: PeftAdapter
    """What was read."""
    head: Mapping[str, Tensor]
    """The head's tensors that are shared; empty where it stays here."""
    sha256: str
    """Digest of the factors: what an operator approves."""
    content_hash: str
    """Digest of the factors, of everything beside them, of what is shared, and of whose task it is for."""
    terms: Terms = OWN
    """Whose task it is for, and on which terms."""

    def task_id(self, organisation: str) -> str:
        """Return ``organisation/name`` of its task, for a client of ``organisation``."""
        return f"{self.terms.owner or organisation}/{self.task}"


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter."""

    directory: str
    """As it was given."""
    task_id: str
    """``organisation/name``."""
    state: str
    """``merged``, ``sent`` (durable at the hub, not yet merged), ``set_aside`` (the operator decides), ``refused``, or
    ``waiting`` as long as the hub has not answered."""
    update_id: str = ""
    """The update that held it; empty once it is merged and forgotten here."""
    version: int = 0
    """The version that holds it; 0 until it is merged."""
    relative_error: float = 0.0
    """Of the stored form against the adapter, measured at its merge; 0 until then."""
    payload_bytes: int = 0
    """Bytes of the update."""
    new: bool = True
    """Whether this run put it into the outbox: not if it had been sent, or waited there, before."""
    head: str = "none"
    """``none``, ``private`` or ``shared``."""
    reason: str = ""
    """Why it was refused or set aside."""
    notes: tuple[str, ...] = ()
    """What a person should know of the adapter."""


def read_contributions(
    directories: Sequence[Path], task: str | None = None, share_head: bool = False, terms: Terms = OWN
) -> list[Contribution]:
    """Read adapter directories; nothing is sent before all of them can be used.

    Args:
        directories: as PEFT's ``save_pretrained`` wrote them.
        task: name of the task, for one directory. None: each directory's own name.
        share_head: whether the modules under ``modules_to_save`` leave too.
        terms: whose tasks they are for.

    Raises:
        AdapterError: one of them cannot be used, changes nothing, or has no head to share; names it and what to do.
        PayloadError: its tensor file is damaged.
        ConfigError: two would be one task, or a task's name cannot be one.
    """
    if task is not None and len(directories) > 1:
        raise ConfigError(
            f"--task names one task, and {len(directories)} adapters were given: leave it out, so that each task is "
            "named as its directory"
        )
    found: dict[str, Contribution] = {}
    for directory in directories:
        name = task_name(directory) if task is None else check_name(task, "task name")
        if name in found:
            raise ConfigError(
                f"{found[name].directory} and {directory} would both be task {name!r}: give one alone, with --task"
            )
        found[name] = _for(_read(directory, name, share_head), terms)
    return list(found.values())


def _for(one: Contribution, terms: Terms) -> Contribution:
    """Return an adapter under terms: for another owner's task it is another contribution."""
    if not terms.owner:
        return replace(one, terms=terms)
    whole = hashlib.sha256(f"{one.content_hash} for {terms.owner}".encode()).hexdigest()
    return replace(one, terms=terms, content_hash=whole)


def _read(directory: Path, task: str, share_head: bool) -> Contribution:
    adapter = read_adapter(directory)
    if not any(bool(f.out.any()) and bool(f.in_.any()) for f in adapter.factors.values()):
        raise AdapterError(
            f"{directory}: all B are zero, so this adapter changes nothing and there is nothing to send: was it loaded "
            "into another model class and saved? Give the directory that its training wrote"
        )
    head = _shared_head(directory, adapter) if share_head else {}
    factors = hashlib.sha256(encode_adapter(adapter.factors)).hexdigest()
    beside = hashlib.sha256(_private_head(adapter)).hexdigest()
    whole = hashlib.sha256(f"adapter {factors} {beside} {sorted(head)}".encode()).hexdigest()
    return Contribution(directory, task, adapter, head, factors, whole)


def _shared_head(directory: Path, adapter: PeftAdapter) -> dict[str, Tensor]:
    """Return the tensors of the modules under ``modules_to_save``, without PEFT's prefix."""
    names = {key: key.removeprefix(WRAPPER) for key in adapter.extra}
    modules = adapter.config.modules_to_save
    head = {
        name: adapter.extra[key]
        for key, name in names.items()
        if any(f".{module}." in f".{name}" for module in modules)
    }
    if not head:
        raise AdapterError(
            f"{directory} has no head to share: no tensor belongs to modules_to_save ({', '.join(modules) or 'none'}); "
            "leave --share-head out"
        )
    for name, tensor in head.items():
        if not 1 <= tensor.ndim <= 4:
            raise AdapterError(
                f"{directory}: head tensor {name!r} has shape {tuple(tensor.shape)}, tensors of 1 to 4 dimensions can "
                "be shared: leave --share-head out"
            )
    size = sum(4 * tensor.numel() for tensor in head.values())
    if size > MAX_HEAD_BYTES:
        raise AdapterError(
            f"{directory}: its head has {size} bytes, at most {MAX_HEAD_BYTES} are shared: leave --share-head out"
        )
    return head


def _private_head(adapter: PeftAdapter) -> bytes:
    """Return everything beside the factors as a safetensors file, with the frame to write the adapter again."""
    tensors = {key: tensor.contiguous() for key, tensor in adapter.extra.items()}
    frame = json.dumps(adapter.export.to_json(), sort_keys=True)
    return bytes(safetensors.torch.save(tensors, {FRAME_KEY: frame}))


def outcome_text(one: Outcome) -> str:
    """Return what became of an adapter as lines for people."""
    states = {
        "merged": f"merged in version {one.version}, relative error {one.relative_error:.4g}",
        "sent": "durable at the hub, not yet merged; --wait waits for that",
        "set_aside": f"set aside: {one.reason}; run the same command again later",
        "refused": f"refused: {one.reason}",
    }
    heads = {"none": "no head", "private": "its head stayed here", "shared": "with its head"}
    known = "" if one.new or one.state == "refused" else "; nothing was sent twice"
    line = f"{one.directory}: {one.task_id}: {states[one.state]} ({one.payload_bytes} bytes, {heads[one.head]}){known}"
    return "\n".join([line, *(f"  {note}" for note in one.notes)])


def check_sites(one: Contribution, spec: SpaceSpec) -> None:
    """Refuse an adapter that the space cannot hold.

    Raises:
        SpaceMismatchError: a site that the space does not have, or of another shape.
        AdapterError: a rank above the space's limit.
    """
    unknown = sorted(site for site in one.adapter.factors if site not in spec.sites)
    if unknown:
        raise SpaceMismatchError(
            f"{one.directory}: the adapter changes {len(unknown)} modules that the space over {spec.backbone!r} does "
            f"not adapt: {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}; the space has "
            f"{', '.join(sorted(spec.sites)[:2])}, ...: train on those modules of that backbone only"
        )
    for name, factors in one.adapter.factors.items():
        site = spec.sites[name]
        expected, got = (site.d_out, site.d_in), (factors.out.shape[0], factors.in_.shape[0])
        if expected != got:
            raise SpaceMismatchError(
                f"{one.directory}: site {name!r}: the space over {spec.backbone!r} has a weight of {expected[0]} x "
                f"{expected[1]}, the adapter was made for one of {got[0]} x {got[1]}: it belongs to another backbone"
            )


def _plain(one: Contribution, spec: SpaceSpec) -> Update:
    """Return an adapter as an update without coordinates: it means the same in every version."""
    sites = express(one.adapter.factors, empty_space(spec), spec.rank_limit)
    for name, site in sites.items():
        rank = 0 if site.residual is None else site.residual.rank
        if rank > spec.rank_limit:
            raise AdapterError(
                f"{one.directory}: site {name!r} has rank {rank}, the space takes {spec.rank_limit}: train a smaller "
                "one, or ask the operator to raise rank_limit"
            )
    return Update(0, sites, one.head)


def contribute(
    layout: ClientLayout,
    link: HubLink,
    wanted: Sequence[Contribution],
    *,
    backbone: str | None = None,
    approval: str | None = None,
    wait: bool = False,
    tell: Callable[[str], None] | None = None,
    step: Callable[[str], None] = lambda name: None,
) -> list[Outcome]:
    """Send adapters until the hub holds all of them durably; with ``wait``, until each is settled.

    Args:
        layout: an enrolled client directory, on which no session runs.
        link: to its hub.
        wanted: from :func:`read_contributions`.
        backbone: the backbone they were trained on, whose weights are compared with the space's fingerprints.
        approval: the operator's, in place of the backbone.
        wait: until they are merged, refused, or set aside for the operator.
        tell: called with a sentence about each thing that happens.
        step: called before every durable step of the outbox, see :class:`~share_client.outbox.Outbox`.

    Raises:
        SpaceMismatchError: the hub's space is another one, or one of the adapters does not belong to it.
        AccessError: nothing shows that they do, or a task is not shared with this organisation.
        UnknownTaskError: the task of another owner is not there.
        SignatureError: the approval is of something else.
        AdapterError: an adapter is larger than the space takes. In all these cases nothing has been sent.
        UnavailableError: a session works in the directory.
        IdentityError: the hub does not let us in.
    """
    log = SessionLog(layout.session_log, tell)
    with closing(log), only_session(layout, _LOCK_S):
        contributor = _Contributor(layout, link, log, step)
        for one in wanted:
            contributor.check(one, backbone, approval)
        return contributor.run(wanted, wait)


class _Contributor:
    """Takes contributions to their end."""

    def __init__(self, layout: ClientLayout, link: HubLink, log: SessionLog, step: Callable[[str], None]) -> None:
        self._member = load_member(layout)
        self._link = link
        self._log = log
        self._stop = threading.Event()  # never set: whoever ends this ends the process, and the outbox stays
        description = self._patiently(link.describe)
        check_space(description, self._member)
        self._description = description
        self._spec = description.spec
        self._chain = open_chain(description, link.credentials, None, datetime.now(UTC))
        self._outbox = Outbox(layout.outbox, step)
        self._records = Records(layout.tasks)
        rebaser = Rebaser(self._spec, self._newest, self._versions)
        signer = SubmissionSigner(layout.sequence, lambda: link.credentials)
        self._sender = Sender(link, self._outbox, self._records, signer, log, self._stop, rebaser)

    def check(self, one: Contribution, backbone: str | None, approval: str | None) -> None:
        """Refuse an adapter that does not fit the space, or of which nothing shows that it belongs to its backbone."""
        check_sites(one, self._spec)
        size, most = len(encode_update(_plain(one, self._spec))), self._description.max_payload_bytes
        if size > most:
            raise AdapterError(
                f"{one.directory}: as an update it has {size} bytes, the hub takes {most}: train one of a smaller rank"
            )
        if backbone is not None:
            read_frame(backbone, self._spec, one.adapter.factors)
        elif approval is None:
            raise AccessError(
                f"{one.directory}: nothing shows that it was trained on {self._spec.backbone!r}, the backbone of this "
                "space: give --backbone PATH, whose weights are then compared, or ask the operator for an approval "
                f"(share-server approve DIR {one.sha256}) and give it with --approval"
            )
        else:
            self._check_approval(one, approval)
        if one.terms.owner:
            ours = self._member.organisation
            require_open(self._link, self._chain, one.task_id(ours), self._description.version, ours)

    def _check_approval(self, one: Contribution, approval: str) -> None:
        signer, authority = self._description.signer_certificate, self._link.credentials.authority
        check_approval(approval, self._spec.space_id, one.sha256, authority, signer, datetime.now(UTC))

    def run(self, wanted: Sequence[Contribution], wait: bool) -> list[Outcome]:
        """Put into the outbox what is neither there nor merged, and send until each has come far enough."""
        put = {one.task for one in wanted if not self._on_its_way(one) and not self._merged(one)}
        for one in wanted:
            if one.task in put:
                self._put(one)
        open_ones = {"waiting", "sent"} if wait else {"waiting"}
        while True:
            state = self._sender.pass_once()
            for one in wanted:
                if self._lost(one):
                    self._put(one)
            outcomes = [self._outcome(one, state, one.task in put) for one in wanted]
            if not any(outcome.state in open_ones for outcome in outcomes):
                return outcomes
            time.sleep(_POLL_S)

    def _last_entry(self, one: Contribution) -> Entry | None:
        """Return what was put in last for the task: it replaces whatever came before."""
        entries = [entry for entry in self._outbox.entries() if entry.training.task == one.task]
        return entries[-1] if entries else None

    def _on_its_way(self, one: Contribution) -> bool:
        entry = self._last_entry(one)
        return entry is not None and entry.training.content_hash == one.content_hash

    def _merged(self, one: Contribution) -> bool:
        """Whether the newest that is merged of the task, and all that will be, is this adapter."""
        heads = self._records.get(one.task).heads
        return self._last_entry(one) is None and bool(heads) and heads[-1].content_hash == one.content_hash

    def _lost(self, one: Contribution) -> bool:
        """Whether the hub wants it expressed anew and only reading it again helps: a trained task is trained again."""
        refused = self._records.get(one.task).refused_hash == one.content_hash
        return not (refused or self._on_its_way(one) or self._merged(one))

    def _put(self, one: Contribution) -> None:
        task_id = one.task_id(self._member.organisation)
        version = self._patiently(self._link.describe).version
        known = {task.task_id for task in self._patiently(self._link.list_tasks).tasks}
        update = replace(_plain(one, self._spec), base_version=version)
        payload = encode_update(update)
        entry = self._outbox.put(
            payload,
            _private_head(one.adapter),
            Training(one.task, one.content_hash, version, loss=0.0, steps=0, seconds=0.0, rows=0),
            space_id=self._spec.space_id,
            task_id=task_id,
            create=not one.terms.owner and task_id not in known,
            schema_sha256=one.terms.schema_sha256,
            share_with=one.terms.share_with,
        )
        self._log.write(
            "contributing",
            task=one.task,
            update_id=entry.update_id,
            sites=len(update.sites),
            rank=max(site.residual.rank for site in update.sites.values() if site.residual),
            payload_bytes=len(payload),
            shared_head=sorted(one.head),
        )

    def _outcome(self, one: Contribution, state: Pass, new: bool) -> Outcome:
        outcome = Outcome(
            directory=str(one.directory),
            task_id=one.task_id(self._member.organisation),
            state="refused",
            new=new,
            head="shared" if one.head else "private" if one.adapter.extra else "none",
            notes=one.adapter.notes,
        )
        entry = self._last_entry(one)
        if entry is not None and self._on_its_way(one):
            known = replace(outcome, update_id=entry.update_id, payload_bytes=entry.submission.payload_size)
            if one.task in state.set_aside:
                return replace(known, state="set_aside", reason="the hub keeps it aside until the operator decides")
            return replace(known, state="sent" if entry.acknowledged else "waiting")
        if not self._merged(one):
            return replace(outcome, reason=self._records.get(one.task).refused_reason)
        merges = [line for line in self._records.history(one.task) if line["event"] == "merged"]
        last = next(line for line in reversed(merges) if line["content_hash"] == one.content_hash)
        names = ("update_id", "version", "relative_error", "payload_bytes")
        return replace(outcome, state="merged", **{name: last[name] for name in names})

    def _newest(self) -> Space:
        return fetch_newest(self._link, self._spec, self._chain)[0]

    def _versions(self) -> tuple[int, int]:
        description = self._link.describe()
        return description.version, description.oldest_base_version

    def _patiently(self, call: Callable[[], _T]) -> _T:
        answer = patiently(call, self._stop, lambda error: self._log.write("waiting", reason=str(error)))
        assert answer is not None, "nobody stops this"
        return answer
