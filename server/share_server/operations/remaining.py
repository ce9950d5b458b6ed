"""The space as it is without what was forgotten: every version made anew from the updates that remain in it.

This is what ``forget`` makes and what ``verify --replay`` makes again. The rules:

* updates are taken in the versions in which they were merged, in ingest order, under the policies recorded with these;
* a version of which nothing remains is left out, and so are versions that an earlier forgetting made: they hold what
  the replay holds at that place anyway; a version that was rebuilt at another size is rebuilt here, too;
* every update counts as what it says in ambient factors, whatever version it was expressed in;
* versions keep their numbers, so that an update of a shared task weighs as much for its age as it did.

With the same build and one thread the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from share_core.errors import ConfigError
from share_core.merge import HubState, empty_state
from share_core.types import SpaceSpec
from share_core.wire import decode_snapshot, encode_snapshot
from share_server.hub.contents import Contents
from share_server.hub.stepping import Stepper
from share_server.operations.checks import Rows
from share_server.operations.reading import Told
from share_server.operations.remaking import remake
from share_server.operations.versions import recorded_policy
from share_server.store.records import UpdateRow, VersionRow
from share_server.store.recovery import forgotten_in
from share_server.store.store import Store

_NEVER = 2**62


async def replay_remaining(
    store: Store, contents: Contents, stepper: Stepper, spec: SpaceSpec, rows: Rows, version: int, told: Told
) -> HubState:
    """Return the state called ``version``, made of what remains of the updates in the versions before it.

    Args:
        store: where what remains is read; forgotten updates must be marked there.
        contents: access to what the updates say.
        stepper: makes the versions; torch must run on one thread.
        spec: the space.
        rows: what the journal of ``store`` holds.
        version: number of the result; versions from it on are not looked at.
        told: told how far it is.

    Raises:
        RebaseError: something that a version was made of is no longer kept.
        ConfigError: an update that was merged cannot be merged again.
        StorageError: the store is damaged.
    """
    state = empty_state(spec)
    updates = {row.new.update_id: row for row in rows.updates}
    rebuilt = _rebuilt(rows)
    for row in rows.versions[: version - 1]:
        before = _numbered(state, row.version - 1)
        if row.updates:
            state = await _step(stepper, before, row, updates, rows, spec)
        elif row.version in rebuilt:
            state = await remake(store, contents, before, recorded_policy(row, rows, spec), spec)
        told("replay", row.version, version - 1)
    state = _numbered(state, version)
    space = decode_snapshot(encode_snapshot(state.space), spec)  # what is stored is the authority
    return HubState(space, state.ledger)


async def _step(
    stepper: Stepper,
    before: HubState,
    row: VersionRow,
    updates: Mapping[str, UpdateRow],
    rows: Rows,
    spec: SpaceSpec,
) -> HubState:
    policy = recorded_policy(row, rows, spec)
    tried = await stepper.step(before, [updates[name] for name in row.updates], policy, _NEVER, again=True)
    for error in tried.refused.values():
        raise error
    if tried.step is None or tuple(one.update_id for one in tried.step.merged) != row.updates:
        raise ConfigError(f"what remains of version {row.version} cannot be merged again: it is too large together")
    return tried.step.state


def _numbered(state: HubState, version: int) -> HubState:
    return HubState(replace(state.space, version=version), state.ledger)


def _rebuilt(rows: Rows) -> set[int]:
    """Return the versions that were rebuilt: made of no update, and not by a forgetting."""
    without = {body["version"] for kind, body, _ in rows.entries.values() if kind == "version" and not _names(body)}
    return without - forgetting_versions(rows)


def forgetting_versions(rows: Rows) -> set[int]:
    """Return the versions that a forgetting made."""
    return set(forgotten_in(rows.entries).values()) - {0}


def _names(body: Mapping[str, object]) -> bool:
    """Return whether a chained version was made of updates; versions of format 1 name theirs otherwise."""
    return bool(body.get("updates") or body.get("update_id"))
