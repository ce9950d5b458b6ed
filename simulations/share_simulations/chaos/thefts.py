"""What a thief can do with a captured submission, and the bugs under which one of it would work."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from share_core.errors import ConfigError
from share_core.identity import UpdateStatement
from share_proto.v1 import hub_pb2
from share_server.hub import intake
from share_server.hub.access import Caller
from share_server.hub.intake import Intake
from share_server.local import member_of_no_hub, sign_header
from share_server.store import updates
from share_simulations.chaos.scenario import Letter

_THIEF_ORGANISATION = "north"
_THIEF = f"{_THIEF_ORGANISATION}/carl"


@dataclass(frozen=True)
class Stolen:
    """What is sent."""

    caller: Caller
    """Who sends it."""
    header: hub_pb2.SubmitHeader
    """The header."""
    payload: bytes
    """What follows."""


@dataclass(frozen=True)
class Theft:
    """One way to use a captured submission."""

    name: str
    """In a word or two."""
    steal: Callable[[Letter, Letter, Random], Stolen]
    """Makes it of a submission and another one, both known to the hub."""


def _with(**changes: Any) -> Callable[[Letter, Letter, Random], Stolen]:
    """Return a theft by the member itself, or in its name, with other fields and the old signature."""

    def steal(letter: Letter, other: Letter, draw: Random) -> Stolen:
        header = _copy(letter.header)
        for name, value in changes.items():
            setattr(header, name, value(letter, other, draw) if callable(value) else value)
        return Stolen(member_of_no_hub(letter.member).caller, header, letter.payload)

    return steal


def _by_another(letter: Letter, other: Letter, draw: Random) -> Stolen:
    return Stolen(member_of_no_hub(_THIEF).caller, _copy(letter.header), letter.payload)


def _under_another_task(letter: Letter, other: Letter, draw: Random) -> Stolen:
    header = _copy(letter.header)
    header.update_id, header.task_id = secrets.token_hex(16), f"{_THIEF_ORGANISATION}/own"
    return Stolen(member_of_no_hub(_THIEF).caller, header, letter.payload)


def _to_everybody(letter: Letter, other: Letter, draw: Random) -> Stolen:
    header = _copy(letter.header)
    header.update_id = secrets.token_hex(16)
    header.sharing.organisations.append(_THIEF_ORGANISATION)
    return Stolen(member_of_no_hub(letter.member).caller, header, letter.payload)


def _number_again(letter: Letter, other: Letter, draw: Random) -> Stolen:
    """The member itself signs a second update under the number of the first."""
    header = _copy(letter.header)
    header.update_id = secrets.token_hex(16)
    sender = member_of_no_hub(letter.member)
    return Stolen(sender.caller, sign_header(header, sender, letter.header.sequence), letter.payload)


def _other_content(letter: Letter, other: Letter, draw: Random) -> Stolen:
    """The member itself signs other content under a known name."""
    header = _copy(other.header)
    header.update_id = letter.update_id
    sender = member_of_no_hub(other.member)
    return Stolen(sender.caller, sign_header(header, sender), other.payload + b"\0")


def _renewed_key(letter: Letter, other: Letter, draw: Random) -> Stolen:
    """The member has enrolled again: its old signature is not that of its new key."""
    fresh = member_of_no_hub(letter.member, "contributor")
    return Stolen(fresh.caller, _copy(letter.header), letter.payload)


def _longer(letter: Letter, other: Letter, draw: Random) -> Stolen:
    return Stolen(member_of_no_hub(letter.member).caller, _copy(letter.header), letter.payload + bytes(64))


def _cut(letter: Letter, other: Letter, draw: Random) -> Stolen:
    payload = letter.payload[: draw.randrange(len(letter.payload))]
    return Stolen(member_of_no_hub(letter.member).caller, _copy(letter.header), payload)


THEFTS = (
    Theft("as it was", _with()),
    Theft("from another offset", _with(offset=lambda letter, _, draw: draw.randrange(len(letter.payload)))),
    Theft("cut short", _cut),
    Theft("longer", _longer),
    Theft("by another member", _by_another),
    Theft("by another member, for a task of its own", _under_another_task),
    Theft("by the member with another key", _renewed_key),
    Theft("under a new update id", _with(update_id=lambda *_: secrets.token_hex(16))),
    Theft("for another task", _with(task_id=lambda letter, other, _: f"{letter.task_id}x")),
    Theft("shared with one organisation more", _to_everybody),
    Theft("with a new number", _with(sequence=lambda letter, _, draw: draw.randrange(1, 2**62))),
    Theft("without a number", _with(sequence=0)),
    Theft("without a signature", _with(signature=b"", update_id=lambda *_: secrets.token_hex(16))),
    Theft("with the signature of another", _with(signature=lambda _, other, __: other.header.signature)),
    Theft("signed twice under one number", _number_again),
    Theft("other content under a known id", _other_content),
)
"""Every theft; each may only be refused, or answered with the first receipt."""


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    """Short name."""
    what: str
    """What is wrong in it, in words."""
    plant: Callable[[ExitStack], None]
    """Plants it until the stack is closed."""


def _swap(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Put something in the place of a function that must be there.

    Raises:
        ConfigError: it is gone: the bug must be planted elsewhere.
    """
    if not hasattr(owner, name):
        raise ConfigError(f"{owner} has no {name} any more: plant this bug elsewhere")
    honest = getattr(owner, name)
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, honest)


def _blind(stack: ExitStack) -> None:
    _swap(stack, intake, "check_update_signature", lambda *_: None)


def _numbers_again(stack: ExitStack) -> None:
    for module in (intake, updates):
        _swap(stack, module, "require_fresh", lambda *_: None)


def _no_digest(stack: ExitStack) -> None:
    honest = Intake._finish

    def finish(self: Intake, staged: Any, rest: Any, header: Any) -> Any:
        told = _copy(header)
        payload = b"".join((staged.read() if staged.size else b"", *rest))
        told.payload_sha256 = hashlib.sha256(payload).hexdigest()
        return honest(self, staged, rest, told)

    _swap(stack, Intake, "_finish", finish)


def _unsigned_field(**nothing: Any) -> Callable[[ExitStack], None]:
    """Return a plant under which some fields are not signed."""

    def plant(stack: ExitStack) -> None:
        honest = UpdateStatement.to_bytes
        _swap(stack, UpdateStatement, "to_bytes", lambda self: honest(replace(self, **nothing)))

    return plant


def _taken_again(stack: ExitStack) -> None:
    honest = Intake.receive

    async def receive(self: Intake, *arguments: Any) -> Any:
        row, duplicate = await honest(self, *arguments)
        if duplicate:
            again = replace(row.new, update_id=secrets.token_hex(16), sequence=0)
            await self._store.do(lambda journal: updates.accept_update(journal, again, row.received_ms))
        return row, duplicate

    _swap(stack, Intake, "receive", receive)


MUTANTS = (
    Mutant("blind", "signatures are not checked", _blind),
    Mutant("numbers-again", "a number may be used for two updates", _numbers_again),
    Mutant("no-digest", "the payload is not compared with its digest", _no_digest),
    Mutant("taken-again", "a known update is taken once more", _taken_again),
    Mutant("id-unsigned", "the update id is not signed", _unsigned_field(update_id="")),
    Mutant("task-unsigned", "the task is not signed", _unsigned_field(task_id="")),
    Mutant("number-unsigned", "the number is not signed", _unsigned_field(sequence=0)),
    Mutant("sharing-unsigned", "who may contribute is not signed", _unsigned_field(open=False, organisations=())),
    Mutant("schema-unsigned", "the label schema is not signed", _unsigned_field(schema_sha256="")),
    Mutant("rows-unsigned", "the declared rows are not signed", _unsigned_field(rows=0)),
    Mutant("lease-unsigned", "the lease is not signed", _unsigned_field(lease_id="")),
    Mutant("privacy-unsigned", "what is declared of privacy is not signed", _unsigned_field(privacy="")),
)
"""Every planted bug; the campaign must notice each of them."""


def _copy(header: hub_pb2.SubmitHeader) -> hub_pb2.SubmitHeader:
    copied = hub_pb2.SubmitHeader()
    copied.CopyFrom(header)
    return copied
