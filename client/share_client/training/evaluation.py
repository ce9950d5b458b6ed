"""Measuring an adapter and a head on a task's test rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.tasks_file import TaskConfig
from share_client.training.batches import sorted_batches
from share_client.training.inject import adapted, fixed_factors, injected
from share_client.training.loop import fresh_head
from share_client.training.options import EvaluationResult
from share_client.training.steps import part_rows
from share_core.errors import SpaceMismatchError
from share_core.types import Adapter

BATCH = 128
"""Most rows in one forward pass."""

WITHOUT_GRADIENT = 4
"""How many times the rows of one training pass fit into the memory where nothing is kept for a backward pass."""


def rows_at_once(config: TaskConfig) -> int:
    """Return the rows in one forward pass: who trains in small parts to save memory is not to run out of it here."""
    return min(BATCH, WITHOUT_GRADIENT * part_rows(config))


def evaluate(
    backbone: Backbone, task: PreparedTask, adapter: Adapter | None, head: Mapping[str, Tensor]
) -> EvaluationResult:
    """Measure the task's metric on its test rows.

    Args:
        backbone: the encoder; left as it was.
        task: from :func:`prepare_task` with the same backbone.
        adapter: ambient factors by site; None or empty is the frozen backbone.
        head: head tensors by name, as training returned them.

    Raises:
        SpaceMismatchError: the adapter has a site that the backbone does not, or of another shape.
        ConfigError: the head does not fit the task.
    """
    whole = judged_rows(backbone, task, adapter, head)
    return EvaluationResult(
        metric=task.kind.metric,
        value=task.kind.score(whole),
        rows=task.test_rows,
        details=task.kind.details(whole),
    )


def judged_rows(backbone: Backbone, task: PreparedTask, adapter: Adapter | None, head: Mapping[str, Tensor]) -> Tensor:
    """Return what the kind judges of every test row, (rows, n), always in one order. Raises as :func:`evaluate`."""
    module = fresh_head(backbone, task, 0, head)
    modules: dict[str, nn.Module] = {}
    for site, factors in (adapter or {}).items():
        if site not in backbone.sites:
            raise SpaceMismatchError(f"site {site!r} of the adapter does not exist in backbone {backbone.name}")
        base = backbone.site(site)
        expected = (base.d_out, base.d_in)
        got = (factors.out.shape[0], factors.in_.shape[0])
        if got != expected:
            raise SpaceMismatchError(f"site {site!r}: expected factors for {expected}, got {got}")
        modules[site] = adapted(base, fixed_factors(base, factors))
    judged: list[Tensor] = []
    with injected(backbone, modules), torch.inference_mode():
        for rows in sorted_batches(task.test, rows_at_once(task.config)):
            inputs, target = task.test.batch(rows, backbone.device)
            judged.append(task.kind.judge(task.kind.outputs(backbone, module, inputs), target).cpu())
    return torch.cat(judged)
