"""The picture of ``share-sim bench sequence``: accuracy of every task, and what each way of adapting costs to send."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FORMS: Mapping[str, tuple[str, str]] = {
    "auto": ("C0", "o"),
    "lora": ("C1", "D"),
    "coefficients": ("C2", "^"),
    "directions": ("C3", "v"),
    "free": ("C4", "s"),
}
"""Colour and marker of each way."""


def write_sequence_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the report. Needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    tasks, cost = figure.subplots(1, 2, width_ratios=(2, 1))
    _accuracies(tasks, report["tasks"])
    _costs(cost, report["ways"])
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def _accuracies(axes: Any, tasks: Mapping[str, Mapping[str, float]]) -> None:
    names = list(tasks)
    for way, (colour, marker) in (("frozen", ("0.5", "_")), ("lora", _FORMS["lora"]), ("auto", _FORMS["auto"])):
        if way not in tasks[names[0]]:
            continue
        axes.plot(names, [tasks[name][way] for name in names], marker, color=colour, label=way, ls="")
    axes.set_ylabel("accuracy at the end, mean of the seeds")
    axes.tick_params(axis="x", rotation=60)
    axes.legend()
    axes.set_title("tasks in order of arrival")


def _costs(axes: Any, ways: Mapping[str, Mapping[str, float]]) -> None:
    for way, own in ways.items():
        if way == "frozen":
            continue
        colour, marker = _FORMS[way]
        axes.errorbar(
            own["bytes_up"] / 1e6,
            own["final"],
            yerr=own["spread_over_seeds"],
            color=colour,
            marker=marker,
            markerfacecolor="none",
            ls="",
            capsize=3,
            label=way,
        )
    if "frozen" in ways:
        axes.axhline(ways["frozen"]["final"], color="0.5", ls="--", label="frozen backbone")
    axes.legend(loc="center")
    axes.set_xlabel("MB up for all tasks, heads not counted")
    axes.set_ylabel("mean accuracy at the end")
