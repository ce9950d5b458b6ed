"""``share-server``: make a server directory, invite members, run it, look at it."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from share_core.command_line import plain_errors, run_command
from share_core.errors import ConfigError
from share_server.config import DEFAULT_PORT
from share_server.decisions import register as register_decisions
from share_server.layout import Layout
from share_server.operations.cli import register as register_operations
from share_server.relay.cli import relay

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from share_core.types import SpaceSpec

app = typer.Typer(
    name="share-server",
    help="The server of a fedshare federation: it merges adapters and sends the shared subspace back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The server directory made by 'init'.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of a table.")]


@app.command()
def init(  # the options of one command are its interface
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make. Must not be a server yet.")],
    space: Annotated[
        str, typer.Option(help="A space.toml, or the name of a space that ships with fedshare.")
    ] = "digits-vit",
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address under which clients reach this server; repeat for more. "
            "The first one goes into join tokens. Default: this machine only."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(help="First of three ports: hub, enrolment, gateway. 0 picks free ones.", min=0, max=65533)
    ] = DEFAULT_PORT,
    metrics_port: Annotated[
        int,
        typer.Option(help="Port of the Prometheus metrics, on this machine only. 0 turns them off.", min=0, max=65535),
    ] = 0,
    k_max: Annotated[
        int | None, typer.Option(help="Most basis vectors per site and side; beyond it the space compacts.", min=1)
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="Share of a task's norm that a merge may leave out, at least 0 and below 1."),
    ] = None,
) -> None:
    """Make a server directory: certificate authority, keys, space and configuration."""
    from share_server.config import ServerConfig, check_hosts, listen_address_for
    from share_server.provision import create_server, free_ports

    with plain_errors("share-server"):
        hosts = tuple(host) if host else ServerConfig().hosts
        check_hosts(hosts, "--host")
        ports = [port, port + 1, port + 2] if port else free_ports(3)
        config = ServerConfig(
            hosts=hosts,
            listen=listen_address_for(hosts),
            hub_port=ports[0],
            enrol_port=ports[1],
            gateway_port=ports[2],
            metrics_port=metrics_port,
        )
        if metrics_port in ports:
            raise ConfigError(f"--metrics-port {metrics_port} is one of the server's other ports: choose another one")
        spec = _load_space(space, k_max, tau)
        create_server(Layout(directory), config, spec, datetime.now(UTC))
    typer.echo(f"server directory {directory} for space {spec.backbone} ({len(spec.sites)} sites)")
    typer.echo(f"hub {config.hub_address}, enrolment {config.enrol_address}, gateway {config.gateway_address}")
    if metrics_port:
        typer.echo(f"metrics http://127.0.0.1:{metrics_port}/metrics")
    typer.echo(f"next: share-server run {directory}")


@app.command()
def invite(
    directory: Directory,
    name: Annotated[
        str, typer.Argument(metavar="ORGANISATION/NAME", help="Whom to invite. Without a slash both are the same.")
    ],
    role: Annotated[str, typer.Option(help="trainer, contributor, reader or relay.")] = "trainer",
    hours: Annotated[float, typer.Option(help="Life of the token.")] = 24.0,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address under which a relay may serve; repeat for more. Only with --role relay."),
    ] = None,
) -> None:
    """Print a join token. It works once; hand it over like a password."""
    from share_core.identity import Identity
    from share_server.config import read_config
    from share_server.provision import invite_member

    with plain_errors("share-server"):
        if role == "relay" and not host:
            raise ConfigError("a relay serves others: say under which name or address with --host")
        organisation, slash, own = name.partition("/")
        identity = Identity(role, organisation, own if slash else organisation)
        layout = Layout(directory)
        token = invite_member(layout, read_config(layout.config), identity, hours, datetime.now(UTC), tuple(host or ()))
    typer.echo(token)
    hints = {
        "trainer": "share-client join TOKEN --tasks tasks.toml",
        "relay": "share-server relay TOKEN --dir DIR --listen HOST:PORT",
    }
    hint = hints.get(role, "share-client join TOKEN")
    typer.echo(f"for {identity.member}, valid {hours:g} h, works once: {hint}", err=True)


@app.command()
def revoke(
    directory: Directory,
    name: Annotated[
        str, typer.Argument(metavar="ORGANISATION/NAME", help="Whom to shut out. Without a slash both are the same.")
    ],
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again; its certificate works as before.")] = False,
) -> None:
    """Shut a member out: its open calls end at once, and hub, gateway and relays refuse it within a minute."""
    from share_server.operations.revoke import revoke as shut_out

    member = name if "/" in name else f"{name}/{name}"
    with plain_errors("share-server"):
        shut_out(Layout(directory), member, undo)
    typer.echo(f"{member} is {'let in again' if undo else 'shut out'}")
    if not undo:
        typer.echo("what it has submitted stays; to take that out as well: share-server forget", err=True)


@app.command()
def run(
    directory: Directory,
    no_fleet: Annotated[
        bool, typer.Option("--no-fleet", help="Only the hub: no Flower, no leases. For finished adapters.")
    ] = False,
) -> None:
    """Run the server in the foreground until Ctrl-C: hub, enrolment and the Flower fleet, supervised."""
    from share_server.config import read_config
    from share_server.provision import renew_certificates

    with plain_errors("share-server"):
        layout = Layout(directory)
        config = read_config(layout.config)
        renew_certificates(layout, config, datetime.now(UTC))
        from share_server.fleet.supervisor import supervise

        code = supervise(layout, config, fleet=not no_fleet)
    raise typer.Exit(code)


@app.command()
def status(directory: Directory, as_json: Json = False) -> None:
    """Show the running hub: version, tasks, updates, bytes exchanged with every member."""
    from share_proto.v1 import hub_pb2
    from share_server import tables
    from share_server.config import read_config
    from share_server.operator import ask, operator_stub

    with plain_errors("share-server"):
        layout = Layout(directory)
        config = read_config(layout.config)
        with operator_stub(layout, config) as hub:
            answer = ask(hub.GetStatus, hub_pb2.GetStatusRequest(), config.local_hub_address)
    if as_json:
        typer.echo(_to_json(answer))
        return
    tables.show(tables.status_table(answer))
    if answer.traffic:
        tables.show(tables.traffic_table(answer))


@app.command()
def tasks(directory: Directory, as_json: Json = False) -> None:
    """List the tasks of the space: owner, updates, coefficients, and what merging cost each of them."""
    from share_proto.v1 import hub_pb2
    from share_server import tables
    from share_server.config import read_config
    from share_server.operator import ask, operator_stub

    with plain_errors("share-server"):
        layout = Layout(directory)
        config = read_config(layout.config)
        with operator_stub(layout, config) as hub:
            answer = ask(hub.ListTasks, hub_pb2.ListTasksRequest(), config.local_hub_address)
    if as_json:
        typer.echo(_to_json(answer))
    else:
        tables.show(tables.task_table(answer))


app.command()(relay)
register_operations(app)
register_decisions(app)


def _load_space(space: str, k_max: int | None, tau: float | None) -> SpaceSpec:
    from share_core.spec_file import find_spec

    spec = find_spec(space)
    if tau is not None and not 0 <= tau < 1:
        raise ConfigError(f"tau must be at least 0 and below 1, got {tau:g}")
    changes: dict[str, int | float] = {}
    if k_max is not None:
        changes["k_max"] = k_max
    if tau is not None:
        changes["tau"] = tau
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def _to_json(message: Message) -> str:
    """Return every field of a message on one line, 64-bit numbers as numbers."""
    from google.protobuf.json_format import MessageToDict

    plain = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(_numbers(plain))


def _numbers(value: object) -> object:
    """Undo protobuf's JSON rule that writes 64-bit integers as strings."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def main() -> None:
    """Console script."""
    run_command(app, "share-server")


if __name__ == "__main__":
    main()
