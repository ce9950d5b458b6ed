"""The life of a relay: its upstream goes away, its disk is damaged, somebody starts it twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner

from share_core.types import SpaceSpec
from share_server.cli import app
from share_server.local import LocalHub

Steps = list[tuple[bytes, bytes]]


def test_upstream_away_it_serves_what_it_has_and_comes_back(
    new_stand: Callable[..., Any],
    publish: Callable[..., int],
    read_steps: Callable[..., Steps],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
) -> None:
    stand = new_stand([make_payload(number) for number in range(3)], roster_s=15)
    stand.hub.kill()
    with stand.relay.stub(stand.alice) as stub:
        before = read_steps(stub, toy_spec, 3)
    stand.hub.start()
    assert publish(stand.hub, stand.alice, make_payload(9)) == 4
    with stand.relay.stub(stand.alice) as stub:
        after = read_steps(stub, toy_spec, 4)
    assert after[:3] == before


def test_it_starts_from_its_disk_and_drops_what_is_damaged(
    new_stand: Callable[..., Any],
    read_steps: Callable[..., Steps],
    toy_spec: SpaceSpec,
    make_payload: Callable[..., bytes],
) -> None:
    stand = new_stand([make_payload(number) for number in range(4)])
    relay = stand.relay
    with relay.stub(stand.alice) as stub:
        before = read_steps(stub, toy_spec, 4)
    assert relay.stop() == 0
    relay.start()
    assert relay.serving()["version"] == 4
    assert relay.stop() == 0
    path = relay.root / "versions" / "3.step"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    relay.start()
    relay.serving()
    with relay.stub(stand.alice) as stub:
        assert read_steps(stub, toy_spec, 4) == before
    assert '"dropped from disk", "file": "3.step"' in relay.said()


def test_a_second_relay_on_one_directory_or_port_is_refused(
    new_stand: Callable[..., Any], new_relay: Callable[[LocalHub], Any], relay_token: Callable[..., str]
) -> None:
    stand = new_stand()
    again = CliRunner().invoke(app, ["relay", "--dir", str(stand.relay.root)])
    assert again.exit_code == 1
    assert "another relay works on" in again.stderr
    other = new_relay(stand.hub)
    other.address = stand.relay.address
    other.start(relay_token(stand.hub, "acme/other"))
    assert other.wait() == 1
    assert "is another server using the port?" in other.said()
