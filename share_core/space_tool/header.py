"""The JSON header of a space file: where its tasks came from and with what limits it was made.

A header that comes from somebody else is refused unless every key is there, known and of its type; names are printable
and at most 512 characters; numbers are within what this library can compute with; every task is named once, in the
alphabet of task names; and every task points to export information that fits the sites.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from share_core.errors import AdapterError, HeaderError, TaskNameError
from share_core.names import check_name
from share_core.peft.export import PeftExport
from share_core.tensorfile import no_duplicates
from share_core.types import SiteSpec

FORMAT = "fedshare/space/1"
MAX_CAP = 1 << 20
"""Largest cap or rank; also the cap of a space that is limited by its budget alone."""
_MAX_SIDE = 1 << 31
_MAX_NAME = 512
_MAX_PATH = 4096
_MAX_WHOLE = 1 << 53
_KEYS = {"format", "backbone", "version", "policy", "sites", "tasks", "exports"}
_TASK_KEYS = {"name", "measured", "source", "sha256", "bytes", "export"}
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class TaskSource:
    """Where a task came from and how to write it out again."""

    path: str
    """The adapter directory it was merged from."""
    sha256: str
    """Of its ``adapter_model.safetensors``."""
    nbytes: int
    """Bytes of its LoRA tensors."""
    export: Mapping[str, Any]
    """What the PEFT writer needs, as JSON."""


@dataclass(frozen=True)
class FilePolicy:
    """With what limits the space was made."""

    cap: int | None
    """Largest number of basis vectors per site and side; None: as many as the budget needs."""
    budget: float
    """Share of an adapter's norm that its merge could leave out."""
    rank: int | None = None
    """Largest rank of a stored core; None keeps the adapter's own."""
    site_caps: Mapping[str, int] = field(default_factory=dict)
    """Caps of single sites by name or shell pattern; the first that matches counts."""


@dataclass(frozen=True)
class Header:
    """A header that passed."""

    backbone: str
    version: int
    policy: FilePolicy
    sites: Mapping[str, SiteSpec]
    sources: Mapping[str, TaskSource]
    """By task, in the order of the file."""
    measured: Mapping[str, bool]


def header_to_json(header: Header) -> str:
    """Return a header as text; equal content gives equal text."""
    exports: list[Mapping[str, Any]] = []
    rows = []
    for task, source in header.sources.items():
        if source.export not in exports:
            exports.append(source.export)
        rows.append(
            {
                "name": task,
                "measured": header.measured[task],
                "source": source.path,
                "sha256": source.sha256,
                "bytes": source.nbytes,
                "export": exports.index(source.export),
            }
        )
    policy = header.policy
    raw = {
        "format": FORMAT,
        "backbone": header.backbone,
        "version": header.version,
        "policy": {
            "cap": policy.cap,
            "budget": policy.budget,
            "rank": policy.rank,
            "site_caps": list(policy.site_caps.items()),
        },
        "sites": {name: [site.d_out, site.d_in, site.sha256] for name, site in header.sites.items()},
        "tasks": rows,
        "exports": exports,
    }
    return json.dumps(raw, sort_keys=True)


def header_from_json(text: str) -> Header:
    """Read what :func:`header_to_json` gave.

    Raises:
        HeaderError: naming the key, the expected and the got.
    """
    try:
        raw = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise HeaderError("metadata 'fedshare' is not JSON") from None
    got = raw.get("format") if isinstance(raw, dict) else None
    if got == "fedshare/snapshot/1":
        raise HeaderError("this is a snapshot of a hub and no space file: inspect it with --space and its space.toml")
    if got != FORMAT:
        raise HeaderError(f"expected a file of format {FORMAT!r}, as 'share-space merge' writes it, got {_shown(got)}")
    _exact(raw, _KEYS, "the header")
    sites = {name: _site(name, value) for name, value in _object(raw["sites"], "sites").items()}
    exports = [_export(value, sites) for value in _list(raw["exports"], "exports")]
    sources: dict[str, TaskSource] = {}
    measured: dict[str, bool] = {}
    for row in _list(raw["tasks"], "tasks"):
        name = _task(_exact(row, _TASK_KEYS, "a task")["name"])
        if name in sources:
            raise HeaderError(f"task {name!r} is named twice")
        sources[name] = TaskSource(
            path=_text(row["source"], f"source of task {name!r}", _MAX_PATH),
            sha256=_digest(row["sha256"], f"sha256 of task {name!r}"),
            nbytes=_whole(row["bytes"], f"bytes of task {name!r}", 0, _MAX_WHOLE),
            export=exports[_whole(row["export"], f"export of task {name!r}", 0, len(exports) - 1)],
        )
        measured[name] = _flag(row["measured"], f"measured of task {name!r}")
    return Header(
        backbone=_text(raw["backbone"], "backbone", _MAX_PATH),
        version=_whole(raw["version"], "version", 0, _MAX_WHOLE),
        policy=_policy(raw["policy"]),
        sites=sites,
        sources=sources,
        measured=measured,
    )


def check_source(source: TaskSource, sites: Mapping[str, SiteSpec]) -> None:
    """Refuse a task whose names a header could not carry, before anything is computed with it.

    Raises:
        HeaderError: naming what.
    """
    _text(source.path, "the path of an adapter", _MAX_PATH)
    _export(source.export, sites)


def _policy(raw: Any) -> FilePolicy:
    raw = _exact(raw, {"cap", "budget", "rank", "site_caps"}, "policy")
    budget = raw["budget"]
    if type(budget) not in (int, float) or not 0 <= budget < 1:
        raise _lie("policy budget", "a number of at least 0 and below 1", budget)
    caps = {}
    for entry in _list(raw["site_caps"], "policy site_caps"):
        pattern, cap = _list(entry, "policy site_caps", 2)
        caps[_text(pattern, "policy site_caps")] = _whole(cap, "policy site_caps", 1, MAX_CAP)
    return FilePolicy(
        cap=None if raw["cap"] is None else _whole(raw["cap"], "policy cap", 1, MAX_CAP),
        budget=float(budget),
        rank=None if raw["rank"] is None else _whole(raw["rank"], "policy rank", 1, MAX_CAP),
        site_caps=caps,
    )


def _site(name: str, raw: Any) -> SiteSpec:
    _text(name, "a site's name")
    what = f"site {name!r}"
    d_out, d_in, sha256 = _list(raw, what, 3)
    if not name or not name.isascii():
        raise HeaderError(f"{what}: expected a name in ASCII")
    return SiteSpec(
        name,
        _whole(d_out, what, 1, _MAX_SIDE),
        _whole(d_in, what, 1, _MAX_SIDE),
        "" if sha256 == "" else _digest(sha256, what),
    )


def _export(raw: Any, sites: Mapping[str, SiteSpec]) -> Mapping[str, Any]:
    try:
        export = PeftExport.from_json(raw)
    except AdapterError as error:
        raise HeaderError(str(error)) from None
    for name, site in export.sites.items():
        known = sites.get(name)
        if known is None or (known.d_out, known.d_in) != site.matrix_shape:
            raise HeaderError(f"the export information of site {name[:80]!r} does not fit the sites of this space")
        _text(site.module, f"module of site {name!r}")
    for text in (export.base_model or "", export.task_type or "", *export.modules_to_save):
        _text(text, "the export information", _MAX_PATH)
    return export.to_json()


def _task(value: Any) -> str:
    name = _text(value, "a task's name")
    try:
        for part in name.split("/", 1):
            check_name(part, "task name")
    except TaskNameError as error:
        raise HeaderError(str(error)) from None
    return name


def _exact(raw: Any, keys: set[str], what: str) -> dict[str, Any]:
    found = _object(raw, what)
    if found.keys() != keys:
        wrong = min(found.keys() ^ keys)
        raise HeaderError(f"{what} of this space is damaged: key {wrong[:80]!r} is {_fault(wrong in keys)}")
    return found


def _fault(expected: bool) -> str:
    return "missing" if expected else "unknown"


def _object(raw: Any, what: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _lie(what, "an object", raw)
    return raw


def _list(raw: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(raw, list) or (length is not None and len(raw) != length):
        raise _lie(what, "a list" if length is None else f"a list of {length}", raw)
    return raw


def _whole(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _lie(what, f"a whole number from {least} to {most}", value)
    return value


def _flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise _lie(what, "true or false", value)
    return value


def _text(value: Any, what: str, most: int = _MAX_NAME) -> str:
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise _lie(what, f"at most {most} printable characters", value)
    return value


def _digest(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or not _HEX.issuperset(value):
        raise _lie(what, "64 hexadecimal digits", value)
    return value


def _no_constant(text: str) -> Any:
    raise HeaderError(f"the header of this space holds {text}, which is no number")


def _lie(what: str, expected: str, got: Any) -> HeaderError:
    return HeaderError(f"{what[:120]}: expected {expected}, got {_shown(got)}")


def _shown(value: Any) -> str:
    return repr(value)[:80] if not isinstance(value, int) or abs(value) < _MAX_WHOLE else "a huge number"
