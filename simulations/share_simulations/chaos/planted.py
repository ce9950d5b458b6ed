"""Hubs with a planted bug each: every campaign is shown to catch them.

A planted bug replaces one step of the honest hub and leaves the rest alone. :func:`write_hub` makes the script that
:class:`share_server.local.LocalHub` runs in place of the hub.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from share_proto.v1 import hub_pb2
from share_server.hub import convert
from share_server.hub.access import CALLER
from share_server.hub.intake import Intake
from share_server.hub.tensor_service import HubService

_LATER_S = 0.4
_tasks: set[asyncio.Task[Any]] = set()


def write_hub(bug: str, folder: Path) -> Path:
    """Write the script of the hub with this bug into ``folder`` and return its path."""
    script = folder / f"hub_{bug}.py"
    script.write_text(f"from share_simulations.chaos.planted import main\nmain({bug!r})\n")
    return script


def main(bug: str) -> None:
    """Be the hub of the directory named on the command line, with a planted bug."""
    from share_server.hub import __main__

    BUGS[bug]()
    sys.exit(__main__.main(sys.argv[1:]))


def _patch(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute; an attribute that is not there means that the bug is not planted."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner.__name__} has no {name}: the planted bug does not fit this hub any more")
    setattr(owner, name, value)


async def _replay(messages: list[hub_pb2.SubmitRequest]) -> AsyncIterator[hub_pb2.SubmitRequest]:
    for message in messages:
        yield message


def _background(work: Any) -> None:
    task = asyncio.ensure_future(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def _ack_before_row() -> None:
    """The receipt leaves when the bytes are in memory; what is durable comes a moment later."""
    numbers = iter(range(1, 2**31))

    async def submit(self: Any, request_iterator: Any, context: Any) -> hub_pb2.SubmitResponse:
        messages = [message async for message in request_iterator]
        caller = CALLER.get()

        async def later() -> None:
            await asyncio.sleep(_LATER_S)
            await self._intake.receive(caller, _replay(messages))
            self._loop.wake()

        _background(later())
        return hub_pb2.SubmitResponse(update_id=messages[0].header.update_id, ingest_seq=next(numbers))

    _patch(HubService, "Submit", submit)


def _no_dedupe() -> None:
    """An update that is known already is taken once more."""
    honest = Intake.receive

    async def receive(self: Intake, caller: Any, messages: Any) -> Any:
        kept = [message async for message in messages]
        row, duplicate = await honest(self, caller, _replay(kept))
        if duplicate:
            header = hub_pb2.SubmitHeader()
            header.CopyFrom(kept[0].header)
            header.update_id = secrets.token_hex(16)
            again = [hub_pb2.SubmitRequest(header=header), *kept[1:]]
            await honest(self, caller, _replay(again))
        return row, duplicate

    _patch(Intake, "receive", receive)


def _two_receipts() -> None:
    """A resend is answered with another place in the journal than the first time."""
    honest = convert.receipt

    def receipt(row: Any, duplicate: bool) -> hub_pb2.SubmitResponse:
        answer = honest(row, duplicate)
        answer.ingest_seq += duplicate
        return answer

    _patch(convert, "receipt", receipt)


KILL_BUGS = ("ack_before_row", "no_dedupe", "two_receipts")
"""Bugs that random kills under load must show."""

BUGS: Mapping[str, Callable[[], None]] = {
    "ack_before_row": _ack_before_row,
    "no_dedupe": _no_dedupe,
    "two_receipts": _two_receipts,
}
"""Planted bugs by name."""
