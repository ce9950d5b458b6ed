"""The commands ``quarantine``, ``release``, ``refuse`` and ``approve``: what the operator decides on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from share_core.command_line import plain_errors
from share_server.layout import Layout

if TYPE_CHECKING:
    from share_proto.v1 import hub_pb2, hub_pb2_grpc
    from share_server.config import ServerConfig

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The server directory; its hub must run.")]
UpdateId = Annotated[str, typer.Argument(metavar="UPDATE_ID", help="As 'share-server quarantine' shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of a table.")]

_PAGE = 1000


def quarantine(directory: Directory, as_json: Json = False) -> None:
    """List the updates that were set aside: who sent each, for which task, and why it is not merged."""
    from share_server import tables
    from share_server.config import read_config
    from share_server.operator import operator_stub

    with plain_errors("share-server"):
        layout = Layout(directory)
        config = read_config(layout.config)
        with operator_stub(layout, config) as hub:
            found = _set_aside(hub, config)
    if as_json:
        typer.echo(json.dumps({"updates": [_values(one) for one in found]}))
    elif found:
        tables.show(tables.quarantine_table(found))
        typer.echo("let one pass: share-server release DIR UPDATE_ID; or refuse it: share-server refuse DIR UPDATE_ID")
    else:
        typer.echo("nothing is set aside")


def release(
    directory: Directory,
    update_id: UpdateId,
    reason: Annotated[str, typer.Option(help="Why; kept in the journal.")] = "",
    as_json: Json = False,
) -> None:
    """Let an update out of quarantine: it is merged next, and no filter looks at it again."""
    _decide(directory, update_id, True, reason, as_json)


def refuse(
    directory: Directory,
    update_id: UpdateId,
    reason: Annotated[str, typer.Option(help="Why; its owner reads it.")],
    as_json: Json = False,
) -> None:
    """Refuse an update in quarantine for good: its client is told the reason and keeps a copy."""
    _decide(directory, update_id, False, reason, as_json)


def approve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The server directory made by 'init'.")],
    adapter_sha256: Annotated[
        str, typer.Argument(metavar="SHA256", help="Of the adapter, as 'share-client contribute' tells its owner.")
    ],
    as_json: Json = False,
) -> None:
    """Vouch that an adapter was trained on this space's backbone; its owner contributes it with the line printed."""
    from share_core.identity import approve_adapter
    from share_core.spec_file import read_spec

    with plain_errors("share-server"):
        layout = Layout(directory)
        space_id = read_spec(layout.space).space_id
        approval = approve_adapter(layout.signing_key.read_bytes(), space_id, adapter_sha256)
    found = {"approval": approval, "space_id": space_id, "adapter_sha256": adapter_sha256}
    typer.echo(json.dumps(found) if as_json else approval)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of share-server."""
    for command in (quarantine, release, refuse, approve):
        app.command()(command)


def _decide(directory: Path, update_id: str, let_pass: bool, reason: str, as_json: bool) -> None:
    from share_proto.v1 import hub_pb2
    from share_server.config import read_config
    from share_server.operator import ask, operator_stub

    with plain_errors("share-server"):
        layout = Layout(directory)
        config = read_config(layout.config)
        request = hub_pb2.DecideUpdateRequest(update_id=update_id, release=let_pass, reason=reason)
        with operator_stub(layout, config) as hub:
            answer = ask(hub.DecideUpdate, request, config.local_hub_address)
    if as_json:
        typer.echo(json.dumps(_values(answer.update)))
    else:
        typer.echo(f"update {update_id} of {answer.update.member} is {'released' if let_pass else 'refused'}")


def _set_aside(hub: hub_pb2_grpc.HubStub, config: ServerConfig) -> list[hub_pb2.UpdateRecord]:
    from share_proto.v1 import hub_pb2
    from share_server.operator import ask

    found: list[hub_pb2.UpdateRecord] = []
    after = 0
    while True:
        request = hub_pb2.ListUpdatesRequest(after_seq=after, limit=_PAGE)
        page = ask(hub.ListUpdates, request, config.local_hub_address).updates
        if not page:
            return found
        found += [one for one in page if one.state == hub_pb2.UPDATE_STATE_QUARANTINED]
        after = page[-1].ingest_seq


def _values(update: hub_pb2.UpdateRecord) -> dict[str, Any]:
    from share_proto.v1 import hub_pb2

    return {
        "update_id": update.update_id,
        "member": update.member,
        "task_id": update.task_id,
        "state": hub_pb2.UpdateState.Name(update.state).removeprefix("UPDATE_STATE_"),
        "reason": update.reason,
        "received_unix_ms": update.received_unix_ms,
    }
