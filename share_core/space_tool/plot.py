"""The picture of a space: how evenly its directions are used, and what each task lost."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from share_core.durable import PUBLIC, write_atomic
from share_core.errors import ConfigError, StorageError

_NAMED = 300
"""Most tasks whose names are written beside their bars; a picture cannot be of any height."""


def write_plot(summary: dict[str, Any], path: Path) -> None:
    """Draw the spectra of all sites and the errors of all tasks into a picture; needs no display.

    Args:
        summary: what :func:`share_core.space_tool.report.space_summary` returns.
        path: ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        ConfigError: if matplotlib is not installed or the ending is none of these.
        StorageError: if the disk refused; an older picture of that name is untouched.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install 'fedshare[simulation]'") from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{path}: expected a name ending with .png, .svg or .pdf")
    tasks = summary["tasks"]
    figure = Figure(figsize=(11, max(3.6, 1.2 + 0.22 * min(len(tasks), _NAMED))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for site in summary["sites"]:
        spectrum = [value for value in site["spectrum"] if value > 0]
        left.plot(range(1, len(spectrum) + 1), spectrum, color="tab:blue", alpha=0.35, linewidth=1)
    left.set(yscale="log", xlabel="direction", ylabel="share of the energy", title=f"{len(summary['sites'])} sites")
    left.grid(alpha=0.3)
    colours = ["tab:green" if task["measured"] else "tab:orange" for task in tasks]
    names = [task["task"] for task in tasks] if len(tasks) <= _NAMED else range(len(tasks))
    right.barh(names, [task["error"] for task in tasks], color=colours)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=8)
    right.set(xlabel="relative error (orange: upper bound)", title=f"{len(tasks)} tasks")
    right.grid(axis="x", alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=130)
    try:
        write_atomic(path, drawn.getvalue(), PUBLIC)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}: choose another place for the picture") from None
