"""server.toml, the server directory, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from share_core import identity as ids
from share_core.errors import ConfigError
from share_core.spec_file import read_spec, spec_to_toml
from share_core.types import SpaceSpec
from share_server import provision
from share_server.cli import app
from share_server.config import (
    LeaseConfig,
    LimitConfig,
    MergeConfig,
    RetentionConfig,
    ServerConfig,
    config_to_toml,
    join_address,
    listen_address_for,
    read_config,
)
from share_server.layout import Layout
from share_server.local import LocalHub, submit_header, submit_messages
from share_server.provision import create_server, free_ports, renew_certificates

NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.fixture
def space_file(tmp_path: Path, toy_spec: SpaceSpec) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(spec_to_toml(toy_spec))
    return path


def test_a_written_configuration_reads_back_unchanged(tmp_path: Path) -> None:
    config = ServerConfig(
        hosts=("hub.example", "10.0.0.7"),
        listen="0.0.0.0",
        hub_port=9001,
        lease=LeaseConfig(minutes=0.5, max_updates=3),
        limits=LimitConfig(recheck_s=1.5, member_bytes_per_s=1e6),
        retention=RetentionConfig(horizon_versions=7),
        merge=MergeConfig(staleness="hinge", mixing="fedbuff", buffer=4),
        metrics_port=9100,
    )
    path = tmp_path / "server.toml"
    path.write_text(config_to_toml(config))
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub_prt = 1", "unknown key 'hub_prt'"),
        ("[limits]\nmax_payload = 5", "unknown key 'max_payload'"),
        ("hub_port = '7443'", "whole number"),
        ("hub_port = true", "whole number"),
        ("hub_port = 70000", "three ports"),
        ("enrol_port = 7443", "three ports"),
        ("hosts = []", "at least one entry"),
        ("hosts = 'a'", "must be a list"),
        ("listen = ''", "must be text"),
        ("[lease]\nminutes = 0", "greater than zero"),
        ("[lease]\nminutes = -1.5", "greater than zero"),
        ("lease = 3", "must be a table"),
        ("[merge]\nmixing = 'median'", "mixing must be one of mean, fedasync, fedbuff"),
        ("[merge]\nstaleness = 'none'", "staleness must be one of constant"),
        ("[merge]\nalpha = 1.5", "alpha must be at most 1"),
        ("[merge]\nalpha = inf", "alpha must be finite"),
        ("[retention]\nhorizon = 5", "unknown key 'horizon'"),
        ("[limits]\ninflight_bytes = 0", "greater than zero"),
        ("metrics_port = 7444", "port of its own"),
        ("metrics_port = 70000", "port of its own"),
        ("hosts = [", "cannot be read"),
    ],
)
def test_a_configuration_that_cannot_work_names_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_addresses() -> None:
    assert join_address("::1", 5) == "[::1]:5"
    assert join_address("hub.example", 5) == "hub.example:5"
    assert listen_address_for(("localhost", "127.0.0.1")) == "127.0.0.1"
    assert listen_address_for(("localhost", "hub.example")) == "0.0.0.0"
    public = ServerConfig(hosts=("hub.example",), listen="0.0.0.0")
    assert (public.hub_address, public.local_hub_address) == ("hub.example:7443", "127.0.0.1:7443")


def test_own_certificates_are_renewed_in_the_last_third_and_cover_every_name(
    tmp_path: Path, toy_spec: SpaceSpec
) -> None:
    layout, config = Layout(tmp_path / "s"), ServerConfig(hosts=("hub.example", "10.0.0.7"), listen="0.0.0.0")
    create_server(layout, config, toy_spec, NOW)
    names = (
        x509.load_pem_x509_certificate(layout.certificate("server").read_bytes())
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert set(names.get_values_for_type(x509.DNSName)) == {"hub.example", "localhost"}
    assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {"10.0.0.7", "127.0.0.1"}
    assert ids.identity_of(layout.certificate("operator").read_bytes()).role == "operator"
    assert renew_certificates(layout, config, NOW + timedelta(days=200)) == []
    key = layout.key("fleet").read_bytes()
    assert set(renew_certificates(layout, config, NOW + timedelta(days=300))) == {"server", "operator", "fleet"}
    assert layout.key("fleet").read_bytes() == key
    assert ids.not_after(layout.certificate("fleet").read_bytes()) > NOW + timedelta(days=600)
    with pytest.raises(ConfigError, match="already"):
        create_server(layout, config, toy_spec, NOW)


def _run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_init_and_invite(tmp_path: Path, space_file: Path) -> None:
    root = tmp_path / "server"
    code, out, _ = _run("init", root, "--space", space_file, "--port", 0, "--k-max", 9, "--tau", 0.2)
    assert code == 0
    assert f"share-server run {root}" in out
    layout = Layout(root)
    spec, config = read_spec(layout.space), read_config(layout.config)
    assert (spec.k_max, spec.tau) == (9, 0.2)
    code, out, err = _run("invite", root, "acme/alice", "--role", "reader", "--hours", 2)
    assert code == 0
    token = ids.token_decode(out)
    assert out.count("\n") == 1
    assert token.identity == ids.Identity("reader", "acme", "alice")
    assert token.address == config.enrol_address
    assert "share-client join" in err
    assert ids.token_decode(_run("invite", root, "solo")[1]).identity == ids.Identity("trainer", "solo", "solo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("invite", "DIR", "Acme/alice"), "not allowed"),
        (("invite", "DIR", "acme/alice", "--role", "operator"), "cannot be invited"),
        (("invite", "DIR", "acme/alice", "--hours", "0"), "hours"),
        (("invite", "NOWHERE", "acme/alice"), "share-server init"),
        (("run", "NOWHERE"), "share-server init"),
        (("init", "DIR"), "already"),
        (("init", "OTHER", "--space", "no-such-space"), "no-such-space"),
        (("init", "OTHER", "--tau", "1.5"), "tau"),
        (("status", "DIR"), "is 'share-server run' running?"),
        (("tasks", "DIR", "--json"), "is 'share-server run' running?"),
    ],
)
def test_refusals_are_one_sentence_and_exit_code_1(
    tmp_path: Path, toy_spec: SpaceSpec, arguments: tuple[str, ...], message: str
) -> None:
    ports = free_ports(3)
    config = replace(ServerConfig(), hub_port=ports[0], enrol_port=ports[1], gateway_port=ports[2])
    create_server(Layout(tmp_path / "DIR"), config, toy_spec, datetime.now(UTC))
    places = {name: str(tmp_path / name) for name in ("DIR", "NOWHERE", "OTHER")}
    code, out, err = _run(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_free_ports_are_none_that_a_client_could_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that try to reach a server being restarted must not end up on its port."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(10_000 <= port < first for port in ports)
    limits = tmp_path / "range"
    limits.write_text("10100\t65535\n")
    monkeypatch.setattr(provision, "_EPHEMERAL", limits)
    assert any(port >= first for port in free_ports(20)), "too few are left: the system chooses"
    limits.write_text("20000 60999")
    assert all(10_000 <= port < 20_000 for port in free_ports(20))
    monkeypatch.setattr(provision, "_EPHEMERAL", tmp_path / "no such file")
    assert all(10_000 <= port < 32_768 for port in free_ports(20))


def test_status_and_tasks_of_a_running_hub(
    new_hub: Callable[..., LocalHub], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    server = new_hub()
    server.start()
    payload = make_payload(1)
    with server.hub(server.enrol("acme/alice")) as hub:
        hub.Submit(submit_messages(submit_header(toy_spec, "acme/task", payload), payload), timeout=30)
    root = server.layout.root
    while json.loads(_run("status", root, "--json")[1])["merged"] == 0:
        pass
    status = json.loads(_run("status", root, "--json")[1])
    assert (status["version"], status["tasks"], status["accepted"]) == (1, 1, 0)
    assert status["traffic"][0]["member"] == "acme/alice"
    assert status["traffic"][0]["up"]["directions"] > 0
    tasks = json.loads(_run("tasks", root, "--json")[1])
    assert [task["task_id"] for task in tasks["tasks"]] == ["acme/task"]
    assert "acme/task" in _run("tasks", root)[1]
    assert "1 merged" in _run("status", root)[1]


def test_init_leaves_a_directory_alone_that_holds_something_else(tmp_path: Path, space_file: Path) -> None:
    answer = CliRunner().invoke(app, ["init", str(tmp_path), "--space", str(space_file), "--port", "0"])
    assert answer.exit_code == 1
    assert "is not empty" in answer.stderr
    assert list(tmp_path.iterdir()) == [space_file]


@pytest.mark.parametrize("host", ["", "bad host", "name:7443", "http://name", "-x", "a..b", "::g"])
def test_init_refuses_a_host_that_no_client_could_reach(tmp_path: Path, space_file: Path, host: str) -> None:
    server = tmp_path / "server"
    answer = CliRunner().invoke(app, ["init", str(server), "--space", str(space_file), "--port", "0", "--host", host])
    assert answer.exit_code == 1
    assert "neither a host name nor an address" in answer.stderr
    assert not server.exists()
