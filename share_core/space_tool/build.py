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

from share_core.errors import (
    AdapterError,
    ConfigError,
    FedshareError,
    HeaderError,
    SpaceMismatchError,
    TensorShapeError,
    UnknownTaskError,
)
from share_core.ledger import TaskLedger, measure
from share_core.names import check_name
from share_core.peft.reader import PeftAdapter, PeftExport, read_adapter, task_name
from share_core.space import task_adapter
from share_core.space_tool.backbone import fingerprinted
from share_core.space_tool.header import MAX_CAP, check_source
from share_core.space_tool.spacefile import FilePolicy, SpaceFile, TaskSource, header_of
from share_core.streaming.fold import drop, fold
from share_core.streaming.state import StreamPolicy, StreamState, empty_stream
from share_core.streaming.view import ledger_of, refitted, space_of, stream_of, trimmed, widened
from share_core.types import Cores, SiteSpec, Space

Progress = Callable[[str, str], None]
"""Called with what is being done (``find``, ``merge`` or ``measure``) and the task's name, once per adapter and pass;
and with ``note`` and a sentence that a person should read."""


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
    return _merged(_empty(policy), sources, backbone, progress)


def add_sources(
    file: SpaceFile, sources: Sequence[Source], backbone: Path | None = None, progress: Progress = lambda *_: None
) -> SpaceFile:
    """Return the space with further adapters merged; a task of the same name is replaced.

    Raises:
        AdapterError: an adapter that cannot be used, by name.
        SpaceMismatchError: an adapter or a model of another backbone.
        ConfigError: if the space would not fit into one file.
    """
    return _merged(file, sources, backbone, progress)


def _empty(policy: FilePolicy) -> SpaceFile:
    return SpaceFile("", {}, Space(0, {}, {}), {}, {}, policy)


def _merged(
    file: SpaceFile, sources: Sequence[Source], backbone: Path | None, progress: Progress, known_good: bool = False
) -> SpaceFile:
    """Return the file with adapters merged.

    Args:
        file: what they are merged into.
        sources: adapter directories.
        backbone: its fingerprints decide whether adapters belong together; without it their names do.
        progress: told of every adapter in both passes.
        known_good: the adapters were accepted into one space before, so names decide nothing.
    """
    state = stream_of(file.space, file.ledger) if file.sites else empty_stream({})
    sites, known = dict(file.sites), dict(file.sources)
    if backbone is not None:
        sites.update(_identified(backbone, file))
    name = file.backbone
    for source in sources:
        progress("merge", source.name)
        adapter = read_adapter(source.path)
        for note in adapter.notes:
            progress("note", f"{source.path}: {note}")
        if backbone is None and not known_good:
            _same_backbone(name, adapter, source)
        name = name or (adapter.config.base_model or "").rstrip("/")
        fresh = {n: s for n, s in adapter.site_specs.items() if n not in sites}
        if file.sites and file.verified and fresh and backbone is None:
            raise SpaceMismatchError(
                f"{source.path} adapts site {sorted(fresh)[0]!r}, which this space has no fingerprint of: give the "
                "model with --backbone"
            )
        state = _widened(state, adapter, source)
        sites.update(fresh if backbone is None else fingerprinted(backbone, fresh, adapter.sites))
        known.pop(source.name, None)
        known[source.name] = _task_source(adapter, source, sites, known)
        state = fold(state, source.name, adapter.factors, _stream_policy(file.policy, sites), consume=True).state
    return _measured(state, replace(file, backbone=name, sites=sites, sources=known), progress)


def _widened(state: StreamState, adapter: PeftAdapter, source: Source) -> StreamState:
    try:
        return widened(state, adapter.site_specs)
    except TensorShapeError as error:
        raise SpaceMismatchError(
            f"{source.path} was made for another backbone than the adapters before it: {error}: merge each backbone's "
            "adapters into a space of their own"
        ) from None


def _task_source(
    adapter: PeftAdapter, source: Source, sites: Mapping[str, SiteSpec], known: Mapping[str, TaskSource]
) -> TaskSource:
    """Return what the file keeps of an adapter; adapters of one kind share one export information."""
    export = adapter.export.to_json()
    shared = next((other.export for other in known.values() if other.export == export), export)
    made = TaskSource(str(source.path.resolve()), adapter.sha256, adapter.nbytes, shared)
    try:
        check_source(made, sites)
    except HeaderError as error:
        raise AdapterError(f"{str(source.path)!r} cannot be kept in a space file: {error}: rename it") from None
    return made


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
    if not file.sources:
        raise ConfigError("this space has no task: there is nothing to merge anew")
    for task, source in file.sources.items():
        progress("find", task)
        if original_of(source) is None:
            raise AdapterError(
                f"task {task!r} cannot be rebuilt: {source.path} is gone or holds another adapter than the one merged"
            )
    again = [Source(task, Path(source.path)) for task, source in file.sources.items()]
    fresh = _merged(_empty(policy), again, None, progress, known_good=True)
    return replace(fresh, sites={name: file.sites[name] for name in fresh.sites})


def tasks_of(file: SpaceFile, contributor: str) -> list[str]:
    """Return the tasks of one contributor: those named ``CONTRIBUTOR/...``."""
    return [task for task in file.space.cores if task.startswith(f"{contributor}/")]


def _same_backbone(known: str, adapter: PeftAdapter, source: Source) -> None:
    """Refuse an adapter that says it was made for another backbone than those before it.

    Names are all there is to go by without the model; with it, its fingerprints decide and names do not matter.
    """
    own = (adapter.config.base_model or "").rstrip("/")
    if known and own and known.rsplit("/", 1)[-1].lower() != own.rsplit("/", 1)[-1].lower():
        raise SpaceMismatchError(
            f"{source.path} was made for {own!r}, the adapters before it for {known!r}: merge each backbone's "
            "adapters into a space of their own, or give the model with --backbone if it is the same one"
        )


def _identified(backbone: Path, file: SpaceFile) -> dict[str, SiteSpec]:
    """Return the file's sites with fingerprints; those that already carry one must agree.

    How a weight is stored is known from the tasks: a site that no task adapts any more stays as it is.
    """
    kinds = {
        name: site
        for source in file.sources.values()
        for name, site in PeftExport.from_json(source.export).sites.items()
    }
    found = fingerprinted(backbone, {name: site for name, site in file.sites.items() if name in kinds}, kinds)
    for name, site in found.items():
        known = file.sites[name].sha256
        if known and known != site.sha256:
            raise SpaceMismatchError(
                f"site {name!r}: the space has fingerprint {known[:16]}, {backbone} has {site.sha256[:16]}: it is "
                "another backbone"
            )
    return found


def _stream_policy(policy: FilePolicy, sites: Mapping[str, SiteSpec]) -> StreamPolicy:
    cap = MAX_CAP if policy.cap is None else policy.cap
    caps = {}
    for name in sites:
        own = next((value for pattern, value in policy.site_caps.items() if fnmatchcase(name, pattern)), None)
        if own is not None:
            caps[name] = (own, own)
    return StreamPolicy(k_max=cap, tau=policy.budget, rank=policy.rank, site_caps=caps)


def _measured(state: StreamState, file: SpaceFile, progress: Progress) -> SpaceFile:
    """Return the finished file: every task fitted to the final bases and measured, as far as its adapter is there."""
    space, ledger = space_of(state), ledger_of(state)
    header_of(replace(file, space=space, ledger=ledger))
    cores: dict[str, Cores] = dict(space.cores)
    exact: dict[str, TaskLedger] = dict(ledger)
    for task, source in file.sources.items():
        progress("measure", task)
        original = original_of(source)
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


def original_of(source: TaskSource) -> PeftAdapter | None:
    """Return the adapter a task was merged from, or None if it is gone or has changed."""
    try:
        adapter = read_adapter(Path(source.path))
    except (FedshareError, OSError):
        return None
    return adapter if adapter.sha256 == source.sha256 else None
