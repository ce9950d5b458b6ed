"""``share-sim chaos bombs``: small things that want to become large; each is refused quickly and costs no memory.

Every bomb is thrown several times at a real hub over mutual TLS. What counts is the time from its last byte to its
refusal (from the call, where it is refused before that) and by how much the hub and its parsers together grew at their
peak. After each the hub must say SERVING and, in the end, take and merge an honest update.

What is compressed is so before the clock runs, and sent over a connection of its own (:mod:`.bare`).

A message above gRPC's limit is refused by gRPC before any of our code runs, and the caller learns it 0.1 to 1 s later,
from a bare ``grpc.aio`` server without TLS as well (grpcio 1.85.1). Its time is told and not held against the hub.
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from share_core.errors import ERROR_KEY, ConfigError, UnavailableError
from share_core.lifeline import children
from share_core.types import Space, SpaceSpec, Update
from share_core.wire import UPDATE, encode_update, update_limits
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.hub.options import MESSAGE_BYTES
from share_server.local import LocalHub, sign_header, submit_header, submit_messages
from share_simulations.bench.machine import describe, pick_device
from share_simulations.bench.stats import rss_mib
from share_simulations.chaos import bare
from share_simulations.chaos.bombs_planted import BUGS, write_hub
from share_simulations.chaos.bombs_stand import CALL_S, SUBMIT, Refused, Stand, at_stand
from share_simulations.chaos.load import toy_space, toy_update
from share_simulations.chaos.show import Meter
from share_simulations.interrupts import reporting

MOST_MS = 100.0
"""A bomb must be refused within this time."""
MOST_MIB = 16.0
"""Hub and parsers together may grow by so much over one bomb."""

_MIB = 2**20
_DESCRIBE = "/share_proto.v1.Hub/DescribeSpace"
_REPORT = "/share_proto.v1.Hub/ReportEvaluation"


@dataclass(frozen=True)
class BombOptions:
    """One campaign."""

    throws: int = 5
    """How often each bomb is thrown and counted; the worst counts."""
    warm_up: int = 1
    """Throws before that, which are not counted."""
    only: tuple[str, ...] = ()
    """Names of bombs; none means all."""
    timed: bool = True
    """Whether time and memory are held against the hub, or only what it says."""
    mutants: bool = False
    """Whether the planted bugs are tried as well."""
    directory: Path | None = None
    """Where the server directory is made; None: the system's place for temporary files."""


@dataclass(frozen=True)
class Bomb:
    """Something that wants to become large."""

    what: str
    """In words."""
    throw: Callable[[Stand], None]
    """Throws it; returns when it was accepted, raises RpcError or Refused when it was refused."""
    errors: tuple[str, ...]
    """What it may be refused as: class of the hub's error, or gRPC's own status."""
    by_grpc: bool = False
    """Whether gRPC refuses it by itself and in its own time; then only the memory counts."""


@dataclass
class Throw:
    """What one bomb did."""

    error: str = ""
    """As what it was refused; empty: it was accepted."""
    ms: float = 0.0
    growth_mib: float = 0.0
    serving: bool = True


def _file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _tensors(*entries: bytes) -> bytes:
    inner = json.dumps({"base_version": 0, "format": UPDATE})
    metadata = b'"__metadata__":' + json.dumps({"fedshare": inner}).encode()
    return b"{" + b",".join((metadata, *entries)) + b"}"


def _entry(name: str, shape: str, size: int, begin: int = 0) -> bytes:
    return f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{begin + size}]}}'.encode()


def _nested(depth: int) -> bytes:
    """Return groups in groups, which a message may hold as fields that it does not know."""
    return b"\x7b" * depth + b"\x7c" * depth


def _length_delimited(field: int, data: bytes) -> bytes:
    number, length = len(data), bytearray()
    while number > 0x7F:
        length.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([field << 3 | 2]) + bytes(length) + bytes([number]) + data


@cache
def compressed_zeros() -> bytes:
    """Return the message of the compressed bombs, which is made once, before it is thrown."""
    return bare.framed(_ZEROS, compress=True)


def _full_header(stand: Stand, text: bytes, piece: bytes) -> bytes:
    """Return a header as long as one may be: ``text``, then ``piece`` again and again, then the end."""
    most = update_limits(stand.spec).header_bytes
    return text + piece * ((most - len(text) - 8) // len(piece)) + piece[:-1] + b"]}"


def _rank_bomb(stand: Stand) -> bytes:
    rows, columns = next((site.d_out, site.d_in) for site in stand.spec.sites.values())
    name, rank = next(iter(stand.spec.sites)), 4096
    b, a = 4 * rows * rank, 4 * rank * columns
    return _file(
        _tensors(_entry(f"B/{name}", f"[{rows},{rank}]", b), _entry(f"A/{name}", f"[{rank},{columns}]", a, b)),
        bytes(a + b),
    )


def _many_tensors(count: int) -> bytes:
    return _file(_tensors(*(_entry(f"head/{n}", "[1]", 4, 4 * n) for n in range(count))), bytes(4 * count))


_PAYLOAD = ("HeaderError", "TensorShapeError", "TensorTypeError", "TensorNameError")
_ZEROS = bytes(20 * _MIB)  # five times the limit, and more than may be grown by
_EMPTY_PARTS = b"\x0a\x00" * 1_000_000

BOMBS: Mapping[str, Bomb] = {
    "gzip": Bomb(
        "20 MiB of zeros in a compressed request",
        lambda stand: stand.compressed(_DESCRIBE, compressed_zeros()),
        ("UNIMPLEMENTED", "RESOURCE_EXHAUSTED"),
    ),
    "gzip upload": Bomb(
        "20 MiB of zeros as one compressed message of an upload",
        lambda stand: stand.compressed(SUBMIT, compressed_zeros()),
        ("UNIMPLEMENTED", "RESOURCE_EXHAUSTED"),
    ),
    "large message": Bomb(
        "a message just above the limit",
        lambda stand: stand.raw(_DESCRIBE, bytes(MESSAGE_BYTES + 2**16)),
        ("RESOURCE_EXHAUSTED",),
        by_grpc=True,
    ),
    "million submessages": Bomb(
        "a million empty submessages in one request", lambda stand: stand.raw(_REPORT, _EMPTY_PARTS), ("RequestError",)
    ),
    "million names": Bomb(
        "a million empty names in the header of an upload",
        lambda stand: stand.stream(_length_delimited(1, _length_delimited(9, b"\x12\x00" * 1_000_000))),
        ("RequestError",),
    ),
    "message nested 100,000 deep": Bomb(
        "groups in groups in a request", lambda stand: stand.raw(_DESCRIBE, _nested(100_000)), ("RequestError",)
    ),
    "header nested 30,000 deep": Bomb(
        "groups in groups in the header of an upload", lambda stand: stand.stream(_nested(30_000)), ("RequestError",)
    ),
    "payload of 100 MB": Bomb(
        "an announced payload of 100 MB", lambda stand: stand.announce(100_000_000), ("PayloadTooLargeError",)
    ),
    "payload of 2^62": Bomb(
        "an announced payload of 2^62", lambda stand: stand.announce(1 << 62), ("PayloadTooLargeError",)
    ),
    "header of 100 MB": Bomb(
        "a file that says its header has 100 MB",
        lambda stand: stand.payload(_file(b"{}", length=100_000_000)),
        ("HeaderError",),
    ),
    "header of 2^63": Bomb(
        "a file that says its header has 2^63 bytes",
        lambda stand: stand.payload(_file(b"{}", length=1 << 63)),
        ("HeaderError",),
    ),
    "large header": Bomb(
        "a header of 1 MiB of blanks", lambda stand: stand.payload(_file(b"{" + b" " * _MIB + b"}")), ("HeaderError",)
    ),
    "json of objects": Bomb(
        "the longest header, all empty objects",
        lambda stand: stand.payload(_file(_full_header(stand, b'{"a":[', b"{},"))),
        ("HeaderError",),
    ),
    "json of keys": Bomb(
        "a header of 6,000 keys, the last one twice",
        lambda stand: stand.payload(_file(b"{" + b",".join(b'"%x":1' % n for n in [*range(6000), 5999]) + b"}")),
        ("HeaderError",),
    ),
    "json nested 30,000 deep": Bomb(
        "arrays in arrays in a header", lambda stand: stand.payload(_file(b'{"a":' + b"[" * 30_000)), ("HeaderError",)
    ),
    "number of 50,000 digits": Bomb(
        "one number in a header", lambda stand: stand.payload(_file(b'{"a":' + b"9" * 50_000 + b"}")), ("HeaderError",)
    ),
    "100,000 tensors": Bomb(
        "a file of 100,000 tensors, 8 MB", lambda stand: stand.payload(_many_tensors(100_000)), ("HeaderError",)
    ),
    "shape by zero": Bomb(
        "a tensor of shape [2^61, 0]",
        lambda stand: stand.payload(_file(_tensors(_entry("head/x", f"[{1 << 61},0]", 0)))),
        ("TensorShapeError",),
    ),
    "shape of 2^60": Bomb(
        "a tensor of shape [2^60]",
        lambda stand: stand.payload(_file(_tensors(_entry("head/x", f"[{1 << 60}]", 1 << 62)))),
        _PAYLOAD,
    ),
    "10,000 dimensions": Bomb(
        "a tensor of 10,000 dimensions",
        lambda stand: stand.payload(_file(_tensors(_entry("head/x", "[" + "1," * 9_999 + "1]", 4)), bytes(4))),
        ("TensorShapeError",),
    ),
    "rank of 4,096": Bomb(
        "factors of rank 4,096", lambda stand: stand.payload(_rank_bomb(stand)), ("TensorShapeError",)
    ),
    "values that overflow": Bomb(
        "a head of values whose squares are infinite",
        lambda stand: stand.payload(_file(_tensors(_entry("head/x", "[64]", 256)), b"\xff\xff\x7f\x7f" * 64)),
        ("NonFiniteError",),
    ),
}
"""Every bomb by name."""


def run_bombs(options: BombOptions) -> dict[str, Any]:
    """Run the campaign and return its report; its key ``ok`` says whether every bomb was refused as it should be.

    Raises:
        ConfigError: a bomb that was asked for is not known.
        Interrupted: with the report of what was reached.
    """
    unknown = sorted(set(options.only) - set(BOMBS))
    if unknown or options.throws < 1:
        raise ConfigError(f"there is no bomb {', '.join(unknown)}: choose from {', '.join(BOMBS)}, at least one throw")
    began = time.monotonic()
    thrown: dict[str, Throw] = {}
    problems: list[str] = []
    caught: dict[str, list[str]] = {}

    def report() -> dict[str, Any]:
        return _report(options, thrown, problems, caught, began)

    with reporting(report), Meter("chaos bombs") as meter:
        problems += campaign(options, thrown, meter)
        for bug in BUGS if options.mutants else ():
            caught[bug] = catch(options, bug, meter)
        return report()


def catch(options: BombOptions, bug: str, meter: Meter) -> list[str]:
    """Return what the bombs that are meant for a planted bug hold against the hub that has it."""
    planted = BUGS[bug]
    own = BombOptions(options.throws, options.warm_up, planted.bombs, timed=True, directory=options.directory)
    problems = campaign(own, {}, meter, bug)
    meter.note(f"planted bug {bug}: {'caught: ' + problems[0] if problems else 'NOT CAUGHT'}")
    return problems


def campaign(options: BombOptions, thrown: dict[str, Throw], meter: Meter, bug: str | None = None) -> list[str]:
    """Throw bombs at one hub, note the worst of each in ``thrown``, and return the broken promises."""
    with tempfile.TemporaryDirectory(prefix="fedshare-bombs-", dir=options.directory) as folder:
        script = None if bug is None else write_hub(bug, Path(folder))
        server = LocalHub(Path(folder) / "server", toy_space(), script=script)
        try:
            server.start()
            return list(_throw_all(server, options, thrown, meter))
        finally:
            if server.running:
                server.kill()


def _throw_all(server: LocalHub, options: BombOptions, thrown: dict[str, Throw], meter: Meter) -> Iterator[str]:
    holder = server.enrol("acme/bomber")
    with at_stand(server, holder) as stand:
        _honest(stand, 1)
        for name in options.only or BOMBS:
            meter.show(name)
            throws = [throw(server, stand, BOMBS[name]) for _ in range(options.warm_up + options.throws)]
            counted = throws[options.warm_up :]
            thrown[name] = Throw(
                error=" or ".join(sorted({one.error or "accepted" for one in throws})),
                ms=max(one.ms for one in counted),
                growth_mib=max(one.growth_mib for one in counted),
                serving=all(one.serving for one in throws),
            )
            yield from problems_of(name, thrown[name], options)
            if not thrown[name].serving:
                return
        try:
            _honest(stand, 2)
        except grpc.RpcError as error:
            yield f"an honest update was refused after all that: {error}"
    if server.stop() != 0:
        yield "the hub did not end cleanly when it was asked to stop"


def throw(server: LocalHub, stand: Stand, bomb: Bomb) -> Throw:
    """Throw one bomb and return what it did."""
    done = Throw()
    with _Peak(server) as peak:
        try:
            bomb.throw(stand)
        except Refused as error:
            done.error = str(error)
        except grpc.RpcError as error:
            done.error = _name(error)
        done.ms = 1000 * (time.monotonic() - stand.since)
    done.growth_mib = peak.growth_mib
    try:
        health = health_pb2_grpc.HealthStub(stand.channel).Check(health_pb2.HealthCheckRequest(), timeout=10.0)
        done.serving = health.status == health_pb2.HealthCheckResponse.SERVING
    except grpc.RpcError:
        done.serving = False
    return done


def problems_of(name: str, worst: Throw, options: BombOptions) -> Iterator[str]:
    """Yield what a bomb holds against the hub."""
    if not set(worst.error.split(" or ")) <= set(BOMBS[name].errors):
        yield f"{name}: expected {' or '.join(BOMBS[name].errors)}, got {worst.error}"
    if not worst.serving:
        yield f"{name}: the hub does not serve after it"
    if options.timed and worst.ms > MOST_MS and not BOMBS[name].by_grpc:
        yield f"{name}: refused after {worst.ms:.0f} ms, at most {MOST_MS:g} are allowed"
    if options.timed and worst.growth_mib > MOST_MIB:
        yield f"{name}: hub and parsers grew by {worst.growth_mib:.1f} MiB, at most {MOST_MIB:g} are allowed"


def _honest(stand: Stand, seed: int) -> None:
    update = toy_update(stand.spec, _empty(stand.spec), seed)
    payload = encode_update(Update(0, update.sites))
    header = sign_header(submit_header(stand.spec, f"acme/honest{seed}", payload), stand.holder)
    stub = hub_pb2_grpc.HubStub(stand.channel)
    stub.Submit(submit_messages(header, payload), timeout=CALL_S)
    end = time.monotonic() + CALL_S
    while time.monotonic() < end:
        record = stub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=header.update_id), timeout=CALL_S).update
        if record.state == hub_pb2.UPDATE_STATE_MERGED:
            return
        time.sleep(0.02)
    raise UnavailableError("an honest update was not merged")


def _empty(spec: SpaceSpec) -> Space:
    from share_core.space import empty_space

    return empty_space(spec)


def _name(error: grpc.RpcError) -> str:
    """Return the hub's name of a refusal, or gRPC's own."""
    assert isinstance(error, grpc.Call)
    named = [value for key, value in error.trailing_metadata() or () if key == ERROR_KEY]
    return str(named[0]) if named else error.code().name


class _Peak:
    """How much the hub, its nursery and its parsers grew while the block ran, all peaks added up."""

    def __init__(self, server: LocalHub) -> None:
        nurseries = children(server.pid)
        self._pids = [server.pid, *nurseries, *(pid for nursery in nurseries for pid in children(nursery))]
        self.growth_mib = 0.0

    def __enter__(self) -> _Peak:
        for pid in self._pids:
            with suppress(OSError):  # it ended over an earlier bomb, which shows otherwise
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew at what there is now
        self._before = {pid: rss_mib(pid) for pid in self._pids}
        return self

    def __exit__(self, *_: object) -> None:
        self.growth_mib = sum(max(0.0, _peak_mib(pid) - before) for pid, before in self._before.items())


def _peak_mib(pid: int) -> float:
    """Return the largest resident memory of a process since its peak was begun anew; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def _report(
    options: BombOptions, thrown: dict[str, Throw], problems: list[str], caught: dict[str, list[str]], began: float
) -> dict[str, Any]:
    surviving = [bug for bug, signs in caught.items() if not signs]
    return {
        "campaign": "bombs",
        "bombs": len(thrown),
        "throws": options.throws,
        "refused": sum("accepted" not in worst.error for worst in thrown.values()),
        "serving_after": sum(worst.serving for worst in thrown.values()),
        "worst_ms": round(max((one.ms for name, one in thrown.items() if not BOMBS[name].by_grpc), default=0.0), 1),
        "worst_growth_mib": round(max((worst.growth_mib for worst in thrown.values()), default=0.0), 2),
        "most_ms": MOST_MS,
        "most_mib": MOST_MIB,
        "by_name": {
            name: {
                "what": BOMBS[name].what,
                "refused_as": worst.error,
                "by_grpc": BOMBS[name].by_grpc,
                "worst_ms": round(worst.ms, 1),
                "worst_growth_mib": round(worst.growth_mib, 2),
            }
            for name, worst in thrown.items()
        },
        "mutants": len(caught),
        "mutants_caught": len(caught) - len(surviving),
        "mutants_by_name": {bug: signs[:1] for bug, signs in caught.items()},
        "surviving": surviving,
        "problems": problems[:20],
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe(pick_device("cpu")),
        "complete": True,
        "ok": not problems and not surviving,
    }
