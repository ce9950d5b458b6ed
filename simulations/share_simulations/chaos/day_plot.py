"""The picture of the scaled day: versions, waiting updates, and when hub and clients were up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from share_simulations.chaos.day_report import Diary

PICTURE = "day.png"
REPORT = "day.json"

_COLOURS = {"reset": "tab:orange", "blackhole": "black", "half_open": "tab:purple", "far": "tab:cyan", "slices": "0.6"}


def write_day(report: dict[str, Any], diary: Diary, out: Path) -> None:
    """Write the picture and the report into ``out``, which is made. Needs no display."""
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    _versions(axes[0], diary)
    _waiting(axes[1], diary)
    _people(axes[2], diary)
    _down(axes, diary)
    verdict = "every promise kept" if report["ok"] else f"{len(report['problems'])} broken promises"
    axes[0].set_title(
        f"A day in {report['minutes']:g} minutes: {report['updates']} updates of {report['clients']} clients, "
        f"{report['hub_kills']} kills of the hub (red), {report['killed_clients']} of clients; "
        f"{report['lost']} lost, {report['double']} double; {verdict}",
        fontsize=10,
    )
    axes[2].set_xlabel("hour of the day")
    figure.savefig(out / PICTURE, dpi=130)


def _hours(diary: Diary, seconds: float) -> float:
    return 24 * seconds / diary.seconds


def _versions(axes: Any, diary: Diary) -> None:
    up = [(sample.at_s, sample.version) for sample in diary.samples if sample.version is not None]
    axes.plot([_hours(diary, at) for at, _ in up], [version for _, version in up], linewidth=1.2)
    axes.set_ylabel("version")
    axes.grid(alpha=0.3)


def _waiting(axes: Any, diary: Diary) -> None:
    up = [(sample.at_s, sample.waiting) for sample in diary.samples if sample.waiting is not None]
    axes.fill_between([_hours(diary, at) for at, _ in up], [waiting for _, waiting in up], step="post", alpha=0.6)
    axes.set_ylabel("updates that wait\nfor their merge")
    axes.grid(alpha=0.3)


def _people(axes: Any, diary: Diary) -> None:
    axes.step(
        [_hours(diary, sample.at_s) for sample in diary.samples],
        [sample.clients for sample in diary.samples],
        where="post",
        color="tab:green",
        label="clients running",
    )
    for name, colour in _COLOURS.items():
        at = [_hours(diary, moment) for moment, what in diary.marks if what == name]
        axes.plot(at, [-1] * len(at), "|", color=colour, markersize=9, label=f"network: {name}")
    at = [_hours(diary, moment) for moment, what in diary.marks if what == "client killed"]
    axes.plot(at, [-2] * len(at), "x", color="tab:red", markersize=5, label="client killed")
    axes.set_ylabel("clients, network")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    axes.grid(alpha=0.3)


def _down(axes: Any, diary: Diary) -> None:
    """Shade the time without an answer of the hub in every panel, and mark its kills."""
    begin: float | None = None
    for sample in diary.samples:
        if sample.version is None:
            begin = sample.at_s if begin is None else begin
        elif begin is not None:
            for one in axes:
                one.axvspan(_hours(diary, begin), _hours(diary, sample.at_s), color="tab:red", alpha=0.2, linewidth=0)
            begin = None
    for moment, what in diary.marks:
        if what == "hub killed":
            for one in axes:
                one.axvline(_hours(diary, moment), color="tab:red", linewidth=0.6, alpha=0.6)
