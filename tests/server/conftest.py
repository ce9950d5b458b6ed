"""Real hubs for the tests of the server."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import torch
from grpc import aio

from share_core.fingerprint import describe_space
from share_core.identity import Identity, make_authority, make_signer
from share_core.types import Core, Factors, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.config import ServerConfig
from share_server.hub.engine import Engine
from share_server.local import Holder, LocalHub, new_update
from share_server.operator import CHANNEL_OPTIONS
from share_server.store.store import Store
from share_server.store.updates import accept_update


@pytest.fixture(scope="session")
def toy_spec() -> SpaceSpec:
    """Two small sites; five to six adapters of rank 2 fill it, then it compacts."""
    draw = torch.Generator().manual_seed(7)
    weights = {"a": torch.randn(24, 16, generator=draw), "b": torch.randn(16, 16, generator=draw)}
    return describe_space("toy", weights, k_max=12, rank_limit=8)


@pytest.fixture(scope="session")
def make_payload(toy_spec: SpaceSpec) -> Callable[..., bytes]:
    """Return a function (seed, space=None) -> payload: free LoRA, or cores plus one direction in a given version."""

    def make(seed: int, space: Space | None = None) -> bytes:
        draw = torch.Generator().manual_seed(seed)
        sites: dict[str, SiteUpdate] = {}
        for name, site in toy_spec.sites.items():
            residual = Factors(torch.randn(site.d_out, 2, generator=draw), torch.randn(site.d_in, 2, generator=draw))
            core = None
            if space is not None and space.bases[name].k_out and space.bases[name].k_in:
                basis = space.bases[name]
                core = Core(torch.randn(basis.k_out, 2, generator=draw), torch.randn(basis.k_in, 2, generator=draw))
            sites[name] = SiteUpdate(core=core, residual=residual)
        return encode_update(Update(base_version=0 if space is None else space.version, sites=sites))

    return make


@pytest.fixture(scope="session")
def wide_spec() -> SpaceSpec:
    """One site whose bases are a few megabytes.

    Buffers cannot hide a reader that does not read, and a chain of steps soon is larger than a whole version.
    """
    return describe_space("wide", {"w": torch.zeros(40_000, 8)}, k_max=8, rank_limit=8)


@pytest.fixture(scope="session")
def wide_payload(wide_spec: SpaceSpec) -> Callable[[int], bytes]:
    """Return a function (seed) -> payload of rank 8 for the wide space."""

    def make(seed: int) -> bytes:
        draw = torch.Generator().manual_seed(seed)
        site = wide_spec.sites["w"]
        factors = Factors(torch.randn(site.d_out, 8, generator=draw), torch.randn(site.d_in, 8, generator=draw))
        return encode_update(Update(0, {"w": SiteUpdate(residual=factors)}))

    return make


async def stalled(
    address: str,
    authority: bytes,
    holder: Holder,
    space_id: str,
    said: Callable[[], str],
    meanwhile: Callable[[], object],
) -> None:
    """Ask a hub or relay for a whole version, take one message, and nothing more until it ends the stream.

    Args:
        address: the listener.
        authority: who has signed its certificate.
        holder: who asks.
        space_id: the space; its versions must be larger than what connections buffer.
        said: returns the log of the process.
        meanwhile: called again and again until the stream was cut.
    """
    credentials = grpc.ssl_channel_credentials(authority, holder.key, holder.certificate)
    window = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with aio.secure_channel(address, credentials, [*CHANNEL_OPTIONS, *window]) as channel:
        request = hub_pb2.FetchSnapshotRequest(space_id=space_id)
        stream = hub_pb2_grpc.HubStub(channel).FetchSnapshot(request, timeout=120)
        first: Any = await stream.read()
        assert first.header.payload_size > 1_000_000
        end = time.monotonic() + 60
        while "nothing was read" not in said():
            assert time.monotonic() < end, "the reader was never cut"
            await asyncio.sleep(0.1)
            meanwhile()
        with pytest.raises(aio.AioRpcError) as caught:
            while await stream.read() is not aio.EOF:
                pass
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "read faster" in (caught.value.details() or "")


@pytest.fixture(scope="session")
def stall() -> Callable[..., None]:
    """Return :func:`stalled` as a function that returns when the reader was cut."""

    def run(
        address: str,
        authority: bytes,
        holder: Holder,
        space_id: str,
        said: Callable[[], str],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        asyncio.run(stalled(address, authority, holder, space_id, said, meanwhile))

    return run


@pytest.fixture(scope="session")
def signing_key() -> bytes:
    """A key to sign versions with."""
    now = datetime.now(UTC)
    return make_signer(*make_authority("test", now), Identity("signer", "server", "hub"), now, 1)[1]


@pytest.fixture(scope="session")
def run_engine(toy_spec: SpaceSpec, signing_key: bytes) -> Callable[..., None]:
    """Return a function (directory, work, config=None): it runs ``work`` with an engine on a store of the toy space."""

    def run(root: Path, work: Callable[[Engine], Awaitable[None]], config: ServerConfig | None = None) -> None:
        async def opened() -> None:
            engine = await Engine.open(root, toy_spec, config or ServerConfig(), signing_key)
            try:
                await work(engine)
            finally:
                await engine.close()

        asyncio.run(opened())

    return run


@pytest.fixture(scope="session")
def accept() -> Callable[[Store, bytes], Awaitable[None]]:
    """Return a function (store, payload): it takes an update of Alice's one task as the hub does, up to its receipt."""

    async def run(store: Store, payload: bytes) -> None:
        await store.io(lambda: store.blobs.put(payload))
        new = new_update(payload, "acme/alice", "acme/task")
        await store.do(lambda journal: accept_update(journal, new, 1))

    return run


@pytest.fixture(scope="session")
def certificates() -> ModuleType:
    """The module with every kind of certificate: test modules cannot import each other."""
    path = Path(__file__).with_name("certificate_kinds.py")
    loaded = importlib.util.spec_from_file_location("tests_server_certificate_kinds", path)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    sys.modules[loaded.name] = module
    loaded.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stranger_kinds(certificates: Any) -> Callable[[LocalHub], dict[str, Any]]:
    """Return a function (running hub) -> kind -> what strangers show who want to be taken for its ``acme/alice``."""

    def make(hub: LocalHub) -> dict[str, Any]:
        def pair(holder: Holder) -> Any:
            return certificates.Pair(holder.key, holder.certificate)

        layout = hub.layout
        gone = hub.enrol("acme/gone")
        with hub.hub(hub.own("operator")) as stub:
            stub.Revoke(hub_pb2.RevokeRequest(member="acme/gone"), timeout=20)
        replaced, enrolled = hub.enrol("acme/alice"), hub.enrol("acme/alice")
        federation = certificates.Federation(
            authority=certificates.Pair(layout.ca_key.read_bytes(), layout.ca_cert.read_bytes()),
            member=Identity("trainer", "acme", "alice"),
            enrolled=pair(enrolled),
            replaced=pair(replaced),
            revoked=pair(gone),
            listener=pair(hub.own("server")),
            signer=certificates.Pair(layout.signing_key.read_bytes(), layout.signing_certificate.read_bytes()),
        )
        return {"good": pair(enrolled), **certificates.stranger_kinds(federation)}

    return make


@pytest.fixture
def new_hub(tmp_path: Path, toy_spec: SpaceSpec) -> Iterator[Callable[..., LocalHub]]:
    """Return a function that makes a hub directory, of the toy space or another; what runs at the end is killed."""
    made: list[LocalHub] = []

    def make(spec: SpaceSpec | None = None, **options: object) -> LocalHub:
        root = tmp_path / f"server{len(made)}"
        made.append(LocalHub(root, toy_spec if spec is None else spec, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for hub in made:
        if hub.running:
            hub.kill()


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory: pytest.TempPathFactory, toy_spec: SpaceSpec) -> Iterator[LocalHub]:
    """One running hub for all tests of a module that leave it serving."""
    hub = LocalHub(tmp_path_factory.mktemp("hub") / "server", toy_spec)
    hub.start()
    yield hub
    assert hub.stop() == 0
