"""Making and changing space files from adapter directories, one adapter in memory at a time.

Two passes over the adapters. The first folds each into the bases; the second fits every task once more to the final
bases, which wins back what compactions dropped and later adapters brought back, and measures its error exactly against
the adapter itself. A task whose directory is gone or has changed keeps its carried coefficients and its bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from share_core.errors import AdapterError, ConfigError, SpaceMismatchError, UnknownTaskError
from share_core.ledger import TaskLedger, measure
from share_core.names import check_name
from share_core.peft.reader import PeftAdapter, PeftExport, PeftSite, read_adapter, task_name
from share_core.space import task_adapter
from share_core.space_tool.backbone import fingerprinted
from share_core.space_tool.spacefile import FilePolicy, SpaceFile, TaskSource
from share_core.streaming.fold import drop, fold
from share_core.streaming.state import StreamPolicy, StreamState, empty_stream
from share_core.streaming.view import ledger_of, refitted, space_of, stream_of, trimmed, widened
from share_core.types import Cores, SiteSpec, Space

UNLIMITED = 1 << 20
"""Cap of a space that is limited by its budget alone."""

Progress = Callable[[str, str], None]
"""Called with what is being done (``merge`` or ``measure``) and the task's name, once per adapter and pass."""


@dataclass(frozen=True)
class Source:
    """One adapter directory and the task it becomes."""

    name: str
    path: Path


def parse_sources(arguments: Sequence[str]) -> list[Source]:
    """Read ``DIR`` or ``NAME=DIR`` arguments; without a name the directory's own is used.

    Raises:
        ConfigError: if two adapters would become the same task.
    """
    sources: list[Source] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if equals and not Path(argument).is_dir():
            sources.append(Source(_check_task(name), Path(path)))
        else:
            sources.append(Source(task_name(Path(argument)), Path(argument)))
    seen: dict[str, Path] = {}
    for source in sources:
        if source.name in seen:
            raise ConfigError(
                f"{seen[source.name]} and {source.path} would both be task {source.name!r}: give one a name, as in "
                f"NAME={source.path}"
            )
        seen[source.name] = source.path
    return sources


def _check_task(name: str) -> str:
    """Return a task name, with or without an organisation before a slash."""
    for part in name.split("/", 1):
        check_name(part, "task name")
    return name


def merge_sources(
    sources: Sequence[Source], policy: FilePolicy, backbone: Path | None = None, progress: Progress = lambda *_: None
) -> SpaceFile:
    """Return a new space that holds every adapter as a task.

    Args:
        sources: adapter directories in arrival order.
        policy: cap or budget.
        backbone: a local model; its weights' fingerprints become the identity of the sites.
        progress: told of every adapter in both passes.

    Raises:
        AdapterError: an adapter that cannot be used, by name.
        SpaceMismatchError: adapters of different backbones.
    """
    if not sources:
        raise ConfigError("give at least one adapter directory")
    empty = SpaceFile("", {}, Space(0, {}, {}), {}, {}, policy)
    return add_sources(empty, sources, backbone, progress)


def add_sources(
    file: SpaceFile, sources: Sequence[Source], backbone: Path | None = None, progress: Progress = lambda *_: None
) -> SpaceFile:
    """Return the space with further adapters merged; a task of the same name is replaced."""
    state = stream_of(file.space, file.ledger) if file.sites else empty_stream({})
    sites, known = dict(file.sites), dict(file.sources)
    kinds: dict[str, PeftSite] = {}
    name = file.backbone
    for source in sources:
        progress("merge", source.name)
        adapter = read_adapter(source.path)
        name = _same_backbone(name, adapter, source)
        fresh = {n: s for n, s in adapter.site_specs.items() if n not in sites}
        kinds.update({n: adapter.sites[n] for n in fresh})
        if file.sites and file.verified and fresh and backbone is None:
            raise SpaceMismatchError(
                f"{source.path} adapts site {sorted(fresh)[0]!r}, which this space has no fingerprint of: give the "
                "model with --backbone"
            )
        sites.update(fresh)
        state = widened(state, adapter.site_specs)
        state = fold(state, source.name, adapter.factors, _stream_policy(file.policy, sites), consume=True).state
        known.pop(source.name, None)
        known[source.name] = TaskSource(
            str(source.path.resolve()), adapter.sha256, adapter.nbytes, adapter.export.to_json()
        )
    if backbone is not None:
        sites = _identified(backbone, sites, kinds, file)
    return _measured(state, replace(file, backbone=name, sites=sites, sources=known), progress)


def remove_tasks(file: SpaceFile, tasks: Iterable[str], progress: Progress = lambda *_: None) -> SpaceFile:
    """Return the space without some tasks; directions that no remaining task uses go with them.

    Other tasks do not move. What the removed tasks taught directions that others share stays: to forget without a
    trace, :func:`rebuild` from the remaining adapters.

    Raises:
        UnknownTaskError: if the space has no such task.
    """
    gone = set(tasks)
    missing = sorted(gone - set(file.space.cores))
    if missing:
        known = ", ".join(sorted(file.space.cores)[:8]) or "none"
        raise UnknownTaskError(f"this space has no task {missing[0]!r}; it has: {known}")
    state = trimmed(drop(stream_of(file.space, file.ledger), gone))
    rest = {task: source for task, source in file.sources.items() if task not in gone}
    return _measured(state, replace(file, sources=rest), progress)


def rebuild(file: SpaceFile, policy: FilePolicy, progress: Progress = lambda *_: None) -> SpaceFile:
    """Return the same tasks merged anew from their adapters, in the order of the file, under another policy.

    Raises:
        AdapterError: if an adapter is gone or has changed since it was merged; names it.
    """
    for task, source in file.sources.items():
        if _original(task, source) is None:
            raise AdapterError(
                f"task {task!r} cannot be rebuilt: {source.path} is gone or holds another adapter than the one merged"
            )
    fresh = merge_sources([Source(t, Path(s.path)) for t, s in file.sources.items()], policy, None, progress)
    return replace(fresh, sites={name: file.sites[name] for name in fresh.sites})


def tasks_of(file: SpaceFile, contributor: str) -> list[str]:
    """Return the tasks of one contributor: those named ``CONTRIBUTOR/...``."""
    return [task for task in file.space.cores if task.startswith(f"{contributor}/")]


def _same_backbone(known: str, adapter: PeftAdapter, source: Source) -> str:
    """Return the backbone's name, refusing adapters that say they were made for different ones."""
    own = (adapter.config.base_model or "").rstrip("/")
    if known and own and known.split("/")[-1].lower() != own.split("/")[-1].lower():
        raise SpaceMismatchError(
            f"{source.path} was made for {own!r}, the adapters before it for {known!r}: merge each backbone's "
            "adapters into a space of their own"
        )
    return known or own


def _identified(
    backbone: Path, sites: Mapping[str, SiteSpec], kinds: Mapping[str, PeftSite], file: SpaceFile
) -> dict[str, SiteSpec]:
    """Return the sites with fingerprints; sites that already carry one must agree."""
    all_kinds = {
        name: site for source in file.sources.values() for name, site in PeftExport.from_json(source.export).sites.items()
    }
    found = fingerprinted(backbone, sites, {**all_kinds, **kinds})
    for name, site in file.sites.items():
        if site.sha256 and site.sha256 != found[name].sha256:
            raise SpaceMismatchError(
                f"site {name!r}: the space has fingerprint {site.sha256[:16]}, {backbone} has "
                f"{found[name].sha256[:16]}: it is another backbone"
            )
    return found


def _stream_policy(policy: FilePolicy, sites: Mapping[str, SiteSpec]) -> StreamPolicy:
    cap = UNLIMITED if policy.cap is None else policy.cap
    caps = {}
    for name in sites:
        own = next((value for pattern, value in policy.site_caps.items() if fnmatchcase(name, pattern)), None)
        if own is not None:
            caps[name] = (own, own)
    return StreamPolicy(k_max=cap, tau=policy.budget, rank=policy.rank, site_caps=caps)


def _measured(state: StreamState, file: SpaceFile, progress: Progress) -> SpaceFile:
    """Return the finished file: every task fitted to the final bases and measured, as far as its adapter is there."""
    space, ledger = space_of(state), ledger_of(state)
    cores: dict[str, Cores] = dict(space.cores)
    exact: dict[str, TaskLedger] = dict(ledger)
    for task, source in file.sources.items():
        progress("measure", task)
        original = _original(task, source)
        if original is None:
            continue
        cores[task] = refitted(state, original.factors, file.policy.rank)
        fitted = Space(space.version, space.bases, {task: cores[task]})
        exact[task] = measure(original.factors, task_adapter(fitted, task))
    order = list(file.sources)
    return replace(
        file,
        space=Space(space.version, space.bases, {task: cores[task] for task in order}),
        ledger={task: exact[task] for task in order},
    )


def _original(task: str, source: TaskSource) -> PeftAdapter | None:
    """Return the adapter a task was merged from, or None if it is gone or has changed."""
    try:
        adapter = read_adapter(Path(source.path))
    except (AdapterError, OSError):
        return None
    return adapter if adapter.sha256 == source.sha256 else None
