"""What ``share-space`` shows: plain values for machines, tables for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from share_core.linalg import float64, product_norm

if TYPE_CHECKING:
    from rich.table import Table

    from share_core.space_tool.check import Difference, Finding
    from share_core.space_tool.spacefile import SpaceFile
    from share_core.types import Space, SpaceSpec


def merge_summary(file: SpaceFile, bytes_space: int, seconds: float, peak_mib: float) -> dict[str, Any]:
    """Return what ``merge --json`` prints; errors are relative, ``sqrt(sum ||dW - dW^||^2 / sum ||dW||^2)``."""
    errors = {task: file.ledger[task].bound for task in file.space.cores}
    return {
        "adapters": len(errors),
        "sites": len(file.sites),
        "cap": file.policy.cap,
        "budget": file.policy.budget,
        "mean_error": sum(errors.values()) / len(errors) if errors else 0.0,
        "max_error": max(errors.values(), default=0.0),
        "per_task": errors,
        "measured": all(file.ledger[task].measured for task in errors),
        "bytes_space": bytes_space,
        "bytes_adapters": sum(source.nbytes for source in file.sources.values()),
        "seconds": round(seconds, 3),
        "peak_mib": round(peak_mib, 1),
    }


def space_summary(file: SpaceFile) -> dict[str, Any]:
    """Return what ``inspect --json`` prints of a space file."""
    return {
        "backbone": file.backbone,
        "verified": file.verified,
        "version": file.space.version,
        "cap": file.policy.cap,
        "budget": file.policy.budget,
        "sites": [
            {
                "site": name,
                "d_out": site.d_out,
                "d_in": site.d_in,
                "k_out": file.space.bases[name].k_out,
                "k_in": file.space.bases[name].k_in,
                "spectrum": site_spectrum(file, name),
            }
            for name, site in sorted(file.sites.items())
        ],
        "tasks": [
            {
                "task": task,
                "error": file.ledger[task].bound,
                "measured": file.ledger[task].measured,
                "norm": file.ledger[task].norm,
                "numbers": sum(core.out.numel() + core.in_.numel() for core in cores.values()),
                "source": file.sources[task].path,
            }
            for task, cores in file.space.cores.items()
        ],
    }


def site_spectrum(file: SpaceFile, site: str) -> list[float]:
    """Return the share of all tasks' relative energy along each left direction's principal axis, descending.

    The eigenvalues of ``sum_t C_t C_t^T / ||dW_t||^2`` over their sum: how evenly the directions are used.
    """
    k = file.space.bases[site].k_out
    gram = torch.zeros(k, k, dtype=torch.float64)
    for task, cores in file.space.cores.items():
        core = cores.get(site)
        if core is not None:
            out, in_ = float64(core.out), float64(core.in_)
            gram += out @ (in_.T @ in_) @ out.T / max(file.ledger[task].norm ** 2, 1e-300)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    total = float(values.sum())
    return [float(v) / total for v in values] if total > 0 else [0.0] * k


def snapshot_summary(space: Space, spec: SpaceSpec) -> dict[str, Any]:
    """Return what ``inspect --json`` prints of a hub's snapshot: sizes per site and per task; bytes count float32."""
    sites = [
        {
            "site": name,
            "d_out": s.d_out,
            "d_in": s.d_in,
            "k_out": space.bases[name].k_out,
            "k_in": space.bases[name].k_in,
        }
        for name, s in spec.sites.items()
    ]
    tasks: list[dict[str, Any]] = [
        {
            "task": task,
            "numbers": sum(core.out.numel() + core.in_.numel() for core in cores.values()),
            "norm": math.hypot(*(float(product_norm(core.out, core.in_)) for core in cores.values())) if cores else 0.0,
        }
        for task, cores in sorted(space.cores.items())
    ]
    return {
        "backbone": spec.backbone,
        "space_id": spec.space_id,
        "version": space.version,
        "bytes_bases": 4 * sum(b.left.numel() + b.right.numel() for b in space.bases.values()),
        "bytes_tasks": 4 * sum(task["numbers"] for task in tasks),
        "sites": sites,
        "tasks": tasks,
    }


def site_table(summary: dict[str, Any]) -> Table:
    """Return the sites as a table."""
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("site", overflow="fold"), "weight", "left", "right", title="Subspace")
    with_spectrum = any("spectrum" in site for site in summary["sites"])
    if with_spectrum:
        table.add_column("half of the energy in", justify="right")
    for site in summary["sites"]:
        row = [escape(site["site"]), f"{site['d_out']} x {site['d_in']}", str(site["k_out"]), str(site["k_in"])]
        table.add_row(*row, *([f"{_half(site['spectrum'])} directions"] if with_spectrum else []))
    return table


def _half(spectrum: list[float]) -> int:
    total = 0.0
    for count, value in enumerate(spectrum, start=1):
        total += value
        if total >= 0.5:
            return count
    return len(spectrum)


def task_table(summary: dict[str, Any]) -> Table:
    """Return the tasks as a table; an error without a star is exact, with one it is an upper bound."""
    from rich.table import Column, Table

    table = Table(Column("task", overflow="fold"), "numbers", "norm", title="Tasks")
    with_errors = any("error" in task for task in summary["tasks"])
    if with_errors:
        table.add_column("error", justify="right")
        table.caption = "error: relative, exact; with * an upper bound"
    for task in summary["tasks"]:
        row = [task["task"], f"{task['numbers']:,}", f"{task['norm']:.4g}"]
        table.add_row(*row, *([f"{task['error']:.4f}{'' if task['measured'] else '*'}"] if with_errors else []))
    return table


def finding_table(findings: list[Finding]) -> Table:
    """Return the findings of ``verify`` as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("checked", "", "detail", title="Verification")
    for finding in findings:
        table.add_row(
            escape(finding.what), "[green]ok[/green]" if finding.ok else "[red]WRONG[/red]", escape(finding.detail)
        )
    return table


def diff_summary(difference: Difference) -> dict[str, Any]:
    """Return what ``diff --json`` prints."""
    return {
        "added": difference.added,
        "removed": difference.removed,
        "tasks": [
            {"task": task, "error_first": a, "error_second": b, "apart": apart}
            for task, (a, b, apart) in difference.errors.items()
        ],
        "sites": [
            {"site": name, "first": a, "second": b, "left_distance": left, "right_distance": right}
            for name, (a, b, left, right) in difference.sites.items()
        ],
    }


def diff_tables(difference: Difference) -> list[Table]:
    """Return the differences as tables."""
    from rich.markup import escape
    from rich.table import Table

    tasks = Table("task", "error first", "error second", "apart", title="Tasks in both")
    for task, (a, b, apart) in difference.errors.items():
        tasks.add_row(task, f"{a:.4f}", f"{b:.4f}", f"{apart:.2e}")
    sites = Table("site", "first", "second", "left distance", "right distance", title="Subspaces")
    for name, (first, second, left, right) in difference.sites.items():
        sites.add_row(
            escape(name), f"{first[0]} | {first[1]}", f"{second[0]} | {second[1]}", f"{left:.2e}", f"{right:.2e}"
        )
    return [tasks, sites]
