"""The picture of ``share-sim bench transfer``: every new task in every way, for every number of passes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARKERS = {
    "frozen": "_",
    "lora": "D",
    "lora_double_rate": "d",
    "random_basis": "x",
    "backbone_basis": "+",
    "learned_zero": "v",
    "learned_coefficients": "^",
    "random_basis_default": "1",
    "learned": "o",
}


def write_transfer_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the report. Needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(report["by_epochs"]), 4.4), layout="constrained")
    panels = figure.subplots(1, len(report["by_epochs"]), squeeze=False, sharey=True)[0]
    for axes, (passes, own) in zip(panels, report["by_epochs"].items(), strict=True):
        names = [*own["table"], "mean"]
        for number, (way, marker) in enumerate(MARKERS.items()):
            if way not in own["means"]:
                continue
            values = [row[way] for row in own["table"].values()] + [own["means"][way]]
            axes.plot(names, values, marker, label=way, color="0.5" if way == "frozen" else f"C{number}")
        axes.tick_params(axis="x", rotation=60)
        axes.set_title(f"{report['rows']} rows, {passes} {'pass' if passes == '1' else 'passes'}")
    panels[0].set_ylabel("accuracy, mean of the seeds")
    panels[-1].legend(fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
