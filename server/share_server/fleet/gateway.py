"""``python -m share_server.fleet.gateway DIR``: publish Flower's fleet calls, nothing else, to enrolled trainers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import uvicorn

from share_core.errors import ConfigError, FedshareError, IdentityError, UnavailableError
from share_server.config import ServerConfig, join_address, read_config
from share_server.fleet.files import FleetFiles, read_superlink_address
from share_server.fleet.gateway_app import Gateway
from share_server.fleet.guards import Headers, Peer, header
from share_server.fleet.hub_link import EnrolledNode, HubLink
from share_server.fleet.node_table import REFRESH_SECONDS, NodeTable
from share_server.fleet.tls_listener import listener, peer_of
from share_server.fleet.upstream import Upstream
from share_server.hub import log
from share_server.layout import Layout

_NONCE = b"share-self-test"


async def serve(layout: Layout, config: ServerConfig, fetch: Callable[[], list[EnrolledNode]]) -> None:
    """Run the gateway until SIGTERM or SIGINT, or until cancelled. ``fetch`` reads the hub's table of nodes.

    Raises:
        IdentityError: the self-test failed; nothing was published.
        UnavailableError: the port is taken.
    """
    files = FleetFiles(layout.fleet)
    upstream = Upstream(files.authority, read_superlink_address(files))
    table = NodeTable(fetch)
    gateway = Gateway(table, upstream)
    server = listener(gateway, layout, config)
    background = [asyncio.create_task(table.keep_fresh()), asyncio.create_task(_watch(files, upstream))]
    try:
        async with _running(server):
            await self_test(gateway, server, layout)
            gateway.ready = True
            log.info("serving", gateway=config.gateway_address, upstream=upstream.address)
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await upstream.close()


async def self_test(gateway: Gateway, server: uvicorn.Server, layout: Layout) -> None:
    """Call ourselves through the public port: a certificate must reach the application, none must be let in.

    Raises:
        IdentityError: otherwise. The gateway must not serve then: every guard rests on this.
    """
    nonce = secrets.token_hex(16).encode()
    expected = peer_of(ssl.PEM_cert_to_DER_cert(layout.certificate("fleet").read_text("ascii")))

    def reached(peer: Peer | None, headers: Headers) -> bool:
        told = header(headers, _NONCE) or b""
        return secrets.compare_digest(told, nonce) and peer is not None and peer == expected

    gateway.self_test = reached
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    url = f"https://{join_address({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), port)}/"
    if await _status(url, layout, nonce, show=True) != 204:
        raise IdentityError("gateway self-test: the caller's certificate does not reach the application")
    if await _status(url, layout, nonce, show=False) is not None:
        raise IdentityError("gateway self-test: a caller without certificate was let in")


async def _status(url: str, layout: Layout, nonce: bytes, show: bool) -> int | None:
    """Return the status of a call with or without certificate; None if the handshake was refused."""
    context = ssl.create_default_context(cafile=str(layout.ca_cert))
    context.check_hostname = False  # we call the address we bound; the name is for others
    if show:
        context.load_cert_chain(layout.certificate("fleet"), layout.key("fleet"))
    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=5.0) as client:
        try:
            return (await client.get(url, headers={_NONCE: nonce})).status_code
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            return None


@contextlib.asynccontextmanager
async def _running(server: uvicorn.Server) -> AsyncIterator[None]:
    """Start the listener, run the block, then wait until the listener is told to stop."""
    serving = asyncio.create_task(_serve_quietly(server))
    try:
        while not server.started:
            if serving.done():
                raise UnavailableError("cannot listen: is another server using the gateway port?")
            await asyncio.sleep(0.02)
        yield
        await asyncio.wait({serving})  # being cancelled here must not cancel the orderly end below
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)


async def _serve_quietly(server: uvicorn.Server) -> None:
    # uvicorn leaves through sys.exit when the port is taken; inside a task that would end the loop unexplained.
    with contextlib.suppress(SystemExit):
        await server.serve()


async def _watch(files: FleetFiles, upstream: Upstream) -> None:
    """Follow the SuperLink when it comes back at another address."""
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        with contextlib.suppress(ConfigError):  # being written for the first time
            upstream.address = read_superlink_address(files)


def main(arguments: list[str]) -> int:
    """Run until stopped; return the exit code: 0 stopped, 1 refused or failed, 2 usage."""
    if len(arguments) != 1:
        print("usage: python -m share_server.fleet.gateway DIR", file=sys.stderr)
        return 2
    log.start_logging()
    for chatty in ("httpx", "uvicorn"):  # a line for each poll of each node
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        layout = Layout(Path(arguments[0]).resolve())
        config = read_config(layout.config)
        with contextlib.closing(HubLink(layout, config)) as link:
            asyncio.run(serve(layout, config, link.list_nodes))
    except FedshareError as error:
        log.failure("gateway failed", error)
        return 1
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has stopped in order
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
