"""The picture of ``share-sim bench privacy``: accuracy against epsilon, one panel for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_privacy_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report. Needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = report["tasks"]
    figure = Figure(figsize=(4.6 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (name, own) in zip(panels, tasks.items(), strict=True):
        _panel(axes, name, own["accuracy"])
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, name: str, accuracy: dict[str, dict[str, float]]) -> None:
    curves: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for key, figures in accuracy.items():
        mechanism, _, text = key.rpartition(", epsilon ")
        if mechanism:
            curves.setdefault(mechanism, []).append((float(text), figures))
    axes.axhline(accuracy["frozen backbone, plain head"]["mean"], color="0.5", ls="--", label="frozen backbone")
    for number, (mechanism, points) in enumerate(curves.items()):
        colour = f"C{number}"
        finite = [(epsilon, figures) for epsilon, figures in points if epsilon != float("inf")]
        if not finite:
            axes.axhline(points[0][1]["mean"], color=colour, ls=":", label=f"{mechanism}, no noise")
            continue
        x = [epsilon for epsilon, _ in finite]
        y = [figures["mean"] for _, figures in finite]
        spread = [
            [figures["mean"] - figures["min"] for _, figures in finite],
            [figures["max"] - figures["mean"] for _, figures in finite],
        ]
        axes.errorbar(x, y, yerr=spread, color=colour, marker="o", capsize=3, label=mechanism)
        for epsilon, figures in points:
            if epsilon == float("inf"):
                axes.axhline(figures["mean"], color=colour, ls=":", label=f"{mechanism}, no noise")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("epsilon of one training")
    axes.set_title(name)
