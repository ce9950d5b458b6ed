"""The picture of ``share-sim bench serve``: throughput over the number of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_serve_plot(report: dict[str, Any], path: Path) -> None:
    """Draw each model's throughput as a share of its backbone's; bars reach from the least to the most seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = report["models"]
    figure = Figure(figsize=(5 * len(models), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, own) in enumerate(models.items(), start=1):
        axes = figure.add_subplot(1, len(models), number)
        tasks = [int(count) for count in own["by_tasks"]]
        for way in ("shared factors", "PEFT mixed", "PEFT switching"):
            rows = [row["ways"][way] for row in own["by_tasks"].values()]
            middle = [row["ratio_to_backbone"] for row in rows]
            below = [row["ratio_to_backbone"] - row["ratio_to_backbone_from"] for row in rows]
            above = [row["ratio_to_backbone_to"] - row["ratio_to_backbone"] for row in rows]
            axes.errorbar(tasks, middle, yerr=(below, above), marker="o", markersize=4, capsize=3, label=way)
        axes.axhline(1.0, linestyle="--", color="0.6", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tasks, [str(count) for count in tasks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tasks held")
        axes.set_ylabel("throughput / backbone alone")
        axes.set_title(
            f"{name}: batches of {report['options']['rows']} x {report['options']['tokens']} tokens", fontsize=10
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
