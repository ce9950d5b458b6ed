"""The outbox: nothing trained is lost, and nothing is sent under two ids.

::

    outbox/<update id>/header.json           what Submit announces, and what to remember of the training
                       payload.safetensors   the bytes that leave
                       head.safetensors      the private head; never leaves
                       adapter.safetensors   what the payload means without any bases; only if it refers to some
                       signature.json        signer, number and signature, from the first sending on
                       receipt.json          the hub's receipt, once it has acknowledged
    outbox/refused/<update id>/...           the same, with reason.json

An entry is written into a temporary directory, flushed file by file, and renamed: it is there as a whole or not at
all. From then on its update id is fixed, so sending it again after a crash or a lost answer is harmless: the hub
knows the id. It leaves the outbox only when the hub says that it is merged (then what must be kept has been
recorded elsewhere first) or that it will never be; then it moves to ``refused`` with the reason.

If the hub no longer keeps the version an update is expressed in, the same content is expressed in a newer one and put
in as a new entry, whose id is computed from the old one's; then the old one goes. A crash in between leaves both, and
the old one is known to be replaced: it is never sent again.

An entry is signed before it is sent for the first time, and keeps its number and signature however often it is sent;
only after its member has enrolled with another key is it signed anew. The new entry of a replaced one is another update
and gets a number of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from share_client.durable import make_private_directory, remove_tree, sweep, to_json
from share_client.uploading import Submission
from share_core.durable import TEMPORARY, flush_directory, write_atomic, write_flushed
from share_core.errors import ConfigError, DigestError
from share_core.names import check_update_id
from share_core.privacy import CoefficientNoise, Declaration, declaration_to_text

_REFUSED = "refused"
_ADAPTER = "adapter.safetensors"
_SIGNATURE = "signature.json"
_SIGNED = ("signer", "sequence", "signature")


@dataclass(frozen=True)
class Training:
    """What is remembered of the training behind an update until it is merged."""

    task: str
    """Name of the task inside the organisation."""
    content_hash: str
    """Hash of the data and options it was trained on."""
    base_version: int
    """Version it was trained in."""
    loss: float
    """Last training loss."""
    steps: int
    """Optimiser steps."""
    seconds: float
    """Time the training took."""
    rows: int
    """Training rows."""
    trained_numbers: int = 0
    """Trained parameters."""
    rebases: int = 0
    """How often this training was expressed in the bases of a newer version."""
    why: str = ""
    """Why it was trained, in words."""
    refit: bool = False
    """Whether it learned the coefficients of a merged training again, in newer bases."""
    columns: int = 0
    """Basis vectors that it could use, over all sites and both sides."""
    captured: float = 0.0
    """Share of the gradient's energy left at the end that coefficients in those bases could follow."""
    attempt: str = ""
    """Hash of the data and of every setting, see :attr:`.trainer.LocalTask.attempt`; empty: there are no settings."""


@dataclass(frozen=True)
class Entry:
    """One update in the outbox. The payload stays on disk until it is read."""

    directory: Path
    """Where it lies."""
    submission: Submission
    """Header of the Submit call."""
    training: Training
    """What it came from."""
    acknowledged: bool
    """Whether the hub has given a receipt."""
    adapter_sha256: str = ""
    """Hexadecimal SHA-256 of the adapter file; empty if there is none."""

    @property
    def update_id(self) -> str:
        """Id of the update."""
        return self.submission.update_id

    def read_payload(self) -> bytes:
        """Return the payload after comparing it with its hash.

        Raises:
            DigestError: the disk no longer holds what was written.
        """
        payload = (self.directory / "payload.safetensors").read_bytes()
        found = hashlib.sha256(payload).hexdigest()
        if found != self.submission.payload_sha256:
            raise DigestError(
                f"{self.directory}: payload has SHA-256 {found}, expected {self.submission.payload_sha256}: "
                "the disk damaged it; the task will be trained again"
            )
        return payload

    def read_head(self) -> bytes:
        """Return the private head, a safetensors file."""
        return (self.directory / "head.safetensors").read_bytes()

    def read_adapter(self) -> bytes:
        """Return the ambient factors of the update (:func:`share_core.wire.encode_adapter`); empty if not kept.

        Raises:
            DigestError: the disk no longer holds what was written.
        """
        if not self.adapter_sha256:
            return b""
        adapter = (self.directory / _ADAPTER).read_bytes()
        if hashlib.sha256(adapter).hexdigest() != self.adapter_sha256:
            raise DigestError(f"{self.directory}: {_ADAPTER} is not what was written: the disk damaged it")
        return adapter


class Outbox:
    """The outbox of one client directory. One process at a time; the session's lock sees to it.

    ``step`` is called with the name of each durable step before it is taken: the seam where tests end the process.
    """

    def __init__(self, directory: Path, step: Callable[[str], None] = lambda name: None) -> None:
        self._directory = make_private_directory(directory)
        self._refused = make_private_directory(directory / _REFUSED)
        self._step = step
        sweep(self._directory)
        sweep(self._refused)
        flush_directory(self._directory)

    def put(
        self,
        payload: bytes,
        head: bytes,
        training: Training,
        *,
        space_id: str,
        task_id: str,
        create: bool,
        lease_id: str = "",
        adapter: bytes = b"",
        declared: Declaration | None = None,
        schema_sha256: str = "",
        share_with: tuple[str, ...] = (),
        ready: Callable[[], None] = lambda: None,
    ) -> Entry:
        """Make an update durable under a new update id and return it. Nothing has been sent yet.

        ``schema_sha256`` is the label schema of the head in it or of the shared task, ``share_with`` who else may
        contribute, ``declared`` the clipping and noise. Where that hides the whole data set, so is the number of its
        rows. ``ready`` is called when all of it is on the disk and nobody sees it yet.

        Raises:
            OSError: it is not in the outbox, for example because the disk is full.
        """
        submission = Submission(
            update_id=uuid.uuid4().hex,
            space_id=space_id,
            task_id=task_id,
            create=create,
            payload_size=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            lease_id=lease_id,
            rows=0 if isinstance(declared, CoefficientNoise) else training.rows,
            privacy="" if declared is None else declaration_to_text(declared),
            schema_sha256=schema_sha256,
            share_with=share_with,
        )
        return self._put(submission, training, payload, head, adapter, ready)

    def rebase(self, entry: Entry, payload: bytes, base_version: int, create: bool, adapter: bytes = b"") -> Entry:
        """Put the same content in as a new update, expressed in ``base_version``; remove ``entry``; return the new one.

        ``adapter`` is what ``payload`` means without any bases, for an ``entry`` that keeps none itself. Doing it again
        after a crash gives the entry that is there already.
        """
        made = self.replacement(entry)
        if made is None:
            submission = replace(
                _unsigned(entry.submission),
                update_id=_next_id(entry.update_id),
                create=create,
                payload_size=len(payload),
                payload_sha256=hashlib.sha256(payload).hexdigest(),
            )
            training = replace(entry.training, base_version=base_version, rebases=entry.training.rebases + 1)
            made = self._put(submission, training, payload, entry.read_head(), entry.read_adapter() or adapter)
        self.remove(entry)
        return made

    def replacement(self, entry: Entry) -> Entry | None:
        """Return the entry that has taken the place of ``entry``; None if none has."""
        directory = self._directory / _next_id(entry.update_id)
        return _read(directory) if directory.exists() else None

    def _put(
        self,
        submission: Submission,
        training: Training,
        payload: bytes,
        head: bytes,
        adapter: bytes,
        ready: Callable[[], None] = lambda: None,
    ) -> Entry:
        adapter_sha256 = hashlib.sha256(adapter).hexdigest() if adapter else ""
        temporary = make_private_directory(self._directory / f"{TEMPORARY}{submission.update_id}")
        header = {
            "submission": asdict(submission),
            "training": asdict(training),
            "adapter_sha256": adapter_sha256,
        }
        files = {"payload.safetensors": payload, "head.safetensors": head, _ADAPTER: adapter}
        try:
            for name, data in {**files, "header.json": to_json(header)}.items():
                if name != _ADAPTER or adapter:
                    self._step(f"write {name}")
                    write_flushed(temporary / name, data)
            self._step("flush entry")
            flush_directory(temporary)
            ready()
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._step("rename entry")
        final = temporary.rename(self._directory / submission.update_id)
        self._step("flush outbox")
        flush_directory(self._directory)
        self._step("put done")
        return Entry(final, submission, training, acknowledged=False, adapter_sha256=adapter_sha256)

    def entries(self) -> list[Entry]:
        """Return what is in the outbox, oldest first."""
        found = [_read(path) for path in _entry_directories(self._directory)]
        return sorted(found, key=lambda entry: (entry.directory / "header.json").stat().st_mtime_ns)

    def sign(self, entry: Entry, signed: Submission) -> Entry:
        """Keep the signature of an entry, in place of an earlier one; call it before the entry is sent."""
        self._step("write signature")
        write_atomic(entry.directory / _SIGNATURE, to_json({name: getattr(signed, name) for name in _SIGNED}))
        self._step("sign done")
        return replace(entry, submission=signed)

    def acknowledge(self, entry: Entry, receipt: Mapping[str, Any]) -> Entry:
        """Record the hub's receipt."""
        self._step("write receipt")
        write_atomic(entry.directory / "receipt.json", to_json(receipt))
        self._step("acknowledge done")
        return replace(entry, acknowledged=True)

    def forget_receipt(self, entry: Entry) -> Entry:
        """Drop the receipt of an update that the hub no longer knows: it will be sent again under its id."""
        (entry.directory / "receipt.json").unlink(missing_ok=True)
        flush_directory(entry.directory)
        return replace(entry, acknowledged=False)

    def remove(self, entry: Entry) -> None:
        """Remove a merged update. The caller has recorded what must outlive it."""
        self._step("remove entry")
        remove_tree(entry.directory)
        self._step("remove done")

    def refuse(self, entry: Entry, error: str, reason: str) -> Path:
        """Move an update the hub will never merge to ``refused`` and return where it lies now."""
        self._step("write reason")
        write_atomic(entry.directory / "reason.json", to_json({"error": error, "reason": reason}))
        self._step("move refused")
        moved = entry.directory.rename(self._refused / entry.update_id)
        flush_directory(self._refused)
        flush_directory(self._directory)
        self._step("refuse done")
        return moved


def list_outbox(directory: Path) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """Return (what waits, what was refused with the reason) without changing anything: for other processes."""
    if not directory.exists():
        return [], []
    waiting = [entry for path in _entry_directories(directory) if (entry := _read_if_there(path)) is not None]
    refused = []
    for path in _entry_directories(directory / _REFUSED) if (directory / _REFUSED).exists() else []:
        reason = json.loads((path / "reason.json").read_bytes())
        refused.append((_read(path), f"{reason['error']}: {reason['reason']}"))
    return waiting, refused


def _entry_directories(directory: Path) -> list[Path]:
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_dir() and path.name != _REFUSED and not path.name.startswith(TEMPORARY)
    ]


def _read_if_there(directory: Path) -> Entry | None:
    """Read an entry's header; None if the session that works here has just settled it."""
    try:
        return _read(directory)
    except ConfigError:
        if directory.exists():
            raise
        return None


def _read(directory: Path) -> Entry:
    """Read an entry's header.

    Raises:
        ConfigError: the directory holds something else than an entry.
    """
    try:
        header = json.loads((directory / "header.json").read_bytes())
        signature = directory / _SIGNATURE
        signed = json.loads(signature.read_bytes()) if signature.exists() else {}
        told = {**header["submission"], **signed}
        submission = Submission(**{**told, "share_with": tuple(told.get("share_with", ()))})
        training = Training(**header["training"])
        adapter_sha256 = str(header.get("adapter_sha256", ""))
        if check_update_id(submission.update_id) != directory.name:
            raise ValueError(f"update id {submission.update_id} under the name {directory.name}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory} is no outbox entry ({error}): move it out of the outbox") from error
    return Entry(directory, submission, training, (directory / "receipt.json").exists(), adapter_sha256)


def _unsigned(submission: Submission) -> Submission:
    return replace(submission, signer="", sequence=0, signature="")


def _next_id(update_id: str) -> str:
    """Return the update id of what replaces an update: always the same, so that no crash can make two of them."""
    return hashlib.sha256(f"fedshare rebase {update_id}".encode()).hexdigest()[:32]
