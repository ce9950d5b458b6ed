"""``share-server relay``: re-serve a hub's versions from another machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from share_core.command_line import plain_errors
from share_core.errors import ConfigError

if TYPE_CHECKING:
    from share_server.relay.home import RelayHome, RelayState


def relay(
    upstream: Annotated[
        str | None,
        typer.Argument(
            metavar="[UPSTREAM]",
            help="The first time a join token of role relay; later HOST:PORT of the hub or of another relay, or "
            "nothing to follow the same as before.",
        ),
    ] = None,
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Directory of the relay: key, certificates, versions.")
    ] = Path("relay"),
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Address to listen on, such as 0.0.0.0:7443. Remembered after the first time."
        ),
    ] = None,
    follow: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="With a token: follow another relay from the start, not the hub."),
    ] = None,
    roster_seconds: Annotated[
        float,
        typer.Option(
            help="Seconds between two looks at who may be served. A roster four times as old serves nobody.", min=0.1
        ),
    ] = 12.0,
    metrics_port: Annotated[
        int,
        typer.Option(help="Port of the Prometheus metrics, on this machine only. 0 turns them off.", min=0, max=65535),
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for machines when the relay serves.")
    ] = False,
) -> None:
    """Serve a hub's versions to its members, as they are signed. It holds no signing key and takes no updates."""
    import asyncio

    from share_server.hub import log
    from share_server.relay.home import RelayHome, only_one
    from share_server.relay.process import serve_relay
    from share_server.relay.upstream import Pace

    with plain_errors("share-server"):
        home = RelayHome(directory.resolve())
        with only_one(home):
            state = _state(home, upstream, listen, follow)

            def ready(version: int) -> None:
                told = {"member": state.member, "listen": state.listen, "upstream": state.upstream, "version": version}
                lines = [json.dumps(told)] if as_json else [f"up  relay  {state.listen}", f"follows {state.upstream}"]
                for line in lines:
                    typer.echo(line)

            log.start_logging()
            pace = Pace(roster_seconds, 4 * roster_seconds)
            code = asyncio.run(serve_relay(home, state, ready, pace=pace, metrics_port=metrics_port))
    raise typer.Exit(code)


def _state(home: RelayHome, upstream: str | None, listen: str | None, follow: str | None) -> RelayState:
    """Enrol if a token was given, else go on as before; remember what was said this time."""
    from share_core.identity import TOKEN_PREFIX
    from share_server.relay.enrol import enrol_relay
    from share_server.relay.home import load_state, save_state, split_address

    for address in (listen, follow):
        if address is not None:
            split_address(address)
    if upstream is not None and upstream.strip().startswith(TOKEN_PREFIX):
        before = load_state(home).listen if home.state.exists() else None
        where = listen or before
        if where is None:
            raise ConfigError("say where to listen with --listen HOST:PORT")
        return enrol_relay(upstream, home, where, follow or "")
    if follow is not None:
        raise ConfigError("--follow goes with a token; otherwise give HOST:PORT of the upstream as the argument")
    state = load_state(home)
    if upstream is not None:
        split_address(upstream)
    state = dataclasses.replace(state, upstream=upstream or state.upstream, listen=listen or state.listen)
    save_state(home, state)
    return state
