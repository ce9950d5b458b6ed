"""Logs of the hub: every line is a JSON object, none holds a secret, and a full file is put aside."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from share_core.errors import FedshareError
from share_core.identity import new_private_key_pem
from share_server.local import LocalHub, submit_header, submit_messages

TALKATIVE = """
import sys
from share_server.hub import __main__, enrolment_service, log
honest = enrolment_service.EnrolmentService.Enrol

async def talkative(self, request, context):
    log.info("enrolling", token=request.token)
    return await honest(self, request, context)

enrolment_service.EnrolmentService.Enrol = talkative
sys.exit(__main__.main(sys.argv[1:]))
"""


def _secrets_in_log(hub: LocalHub, make_payload: Callable[..., bytes]) -> list[str]:
    """Use the hub in good and bad ways and return which secrets its log holds; every line must be a JSON object."""
    hub.start()
    token = hub.invite("acme/alice")
    canary = secrets.token_hex(16)
    alice = hub.enrol_with(token, new_private_key_pem())
    for bad in ("fs1." + canary, canary, token[:-4] + "AAAA", token):
        with pytest.raises(FedshareError):
            hub.enrol_with(bad, new_private_key_pem())
    payload = make_payload(1)
    damaged = payload[: -len(canary)] + canary.encode()
    with hub.hub(alice) as stub:
        stub.Submit(submit_messages(submit_header(hub.spec, "acme/t", payload), payload), timeout=30)
        for wrong in (damaged, canary.encode() * 20):
            header = submit_header(hub.spec, "acme/t", wrong)
            try:
                stub.Submit(submit_messages(header, wrong), timeout=30)
            except grpc.RpcError:
                continue
    for port in (hub.config.hub_port, hub.config.enrol_port):
        with socket.create_connection(("127.0.0.1", port), 10) as raw:
            raw.sendall(canary.encode() + b"\r\n\r\n")
            raw.settimeout(10)
            try:
                while raw.recv(1024):
                    pass
            except OSError:
                pass
    assert hub.stop() == 0
    text = hub.log_file.read_text()
    for line in text.splitlines():
        assert isinstance(json.loads(line), dict), line
    assert '"enrolled"' in text
    assert '"refused"' in text
    secret = {
        "token": token.removeprefix("fs1.")[-40:],
        "canary": canary,
        "key": alice.key.decode().splitlines()[1],
        "pem": "PRIVATE KEY",
        "enrolment": hub.layout.enrol_key.read_bytes().hex(),
    }
    return [name for name, words in secret.items() if words in text]


def test_the_log_is_json_and_holds_no_secret(
    new_hub: Callable[..., LocalHub], make_payload: Callable[..., bytes]
) -> None:
    assert _secrets_in_log(new_hub(), make_payload) == []


def test_a_hub_that_writes_tokens_down_is_noticed(
    new_hub: Callable[..., LocalHub], make_payload: Callable[..., bytes], tmp_path: Path
) -> None:
    script = tmp_path / "talkative.py"
    script.write_text(TALKATIVE)
    assert "token" in _secrets_in_log(new_hub(script=script), make_payload)


WRITES_LOG = """
import os
from share_server.hub import log
log.start_logging(4000)
for number in range(500):
    log.info("line", number=number)
    if number % 50 == 0:
        os.write(2, b'{"native": true}\\n')
"""


def test_a_full_log_is_put_aside_and_no_line_is_lost_at_the_seam(tmp_path: Path) -> None:
    path = tmp_path / "hub.log"
    with path.open("ab") as file:
        subprocess.run([sys.executable, "-c", WRITES_LOG], stderr=file, stdout=file, check=True)
    files = [path.with_name(f"hub.log.{number}") for number in range(4, 0, -1)] + [path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    lines = [json.loads(line) for one in files for line in one.read_text().splitlines()]
    numbers = [line["number"] for line in lines if "number" in line]
    assert numbers == list(range(numbers[0], 500))
    assert numbers[0] > 0  # the oldest are gone
    assert any("native" in line for line in lines)
    assert all(3900 < one.stat().st_size < 4200 for one in files[:-1])
    assert path.stat().st_size < 4200


def test_a_log_that_somebody_else_moved_begins_anew_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "hub.log"
    program = WRITES_LOG.replace("for number", f"os.rename({str(path)!r}, {str(path) + '-moved'!r})\nfor number")
    with path.open("ab") as file:
        subprocess.run([sys.executable, "-c", program], stderr=file, check=True)
    assert {one.name for one in tmp_path.iterdir()} == {
        "hub.log",
        "hub.log-moved",
        *(f"hub.log.{n}" for n in range(1, 5)),
    }
    assert (tmp_path / "hub.log-moved").stat().st_size >= 4000
