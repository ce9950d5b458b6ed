"""Payloads are parsed in processes of their own: what they do to those does not touch the hub."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch

from share_core.errors import FedshareError, HeaderError, ParserError, UnavailableError
from share_core.lifeline import children
from share_core.types import SpaceSpec, Update
from share_core.wire import PayloadSplit, UpdateFacts, encode_update
from share_proto.v1 import hub_pb2_grpc
from share_server.config import LimitConfig
from share_server.hub.gate import answers, worker
from share_server.hub.gate.nursery import Nursery
from share_server.hub.gate.parsers import Parsers
from share_server.hub.metrics import Metrics
from share_server.local import LocalHub, submit_header, submit_messages
from share_server.operator import named_error
from share_server.store.blobs import BlobStore
from share_server.store.store import Store

Hub = hub_pb2_grpc.HubStub

SCRIPT = """
import os, sys, time
from share_core.wire import UpdateFacts
from share_server.hub import __main__
from share_server.hub.gate import nursery, worker

honest = worker.examine_update

def spin(payload, spec):
    while True:
        pass

def eat(payload, spec):
    bytearray(1 << 30)

def die(payload, spec):
    os.kill(os.getpid(), 9)

def lie(payload, spec):
    facts = honest(payload, spec)
    return UpdateFacts(-5, facts.cores, facts.split)

def examine(payload, spec):
    start = payload[0:4096]
    for deed in (spin, eat, die, lie):
        if b"head/" + deed.__name__.encode() in start:
            deed(payload, spec)
            return lie(payload, spec)
    return honest(payload, spec)

worker.examine_update = examine
PLANTED
sys.exit(__main__.main(sys.argv[1:]))
"""
"""A hub whose parsers do what the name of a head says: the reader has no bug that could be used here."""

TIGHT = LimitConfig(parsers=2, parser_memory_bytes=64 * 2**20, parser_cpu_s=1.0, parser_wall_s=120.0)


def deed(name: str) -> bytes:
    """Return a payload over which a parser of :data:`SCRIPT` does something."""
    return encode_update(Update(0, {}, {name: torch.zeros(3)}))


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def parsers_of(hub: LocalHub) -> tuple[int, list[int]]:
    """Return (the nursery, its parsers)."""
    (nursery,) = children(hub.pid)
    return nursery, children(nursery)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def make_hub(folder: Path, spec: SpaceSpec, limits: LimitConfig, planted: str = "") -> LocalHub:
    folder.mkdir(exist_ok=True)
    script = folder / "hub.py"
    script.write_text(SCRIPT.replace("PLANTED", planted))
    return LocalHub(folder / "server", spec, limits, script=script)


@pytest.fixture(scope="module")
def odd_hub(tmp_path_factory: pytest.TempPathFactory, toy_spec: SpaceSpec) -> Iterator[LocalHub]:
    hub = make_hub(tmp_path_factory.mktemp("odd"), toy_spec, TIGHT)
    hub.start()
    yield hub
    assert hub.stop() == 0


@pytest.fixture(scope="module")
def alice(odd_hub: LocalHub) -> Iterator[Hub]:
    with odd_hub.hub(odd_hub.enrol("acme/alice")) as stub:
        yield stub


def submit(stub: Hub, spec: SpaceSpec, payload: bytes) -> FedshareError | None:
    """Return the refusal, if it is one."""
    try:
        stub.Submit(submit_messages(submit_header(spec, "acme/task", payload), payload), timeout=200)
    except grpc.RpcError as error:
        return named_error(error, "hub")
    return None


@pytest.mark.parametrize(
    ("name", "words", "lost", "reason"),
    [
        ("eat", "more memory", 0, ""),
        ("spin", "more time", 1, "SIGXCPU"),
        ("die", "ended 2 parsers", 2, "SIGKILL"),
        ("lie", "ended 2 parsers", 2, "bad answer"),
    ],
)
def test_an_update_that_ends_its_parser_is_refused_and_the_hub_serves(
    odd_hub: LocalHub,
    alice: Hub,
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
    name: str,
    words: str,
    lost: int,
    reason: str,
) -> None:
    before, log = set(parsers_of(odd_hub)[1]), odd_hub.log_file.read_text()
    error = submit(alice, toy_spec, deed(name))
    assert isinstance(error, ParserError)
    assert words in str(error)
    after = set(parsers_of(odd_hub)[1])
    assert (len(after), len(after - before)) == (2, lost)
    lines = [json.loads(line) for line in odd_hub.log_file.read_text()[len(log) :].splitlines()]
    found = [line for line in lines if line["event"] == "a parser was lost"]
    assert len(found) == lost
    assert all(reason in line["reason"] for line in found)
    assert submit(alice, toy_spec, make_payload(1)) is None
    listed = odd_hub.layout.store.joinpath("staging").iterdir()
    assert not list(listed), "nothing is kept of what could end a parser"


def test_a_parser_holds_nothing(odd_hub: LocalHub) -> None:
    nursery, parsers = parsers_of(odd_hub)
    assert len(parsers) == 2
    for pid in parsers:
        files = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        sockets = [name for name in files if name.startswith("socket:")]
        assert len(sockets) == 1
        assert files - set(sockets) <= {str(Path(f"/proc/{odd_hub.pid}/fd/{n}").readlink()) for n in (0, 1, 2)}
        limits = Path(f"/proc/{pid}/limits").read_text()
        for name in ("Max core file size", "Max file size", "Max processes"):
            (line,) = [one for one in limits.splitlines() if one.startswith(name)]
            assert line[len(name) :].split()[:2] == ["0", "0"]
        for name in ("Max address space", "Max data size"):
            (line,) = [one for one in limits.splitlines() if one.startswith(name)]
            assert "unlimited" not in line
    assert {alive(pid) for pid in (nursery, *parsers)} == {True}


@pytest.mark.parametrize(("planted", "survives"), [("", False), ("nursery.arm = lambda parent: None", True)])
def test_a_killed_hub_leaves_no_parser_behind(
    tmp_path: Path, toy_spec: SpaceSpec, planted: str, survives: bool
) -> None:
    """Not even one that is busy and does not listen; the planted bug is a nursery that does not tie them."""
    hub = make_hub(tmp_path / "hub", toy_spec, LimitConfig(parsers=1, parser_cpu_s=600.0, parser_wall_s=600.0), planted)
    hub.start()
    nursery, (busy,) = parsers_of(hub)
    try:
        with hub.hub(hub.enrol("acme/alice")) as stub:
            payload = deed("spin")
            call = stub.Submit.future(submit_messages(submit_header(toy_spec, "acme/task", payload), payload))
            used = Path(f"/proc/{busy}/stat")
            begun = used.read_text().split()[13]
            assert until(lambda: int(used.read_text().split()[13]) > int(begun) + 20), "the parser was never busy"
            hub.kill()
            call.exception()
        assert until(lambda: not alive(nursery))
        assert until(lambda: not alive(busy), 1.0 if survives else 30.0) is not survives
    finally:
        for pid in (nursery, busy):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_hub_whose_nursery_is_gone_ends_to_be_started_again(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    hub.start()
    nursery, parsers = parsers_of(hub)
    os.kill(nursery, signal.SIGKILL)
    assert hub.wait() == 1
    assert '"parsers_gone": true' in hub.log_file.read_text()
    assert until(lambda: not any(alive(pid) for pid in parsers))


def test_a_hub_with_protobuf_in_python_does_not_start(new_hub: Callable[..., LocalHub]) -> None:
    hub = new_hub()
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    command = [sys.executable, "-W", "ignore", "-m", "share_server.hub", str(hub.layout.root)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "without its native parser" in ended.stderr


class SilentNursery:
    """Makes parsers that are no processes and never say anything; what is needed of a nursery and nothing else."""

    def __init__(self) -> None:
        self.buried: list[int] = []
        self.ends: list[socket.socket] = []

    def parser(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        return len(self.ends), ours

    def bury(self, pid: int) -> str:
        self.buried.append(pid)
        return "SIGKILL"


def test_a_parser_that_does_not_answer_in_time_is_replaced_and_the_sender_may_come_again(
    run_engine: Callable[..., None], tmp_path: Path, toy_spec: SpaceSpec
) -> None:
    """On a busy machine that is nobody's fault."""

    async def work(engine: Any) -> None:
        store: Store = engine.store
        nursery, metrics = SilentNursery(), Metrics()
        limits = LimitConfig(parsers=1, parser_wall_s=0.05)
        parsers = Parsers(cast(Nursery, nursery), store, toy_spec, limits, metrics)
        staged = store.blobs.stage()
        staged.write(b"payload")
        for lost in (1, 2):
            with pytest.raises(UnavailableError, match="send it again later"):
                await parsers.examine(staged)
            assert nursery.buried == list(range(1, lost + 1))
            assert metrics.registry.get_sample_value("fedshare_parsers_lost_total") == lost
        staged.discard()
        with pytest.raises(UnavailableError, match="given up"):
            await parsers.examine(staged)
        assert nursery.buried == [1, 2], "a payload that is gone is not the fault of a parser"
        await parsers.close()
        for end in nursery.ends:
            end.close()

    run_engine(tmp_path / "store", work)


FACTS = UpdateFacts(3, {"a": (4, 5)}, PayloadSplit(1, 2, 3, 4))


def test_answers_arrive_as_they_were_given(toy_spec: SpaceSpec) -> None:
    assert answers.read_answer(answers.acceptance(FACTS), toy_spec, 10) == FACTS
    with pytest.raises(HeaderError, match="the header lies"):
        answers.read_answer(answers.refusal("HeaderError", "the header lies"), toy_spec, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"base": -1},
        {"base": True},
        {"base": 1 << 62},
        {"base": None},
        {"split": [1, 2, 3]},
        {"split": [1, 2, 3, 5]},
        {"split": [1, 2, 8, -1]},
        {"split": None},
        {"cores": {"nope": [4, 5]}},
        {"cores": {"a": [4]}},
        {"cores": {"a": [4, "5"]}},
        {"cores": {"a": [4, -5]}},
        {"cores": None},
        {"error": "StorageError", "text": "the disk is full"},
        {"error": "SystemExit", "text": ""},
        {"error": ["HeaderError"], "text": ""},
        {"error": "HeaderError", "text": None},
    ],
    ids=str,
)
def test_what_no_honest_parser_says_is_not_believed(toy_spec: SpaceSpec, change: dict[str, Any]) -> None:
    said = json.loads(answers.acceptance(FACTS)) | change
    with pytest.raises(answers.BadAnswer):
        answers.read_answer(json.dumps(said).encode(), toy_spec, 10)


@pytest.mark.parametrize("frame", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000])
def test_an_answer_that_is_no_object_is_not_believed(toy_spec: SpaceSpec, frame: bytes) -> None:
    with pytest.raises(answers.BadAnswer):
        answers.read_answer(frame, toy_spec, 10)


def test_frames_are_bounded_and_end_with_the_other_side() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        answers.write_frame(theirs, b"x" * 1000)
        assert answers.read_frame(ours) == b"x" * 1000
        theirs.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(answers.BadAnswer, match="longer"):
            answers.read_frame(ours)
        theirs.sendall(b"\x00\x00\x00\x05ab")
        theirs.close()
        assert answers.read_frame(ours) is None


def test_a_file_is_read_in_slices_and_its_end_is_noticed(tmp_path: Path, toy_spec: SpaceSpec) -> None:
    path = tmp_path / "payload"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with path.open("rb") as file:
        source = worker.FileBytes(file.fileno(), 10)
        assert (len(source), source[2:5], source[8:99], source[5:5]) == (10, b"\0\0\0", b"{}", b"")
        with pytest.raises(worker.Missing):
            worker.FileBytes(file.fileno(), 11)[8:11]
        # A file that another connection has begun anew, while a parser was looking at it.
        with pytest.raises(UnavailableError, match="given up"):
            answers.read_answer(worker.look(file.fileno(), 1000, toy_spec), toy_spec, 1000)


def test_a_staged_payload_is_read_through_a_descriptor_that_cannot_write(tmp_path: Path) -> None:
    staged = BlobStore(tmp_path / "store").stage()
    staged.write(b"payload")
    file = staged.reader()
    try:
        assert os.pread(file, 100, 0) == b"payload"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(file, b"x")
    finally:
        os.close(file)
        staged.discard()
