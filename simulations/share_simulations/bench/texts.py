"""Rows of real text tasks for benchmarks, and MiniLM made ready to train on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from share_client.tasks_file import TaskConfig
from share_client.training import Backbone, PreparedTask, prepare_task
from share_core.durable import PUBLIC, write_atomic
from share_simulations.text import choose_rows, read_lines


def text_task(
    backbone: Backbone, data: Path, folder: Path, name: str, rows: int, test_rows: int, draw: str = "", **settings: Any
) -> PreparedTask:
    """Choose rows of the task ``data/name``, write them below ``folder`` and read them as a client does.

    Args:
        backbone: what the texts are tokenised for.
        data: folder of text tasks, ``<task>/{train,test}.jsonl[.gz]``.
        folder: where the chosen rows are written, in a folder of their own.
        name: the task.
        rows: most training rows.
        test_rows: most test rows.
        draw: training rows depend on this and the name alone; test rows on the name alone.
        settings: epochs, batch_size, max_length, seed: see :class:`~share_client.tasks_file.TaskConfig`.

    Raises:
        ConfigError: the files are missing or cannot be read.
    """
    train, test = draw_rows(data, folder, name, rows, test_rows, draw)
    return prepare_task(TaskConfig(name, "text-classification", train, test, **settings), backbone)


def draw_rows(data: Path, folder: Path, name: str, rows: int, test_rows: int, draw: str = "") -> tuple[Path, Path]:
    """Choose rows for :func:`text_task` and return the files of the training and the test rows.

    Processes of one benchmark may draw the same rows at the same time: whoever reads a file finds it whole.
    """
    chosen = {
        "train": with_every_class(read_lines(data / name, "train"), rows, f"{draw}/{name}/train"),
        "test": choose_rows(read_lines(data / name, "test"), test_rows, f"{name}/test"),
    }
    own = folder / f"{name}-{rows}{draw and '-'}{draw}"
    own.mkdir(parents=True, exist_ok=True)
    for part, lines in chosen.items():
        write_atomic(own / f"{part}.jsonl", "".join(f"{line}\n" for line in lines).encode(), PUBLIC)
    return own / "train.jsonl", own / "test.jsonl"


def with_every_class(lines: Sequence[str], limit: int, seed: str) -> list[str]:
    """Return :func:`~share_simulations.text.choose_rows`, in which every label occurs if there is room.

    A label that the choice would leave out takes the place of the last row whose own label occurs again.
    """
    order = choose_rows(lines, len(lines), seed)
    chosen, rest = order[:limit], order[limit:]
    labels = [_label(line) for line in chosen]
    for line in rest:
        label = _label(line)
        if label in labels:
            continue
        spare = [i for i, own in enumerate(labels) if labels.count(own) > 1]
        if not spare:
            break
        chosen[spare[-1]], labels[spare[-1]] = line, label
    return chosen


def _label(line: str) -> str:
    return str(json.loads(line)["label"])
