"""The order of rows: shuffled, with rows of like length together so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from share_client.kinds import Rows

POOL = 8
"""Batches drawn at random at a time and sorted by length inside. More would save padding, but make batches alike."""


def epoch_batches(rows: Rows, batch_size: int, draw: torch.Generator) -> list[list[int]]:
    """Return every row once, in batches of random order.

    Args:
        rows: a split.
        batch_size: rows in a batch; the last may be smaller.
        draw: where the random order comes from.
    """
    lengths = rows.lengths()
    order = torch.randperm(len(rows), generator=draw).tolist()
    size = batch_size * POOL
    batches: list[list[int]] = []
    for start in range(0, len(order), size):
        pool = sorted(order[start : start + size], key=lambda row: lengths[row])
        batches.extend(pool[i : i + batch_size] for i in range(0, len(pool), batch_size))
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def sorted_batches(rows: Rows, batch_size: int) -> list[Sequence[int]]:
    """Return every row once, by length: for evaluation, where order means nothing."""
    lengths = rows.lengths()
    order = sorted(range(len(rows)), key=lambda row: lengths[row])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
