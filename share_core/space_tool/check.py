"""Whether a space file holds what it says, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from share_core.errors import FedshareError, SpaceMismatchError
from share_core.ledger import measure
from share_core.linalg import float64
from share_core.peft.reader import read_adapter
from share_core.space import task_adapter
from share_core.space_tool.spacefile import SpaceFile

ORTHONORMAL = 1e-5
"""Largest entry of ``L^T L - I`` that is accepted in float32 (MATH section 4, property 8)."""
LEDGER = 1e-6
"""How far recorded norms and errors may lie from the measured ones, relative to the task's norm."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    what: str
    ok: bool
    detail: str


def verify(file: SpaceFile) -> list[Finding]:
    """Check bases, names and ledger; tasks whose adapter is at hand are measured anew against it."""
    worst, site = max(
        ((max(_departure(b.left), _departure(b.right)), name) for name, b in file.space.bases.items()),
        default=(0.0, ""),
    )
    findings = [
        Finding("bases", worst <= ORTHONORMAL, f"orthonormal to {worst:.1e}" + (f" (worst: {site})" if site else "")),
        Finding(
            "identity",
            True,
            f"{sum(bool(s.sha256) for s in file.sites.values())} of {len(file.sites)} sites carry a fingerprint",
        ),
    ]
    return findings + [_verify_task(file, task) for task in file.space.cores]


def _verify_task(file: SpaceFile, task: str) -> Finding:
    source, ledger = file.sources[task], file.ledger[task]
    recorded = f"{'measured' if ledger.measured else 'bound'} {ledger.bound:.6f}"
    try:
        adapter = read_adapter(Path(source.path))
    except (FedshareError, OSError) as error:
        return Finding(task, True, f"{recorded}; not measured again: {error}")
    if adapter.sha256 != source.sha256:
        return Finding(task, True, f"{recorded}; not measured again: {source.path} has changed since")
    found = measure(adapter.factors, task_adapter(file.space, task))
    ok = _agree(ledger.norms, found.norms, found.norm) and (
        _agree(ledger.bounds, found.bounds, found.norm) if ledger.measured else found.bound <= ledger.bound + LEDGER
    )
    norms = "" if ok else f"; norm {ledger.norm:.6g}, found {found.norm:.6g}"
    return Finding(task, ok, f"{recorded}, found {found.bound:.6f}{norms}")


def _agree(recorded: Mapping[str, float], found: Mapping[str, float], norm: float) -> bool:
    sites = recorded.keys() | found.keys()
    return all(abs(recorded.get(site, 0.0) - found.get(site, 0.0)) <= LEDGER * norm for site in sites)


def _departure(basis: Tensor) -> float:
    if basis.shape[1] == 0:
        return 0.0
    gram = float64(basis).mT @ float64(basis)
    return float((gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max())


@dataclass(frozen=True)
class Difference:
    """How a space differs from another of the same sites."""

    added: list[str]
    removed: list[str]
    errors: dict[str, tuple[float, float, float]]
    """By common task: error in the first, in the second, and ``||first - second|| / ||first||``."""
    sites: dict[str, tuple[tuple[int, int], tuple[int, int], float, float]]
    """By site: sizes (out, in) in the first and second, and the distance of left and right subspaces: the sine of the
    largest angle by which the smaller one leaves the larger."""


def diff(first: SpaceFile, second: SpaceFile) -> Difference:
    """Compare two spaces.

    Raises:
        SpaceMismatchError: if a common site has different shapes or fingerprints.
    """
    common = sorted(set(first.sites) & set(second.sites))
    for name in common:
        a, b = first.sites[name], second.sites[name]
        if (a.d_out, a.d_in) != (b.d_out, b.d_in) or (a.sha256 and b.sha256 and a.sha256 != b.sha256):
            raise SpaceMismatchError(f"site {name!r} differs in shape or fingerprint: these are different backbones")
    if not common:
        raise SpaceMismatchError("the two spaces have no site in common: these are different backbones")
    tasks = [task for task in first.space.cores if task in second.space.cores]
    errors = {}
    for task in tasks:
        apart = measure(task_adapter(first.space, task), task_adapter(second.space, task)).bound
        errors[task] = (first.ledger[task].bound, second.ledger[task].bound, apart)
    sites = {}
    for name in common:
        x, y = first.space.bases[name], second.space.bases[name]
        sites[name] = (
            (x.k_out, x.k_in),
            (y.k_out, y.k_in),
            subspace_distance(x.left, y.left),
            subspace_distance(x.right, y.right),
        )
    return Difference(
        added=[task for task in second.space.cores if task not in first.space.cores],
        removed=[task for task in first.space.cores if task not in second.space.cores],
        errors=errors,
        sites=sites,
    )


def subspace_distance(x: Tensor, y: Tensor) -> float:
    """Return the sine of the largest principal angle between the smaller of two subspaces and the larger, in [0, 1].

    From the residual ``(I - Y Y^T) x`` and not from the cosines, which cannot resolve angles below 1e-8.
    """
    small, large = (x, y) if x.shape[1] <= y.shape[1] else (y, x)
    if small.shape[1] == 0:
        return 0.0
    small, large = float64(small), float64(large)
    return min(1.0, float(torch.linalg.matrix_norm(small - large @ (large.mT @ small), 2)))
