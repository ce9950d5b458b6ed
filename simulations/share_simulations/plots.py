"""The pictures of a run: the accuracy matrix as a heat map, and accuracy over versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from share_simulations.metrics import AccuracyMatrix
from share_simulations.results import Results

MATRIX_FILE = "matrix.png"
CURVES_FILE = "curves.png"


def write_plots(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write both pictures into ``folder`` and return their paths. Needs no display."""
    matrix, curves = folder / MATRIX_FILE, folder / CURVES_FILE
    _save(_matrix_figure(results), matrix)
    _save(_curves_figure(results), curves)
    return matrix, curves


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def _array(matrix: AccuracyMatrix) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the matrix in percent with NaN for what was not measured."""
    rows = [[np.nan if v is None else 100 * v for v in row] for row in matrix.values]
    return np.array(rows, dtype=np.float64).reshape(len(matrix.versions), len(matrix.tasks))


def _matrix_figure(results: Results) -> Any:
    """Draw versions downwards and tasks across; cells without a measurement stay grey."""
    from matplotlib.figure import Figure

    values = _array(results.matrix)
    names = [t.partition("/")[2] for t in results.matrix.tasks]
    height = 1.8 + 0.34 * len(results.matrix.versions)
    figure = Figure(figsize=(2.5 + 0.85 * len(names), height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.92")
    if not values.size:
        axes.set_title("nothing was merged", fontsize=10)
        return figure
    floor = _floor(values)
    image = axes.imshow(values, cmap="viridis", vmin=floor, vmax=100, aspect="auto")
    merged = {(t.last_version, t.task) for t in results.per_task}
    for row, version in enumerate(results.matrix.versions):
        for column, task in enumerate(results.matrix.tasks):
            value = values[row, column]
            if np.isnan(value):
                continue
            weight = "bold" if (version, task) in merged else "normal"
            colour = "black" if value > (floor + 100) / 2 else "white"
            label = f"{value:.1f}"
            axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=8, weight=weight)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(results.matrix.versions)), [f"v{v}" for v in results.matrix.versions])
    axes.set_ylabel("version")
    axes.set_title("Accuracy after every version, percent (bold: own last merge)", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _floor(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Return where the colours begin: the lowest accuracy, rounded down to tens."""
    known = values[~np.isnan(values)]
    return float(10 * np.floor(known.min() / 10)) if known.size else 0.0


def _curves_figure(results: Results) -> Any:
    """Draw each task's accuracy over versions beside its separate LoRA (dashed, at the right edge)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    values = _array(results.matrix)
    versions = results.matrix.versions
    for column, task in enumerate(results.per_task):
        (line,) = axes.plot(versions, values[:, column], marker="o", markersize=3, label=task.task)
        if task.accuracy_lora is not None and versions:
            edge = (versions[-1] + 0.2, versions[-1] + 0.9)
            axes.plot(edge, [100 * task.accuracy_lora] * 2, linestyle="--", color=line.get_color())
    axes.set_xlabel("version")
    axes.set_ylabel("accuracy, percent")
    axes.set_title("Accuracy of every task over versions; dashed: separate LoRA of rank 8", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure
