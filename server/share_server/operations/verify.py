"""``share-server verify``: prove a stopped server or a backup, changing nothing."""

from __future__ import annotations

import asyncio

from share_core.errors import ConfigError, FedshareError
from share_core.merge import HubState
from share_core.spec_file import read_spec
from share_core.types import SpaceSpec
from share_server.layout import Layout
from share_server.operations.checks import (
    check_journal,
    check_manifests,
    check_marker,
    check_pages,
    check_payloads,
    check_signatures,
)
from share_server.operations.reading import ReadStore, Told, copied, held, reading, silent
from share_server.operations.replay import replay_versions
from share_server.operations.report import Report
from share_server.operations.versions import check_ledger, check_versions, make_contents
from share_server.store.anchor import Mark
from share_server.store.forgetting import announced_sweep
from share_server.store.versions import read_ledger


def verify(layout: Layout, replay: bool = False, told: Told = silent) -> Report:
    """Check everything that can be checked, and with ``replay`` make every kept version anew.

    Raises:
        ConfigError: it is no server directory, a hub runs on it, or a newer release wrote it.
    """
    with held(layout):
        return asyncio.run(_verify(layout, replay, told))


async def _verify(layout: Layout, replay: bool, told: Told) -> Report:
    report = Report()
    spec = read_spec(layout.space)
    with copied(layout) as folder:
        mark = check_pages(folder, report)
        if layout.space_next.exists():
            report.notes.append("a rebuild was cut short; the next start of the hub finishes or forgets it")
        if not (folder / "journal.db").exists():
            if any((folder / "blobs").glob("*/*")):
                report.problems.append("the journal (store/journal.db) is gone, but payloads are there")
                check_payloads(folder, None, report, told)
            return report
        try:
            async with reading(folder) as store:  # every check of its own turns what it meets into a problem
                await _check(layout, spec, store, mark, replay, report, told)
        except ConfigError:
            raise
        except FedshareError as error:
            report.problems.append(str(error))
            check_payloads(folder, None, report, told)
    return report


async def _check(
    layout: Layout, spec: SpaceSpec, store: ReadStore, mark: Mark, replay: bool, report: Report, told: Told
) -> None:
    rows = await store.look(lambda journal: check_journal(journal, mark, spec, report))
    with report.noting("sweep"):
        if await store.do(announced_sweep) is not None:
            report.notes.append("a forgetting was cut short; the next start of the hub removes what it has left behind")
    check_marker(layout, rows, report)
    check_manifests(layout, rows.versions, report, told)
    await store.do(lambda journal: check_signatures(layout, journal, spec.space_id, rows.updates, report, told))
    check_payloads(store.root, rows, report, told)
    space = check_versions(store.blobs, spec, rows, report, told)
    state = None
    with report.noting("ledger"):
        if space is not None:
            state = HubState(space, await store.do(read_ledger))
            await check_ledger(make_contents(store, spec, space), spec, rows, state, report, told)
    if not replay:
        return
    if state is None or report.problems:
        report.notes.append("not replayed: put the problems right first")
        return
    with report.noting("replay"):
        await replay_versions(store, spec, rows, state, report, told)
