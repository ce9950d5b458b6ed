"""The table at the end of a run."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from share_simulations.results import Results


def print_report(results: Results, console: Console) -> None:
    """Print tasks, the T x T matrix and totals."""
    console.print(report(results))


def report(results: Results) -> RenderableType:
    """Return everything a person wants to see of a run."""
    return Group(task_table(results), Text(), matrix_table(results), Text(), totals_table(results))


def percent(value: float | None) -> str:
    """Return a fraction as percent; ``?`` where nothing was measured."""
    return "?" if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """Return a difference of fractions in points with its sign; ``?`` where nothing was measured."""
    return "?" if value is None else f"{100 * value + 0.0:+.2f}"


def size(count: int) -> str:
    """Return bytes as a person reads them."""
    if count < 10_000:
        return f"{count} B"
    return f"{count / 1000:.1f} kB" if count < 10_000_000 else f"{count / 1e6:.1f} MB"


def task_table(results: Results) -> Table:
    """Return one row per task, in the order of their last merges, and the averages."""
    title = "Accuracy, percent: frozen backbone, separate LoRA, ours after the task's own last merge and at the end"
    table = Table(title=title, title_justify="left")
    for heading in ("task", "owner"):
        table.add_column(heading, no_wrap=True)
    for heading in ("rows", "frozen", "LoRA", "merged", "final", "forgot"):
        table.add_column(heading, justify="right")
    for task in results.per_task:
        table.add_row(
            task.task.partition("/")[2],
            task.owner,
            str(task.rows),
            percent(task.accuracy_frozen),
            percent(task.accuracy_lora),
            percent(task.accuracy_own),
            percent(task.accuracy_final),
            points(task.forgetting),
        )
    table.add_section()
    table.add_row(
        "mean",
        "",
        "",
        percent(results.frozen_average_accuracy),
        percent(results.lora_average_accuracy),
        "",
        percent(results.average_accuracy),
        points(results.forgetting),
        style="bold",
    )
    return table


def matrix_table(results: Results) -> Table:
    """Return the T x T matrix: every task's accuracy after each task's own last merge; columns are numbered.

    ``.`` stands before a task's first merge; ``?`` where a version was not evaluated.
    """
    matrix = results.task_matrix
    numbers = {task: str(number) for number, task in enumerate(matrix.tasks, start=1)}
    first = {t.task: t.first_version for t in results.per_task}
    table = Table(title="The same for every task after each task's own last merge", title_justify="left")
    table.add_column("after", no_wrap=True)
    table.add_column("at", justify="right")
    for task in matrix.tasks:
        table.add_column(numbers[task], justify="right")
    for after, version, row in zip(matrix.tasks, matrix.versions, matrix.values, strict=True):
        cells = [
            "." if value is None and version < first[task] else percent(value)
            for task, value in zip(matrix.tasks, row, strict=True)
        ]
        table.add_row(f"{numbers[after]} {after.partition('/')[2]}", f"v{version}", *cells)
    return table


def totals_table(results: Results) -> Table:
    """Return averages, bytes, versions and staleness."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for label, value in _totals(results):
        table.add_row(label, value)
    return table


def _totals(results: Results) -> list[tuple[str, str]]:
    ratio = results.bytes_up / results.bytes_up_lora if results.bytes_up_lora else 0.0
    stale = ", ".join(f"{count} x {by}" for by, count in results.staleness.items())
    return [
        (
            "average accuracy",
            f"{percent(results.average_accuracy)} "
            f"(separate LoRA {percent(results.lora_average_accuracy)}, "
            f"frozen backbone {percent(results.frozen_average_accuracy)})",
        ),
        ("forgetting, BWT", f"{points(results.forgetting)}, {points(results.bwt)} points"),
        (
            "bytes up",
            f"{size(results.bytes_up)} coefficients and directions of {results.updates} updates "
            f"= {100 * ratio:.0f} % of {size(results.bytes_up_lora)} for as many LoRA uploads ({results.dtype})",
        ),
        (
            "other bytes",
            f"down {size(results.bytes_down)}, shared heads {size(results.bytes_heads)}, "
            f"envelope {size(results.bytes_envelope)}; total {size(results.bytes_total)}",
        ),
        (
            "versions",
            f"{results.versions} with {results.compactions} compactions; "
            f"k = {results.k_left} x {results.k_right} of at most {results.k_max}, "
            f"subspace {size(results.subspace_bytes)}",
        ),
        ("staleness", f"mean {results.staleness_mean:.2f}, max {results.staleness_max} (updates x age: {stale})"),
        (
            "time",
            f"{results.seconds:.0f} s federation of {results.clients} clients and {results.tasks} tasks, "
            f"{results.seconds_baselines:.0f} s baselines",
        ),
        ("run folder", results.run_dir),
    ]
