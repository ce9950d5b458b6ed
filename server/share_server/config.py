"""``server.toml``: everything the operator may set, as frozen values.

Unknown keys, wrong types and values outside their bounds are refused with the name of the key: a misspelt
limit must not silently be no limit.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from share_core.errors import ConfigError
from share_core.robust.policy import FILTERS, RobustPolicy

T = TypeVar("T")

_HOST_NAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)

DEFAULT_PORT = 7443
"""First of the three ports unless told otherwise."""


@dataclass(frozen=True)
class LeaseConfig:
    """How work is handed out."""

    minutes: float = 10.0
    """Life of one lease. A node takes no new work after it."""
    max_updates: int = 0
    """A node ends its lease after this many submissions; 0 means no limit."""
    idle_retry_s: float = 15.0
    """Seconds until a node that returned its lease idle is asked again."""
    grace_s: float = 120.0
    """Seconds after its deadline at which an open lease counts as lost."""


@dataclass(frozen=True)
class LimitConfig:
    """What one caller, or all together, may cost the hub."""

    max_payload_bytes: int = 64 * 2**20
    """Largest update payload."""
    concurrent_calls: int = 2048
    """Most calls in progress at once, streams included; more are shed with RESOURCE_EXHAUSTED and a retry hint."""
    concurrent_uploads: int = 256
    """Most updates being received at once; more are told to try again."""
    inflight_bytes: int = 256 * 2**20
    """Most payload bytes being received at once over all uploads; more are told to try again."""
    member_calls_per_s: float = 0.0
    """Uploads per second of one member; 0 means no limit."""
    member_bytes_per_s: float = 0.0
    """Payload bytes per second of one member; 0 means no limit."""
    organisation_calls_per_s: float = 0.0
    """Uploads per second of all members of one organisation together; 0 means no limit."""
    organisation_bytes_per_s: float = 0.0
    """Payload bytes per second of one organisation; 0 means no limit."""
    upload_idle_s: float = 30.0
    """Longest pause between two messages of an upload."""
    upload_total_s: float = 600.0
    """Longest time for one upload."""
    write_timeout_s: float = 30.0
    """A subscriber that does not take a message within this time is cut."""
    recheck_s: float = 30.0
    """How often the caller of every open call is checked again."""
    enrolments_per_minute: int = 300
    """Enrolment calls per minute and peer address."""
    free_space_bytes: int = 256 * 2**20
    """Uploads are refused below this much free disk, so that merges can always commit."""
    parsers: int = 2
    """Processes that look at payloads; what a payload does to one of them does not touch the hub."""
    parser_memory_bytes: int = 256 * 2**20
    """Memory that one of them may take for a payload, beside what it begins with."""
    parser_cpu_s: float = 10.0
    """Processor time that one payload may take."""
    parser_wall_s: float = 30.0
    """Longest wait for one of them; after it the sender is told to come again."""
    drain_s: float = 20.0
    """Longest wait for calls in progress when the hub is asked to stop."""


@dataclass(frozen=True)
class RetentionConfig:
    """What is kept for how long. The journal and the newest version are always kept."""

    horizon_versions: int = 1000
    """An update may be based on a version at most this much older than the newest."""
    snapshot_every: int = 64
    """A whole version is kept on disk every so many versions."""
    upload_hours: float = 24.0
    """Life of an unfinished upload, in hours since its last byte."""
    staging_bytes_per_organisation: int = 2**30
    """Most bytes of unfinished uploads that one organisation may have on disk."""


@dataclass(frozen=True)
class MergeConfig:
    """How waiting updates become versions."""

    batch: int = 32
    """Most updates that one version takes."""
    buffer: int = 1
    """A version waits for this many updates of shared tasks; 1 merges each as it comes."""
    buffer_wait_s: float = 5.0
    """Longest wait for a full buffer in seconds."""
    staleness: str = field(default="polynomial", metadata={"choices": ("constant", "polynomial", "hinge")})
    """How less an update counts that was trained on an older version."""
    staleness_a: float = 0.5
    """Strength of the staleness rule."""
    staleness_b: float = 4.0
    """Versions that the hinge rule forgives."""
    mixing: str = field(default="mean", metadata={"choices": ("mean", "fedasync", "fedbuff")})
    """How several clients' updates of one task become one."""
    alpha: float = field(default=0.5, metadata={"most": 1.0})
    """Mixing rate of fedasync and server rate of fedbuff, above 0 and at most 1."""
    rows_cap: int = 0
    """Declared training rows weigh up to this number; 0 means that they do not weigh at all."""
    refits: int = 8
    """Most tasks that one merge projects anew from their originals."""


@dataclass(frozen=True)
class RobustConfig:
    """Protection against organisations that would spoil what is shared; see :mod:`share_core.robust`."""

    filter: str = field(default="cosine", metadata={"choices": FILTERS})
    """How updates of shared tasks are judged; ``off``: not at all."""
    organisations: int = 4
    """Fewest contributing organisations that can outvote one, at least 3. Below it lengths are limited and no more."""
    cosine: float = field(default=0.4, metadata={"most": 1.0})
    """Set aside: a cosine to the others, in the median, below this share of the usual one; above 0 and below 1."""
    clip: float = 1.5
    """Cut: a length of more than this many times the median."""
    norm: float = 10.0
    """Set aside: a length of more than this many times the median."""
    influence: float = field(default=0.25, metadata={"most": 1.0})
    """Largest share of one organisation's tasks when a space that is full chooses its directions; 1: no limit."""
    past: float = field(default=0.5, metadata={"most": 1.0})
    """Set aside: what would add more than this to the relative error of another organisation's task; 1: nothing."""

    @property
    def policy(self) -> RobustPolicy:
        """The same for the mathematics.

        Raises:
            ConfigError: the values do not go together.
        """
        return RobustPolicy(**dataclasses.asdict(self))


@dataclass(frozen=True)
class ServerConfig:
    """One server."""

    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    """Names and addresses under which clients reach this server. The first one is printed into join tokens."""
    listen: str = "127.0.0.1"
    """Address to bind: ``0.0.0.0`` for every IPv4 interface, ``[::]`` for all."""
    hub_port: int = DEFAULT_PORT
    """Port of the Hub, Fleet and Health services. Client certificate required."""
    enrol_port: int = DEFAULT_PORT + 1
    """Port of the Enrolment service, the only one without a client certificate."""
    gateway_port: int = DEFAULT_PORT + 2
    """Port of the Flower gateway. Client certificate required."""
    metrics_port: int = 0
    """Port on 127.0.0.1 of the Prometheus metrics, without TLS and for this machine only; 0 turns them off."""
    certificate_days: float = 7.0
    """Life of a member's certificate in days. Members renew it by themselves when half of it is over."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    """How work is handed out."""
    limits: LimitConfig = field(default_factory=LimitConfig)
    """What callers may cost."""
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    """What is kept for how long."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    """How waiting updates become versions."""
    robust: RobustConfig = field(default_factory=RobustConfig)
    """Who is judged, capped and held."""

    @property
    def hub_address(self) -> str:
        """``host:port`` of the hub as clients see it."""
        return join_address(self.hosts[0], self.hub_port)

    @property
    def enrol_address(self) -> str:
        """``host:port`` of the enrolment listener as clients see it."""
        return join_address(self.hosts[0], self.enrol_port)

    @property
    def gateway_address(self) -> str:
        """``host:port`` of the Flower gateway as clients see it."""
        return join_address(self.hosts[0], self.gateway_port)

    @property
    def local_hub_address(self) -> str:
        """``host:port`` under which processes on this machine reach the hub."""
        any_interface = self.listen in {"0.0.0.0", "[::]", "::"}
        return join_address("127.0.0.1" if any_interface else self.listen, self.hub_port)


_SECTIONS: Mapping[str, type[Any]] = {
    "lease": LeaseConfig,
    "limits": LimitConfig,
    "retention": RetentionConfig,
    "merge": MergeConfig,
    "robust": RobustConfig,
}
"""Tables of ``server.toml`` and what they hold."""


def join_address(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def listen_address_for(hosts: tuple[str, ...]) -> str:
    """Return the address to bind for these names: loopback if all of them are, else every IPv4 interface."""
    return "127.0.0.1" if all(is_loopback(host) for host in hosts) else "0.0.0.0"


def check_hosts(hosts: tuple[str, ...], where: str) -> None:
    """Refuse what clients could not connect to.

    Raises:
        ConfigError: the list is empty, or one of them is neither a host name nor an address.
    """
    if not hosts:
        raise ConfigError(f"{where}: hosts must be a list of names or addresses with at least one entry")
    for host in hosts:
        if not isinstance(host, str) or not (_HOST_NAME.fullmatch(host) or _is_address(host)):
            raise ConfigError(f"{where}: {host!r} is neither a host name nor an address; give it without a port")


def read_config(path: Path) -> ServerConfig:
    """Read ``server.toml``.

    Raises:
        ConfigError: the file is missing, is no TOML, or holds a key or value that is not allowed.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: run 'share-server init {path.parent}' first") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    parts = {name: _section(cls, values.pop(name, {}), f"{path}: [{name}]") for name, cls in _SECTIONS.items()}
    config = _section(ServerConfig, values, str(path), **parts)
    check_hosts(config.hosts, str(path))
    _check_ports(config, path)
    try:
        config.robust.policy  # noqa: B018 - asked for its refusal
    except ConfigError as error:
        raise ConfigError(f"{path}: [robust]: {error}") from error
    return config


def config_to_toml(config: ServerConfig) -> str:
    """Return ``config`` as the text of a ``server.toml`` that :func:`read_config` reads back unchanged."""
    lines = ["# fedshare server. Every key may be left out; share-server init wrote the values in force."]
    lines += [f"{name} = {_literal(value)}" for name, value in _plain(config).items()]
    for section in _SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [f"{name} = {_literal(value)}" for name, value in _plain(getattr(config, section)).items()]
    return "\n".join(lines) + "\n"


def _check_ports(config: ServerConfig, path: Path) -> None:
    ports = [config.hub_port, config.enrol_port, config.gateway_port]
    if not all(1 <= port <= 65535 for port in ports) or len(set(ports)) != 3:
        raise ConfigError(f"{path}: hub_port, enrol_port and gateway_port must be three ports, got {ports}")
    if config.metrics_port > 65535 or config.metrics_port in ports:
        raise ConfigError(f"{path}: metrics_port must be a port of its own, or 0 for none, got {config.metrics_port}")


def _plain(value: Any) -> dict[str, Any]:
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: item for name, item in fields.items() if not dataclasses.is_dataclass(item)}


def _literal(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _section(cls: type[T], values: Any, where: str, **parts: Any) -> T:
    """Build ``cls`` from a TOML table, checking every key, type and bound."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a table")
    fields: dict[str, Any] = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields or name in parts:
            allowed = ", ".join(sorted(set(fields) - set(parts)))
            raise ConfigError(f"{where}: unknown key {name!r}; allowed are {allowed}")
        checked[name] = _value(fields[name].default, value, f"{where}: {name}")
        _check_choice(fields[name].metadata, checked[name], f"{where}: {name}")
    return cls(**checked, **parts)


def _check_choice(bounds: Mapping[str, Any], value: Any, where: str) -> None:
    """Refuse what the field's own ``choices`` or ``most`` rule out."""
    if "choices" in bounds and value not in bounds["choices"]:
        raise ConfigError(f"{where} must be one of {', '.join(bounds['choices'])}, got {value!r}")
    if "most" in bounds and value > bounds["most"]:
        raise ConfigError(f"{where} must be at most {bounds['most']:g}, got {value!r}")


def _value(default: Any, value: Any, where: str) -> Any:
    """Return ``value`` with the type of ``default``; numbers must be positive, or zero where the default is."""
    if isinstance(default, tuple):
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(value)
    if isinstance(default, str):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where} must be text, got {value!r}")
        return value
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{where} must be a {'whole number' if whole else 'number'}, got {value!r}")
    if not (0 < value < math.inf or (value == 0 and default == 0)):
        raise ConfigError(f"{where} must be finite and greater than zero, got {value!r}")
    return value if whole else float(value)


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine only: ``localhost`` or a loopback address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
