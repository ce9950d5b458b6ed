"""``space.toml``: what a space is made for, written once by the operator.

::

    [space]
    id = "sha256:..."       # fingerprint of the backbone, checked when the file is read
    backbone = "minilm"     # for people
    k_max = 64              # largest number of basis vectors per site and side
    tau = 0.05              # share of a task's norm that merging may leave out
    rank_limit = 64         # largest rank of one update at one site

    [sites]
    "encoder.layer.0.attention.self.query" = { shape = [384, 384], sha256 = "..." }
"""

from __future__ import annotations

import json
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError
from share_core.fingerprint import space_id_of
from share_core.types import SiteSpec, SpaceSpec

_SITE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def spec_to_toml(spec: SpaceSpec) -> str:
    """Return the text of a space.toml."""
    lines = [
        "[space]",
        f"id = {json.dumps(spec.space_id)}",
        f"backbone = {json.dumps(spec.backbone)}",
        f"k_max = {spec.k_max}",
        f"tau = {spec.tau!r}",
        f"rank_limit = {spec.rank_limit}",
        "",
        "[sites]",
    ]
    for name in sorted(spec.sites):
        site = spec.sites[name]
        shape = f"[{site.d_out}, {site.d_in}]"
        lines.append(f'{json.dumps(name)} = {{ shape = {shape}, sha256 = "{site.sha256}" }}')
    return "\n".join(lines) + "\n"


def spec_from_toml(text: str, source: str) -> SpaceSpec:
    """Read the text of a space.toml.

    Args:
        text: the file's content.
        source: what to call the file in errors.

    Raises:
        ConfigError: naming file, key, expected and got.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not a TOML file: {error}") from None
    space = _table(raw, "space", source)
    table = _table(raw, "sites", source)
    if not table:
        raise ConfigError(f"{source}: [sites] is empty: a space adapts at least one site")
    sites = {name: _site(name, entry, source) for name, entry in sorted(table.items())}
    spec = SpaceSpec(
        space_id=_value(space, "id", str, source),
        backbone=_value(space, "backbone", str, source),
        sites=sites,
        k_max=_value(space, "k_max", int, source),
        tau=float(_value(space, "tau", float, source)),
        rank_limit=_value(space, "rank_limit", int, source),
    )
    if spec.space_id != space_id_of(sites):
        raise ConfigError(
            f"{source}: id is {spec.space_id} but the sites give {space_id_of(sites)}: the file was edited; "
            "make it again with 'share-client space'"
        )
    if not (1 <= spec.k_max <= 4096 and 0 <= spec.tau < 1 and 1 <= spec.rank_limit <= 1024):
        raise ConfigError(
            f"{source}: expected 1 <= k_max <= 4096, 0 <= tau < 1 and 1 <= rank_limit <= 1024, "
            f"got {spec.k_max}, {spec.tau}, {spec.rank_limit}"
        )
    return spec


def read_spec(path: Path) -> SpaceSpec:
    """Read a space.toml file.

    Raises:
        ConfigError: if it cannot be read or does not describe a space.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return spec_from_toml(text, str(path))


def builtin_specs() -> list[str]:
    """Return the names of the spaces that ship with the package."""
    folder = resources.files("share_core") / "spaces"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def builtin_spec(name: str) -> SpaceSpec:
    """Return a space that ships with the package.

    Raises:
        ConfigError: if there is none of that name; lists those there are.
    """
    if name not in builtin_specs():
        raise ConfigError(f"no built-in space {name!r}; there are: {', '.join(builtin_specs())}, or give a space.toml")
    text = (resources.files("share_core") / "spaces" / f"{name}.toml").read_text(encoding="utf-8")
    return spec_from_toml(text, f"built-in space {name}")


def find_spec(name_or_path: str) -> SpaceSpec:
    """Return the space of a file, or of a built-in name; what ends with ``.toml`` is always a file.

    Raises:
        ConfigError: if there is no such file or name.
    """
    path = Path(name_or_path)
    return read_spec(path) if name_or_path.endswith(".toml") or path.is_file() else builtin_spec(name_or_path)


def _table(raw: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: expected a table [{key}], got {type(value).__name__}")
    return value


def _value(table: dict[str, Any], key: str, kind: type, source: str) -> Any:
    value = table.get(key)
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise ConfigError(f"{source}: [space] {key}: expected {kind.__name__}, got {value!r}")
    return value


def _site(name: str, entry: Any, source: str) -> SiteSpec:
    if not _SITE_NAME.fullmatch(name):
        raise ConfigError(f"{source}: site name {name!r}: use 1 to 128 of A-Z a-z 0-9 _ . -")
    shape = entry.get("shape") if isinstance(entry, dict) else None
    sha256 = entry.get("sha256") if isinstance(entry, dict) else None
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not whole or not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigError(
            f"{source}: site {name!r}: expected {{ shape = [d_out, d_in], sha256 = 64 hexadecimal digits }}, "
            f"got {entry!r}"
        )
    assert isinstance(shape, list)
    return SiteSpec(name, shape[0], shape[1], sha256)
