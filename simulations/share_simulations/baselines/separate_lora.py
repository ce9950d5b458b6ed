"""What each task reaches alone: the frozen backbone with a trained head, and a LoRA of its own.

Both are trained here, after the federation has finished, on the very rows, epochs and seeds of the clients' own
tasks.toml, with the client's own training code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from share_simulations.scenario import Scenario, client_folder

if TYPE_CHECKING:
    from share_client.backbones import Backbone
    from share_client.tasks_file import TaskConfig

LORA_RANK = 8


@dataclass(frozen=True)
class Baseline:
    """One task alone."""

    frozen: float
    """Accuracy of a head on the frozen backbone."""
    lora: float
    """Accuracy of a separate LoRA of rank ``LORA_RANK`` with a head."""
    rows: int
    """Training rows."""
    test_rows: int
    classes: int


def measure_baselines(
    scenario: Scenario, clients: Path, note: Callable[[str], None], threads: int | None
) -> dict[str, Baseline]:
    """Train and measure every task of ``scenario`` alone, from the files below ``clients``; by task id.

    Raises:
        ConfigError: a tasks.toml or a data file cannot be used.
    """
    import torch

    from share_client.tasks_file import read_tasks
    from share_client.training import load_backbone

    if threads is not None:
        torch.set_num_threads(threads)
    backbone = load_backbone(scenario.backbone, scenario.device)
    results: dict[str, Baseline] = {}
    for client in scenario.clients:
        file = read_tasks(client_folder(clients, client) / "tasks.toml")
        for config in file.tasks:
            task_id = f"{client.organisation}/{config.name}"
            results[task_id] = _measure(config, backbone)
            count = f"{len(results)}/{len(scenario.task_ids)}"
            note(f"separate LoRA {count}: {task_id} {results[task_id].lora:.3f}")
    return results


def _measure(config: TaskConfig, backbone: Backbone) -> Baseline:
    from share_client.training import TrainingOptions, evaluate, prepare_task, train_lora

    # The pace only imitates slow hardware.
    task = prepare_task(replace(config, pace=0.0), backbone)
    options = TrainingOptions.of(task.config)
    frozen = train_lora(backbone, task, 0, options)
    lora = train_lora(backbone, task, LORA_RANK, options)
    return Baseline(
        frozen=evaluate(backbone, task, None, frozen.head).value,
        lora=evaluate(backbone, task, lora.adapter, lora.head).value,
        rows=task.train_rows,
        test_rows=task.test_rows,
        classes=len(task.classes),
    )


def means(baselines: Mapping[str, Baseline]) -> tuple[float, float] | None:
    """Return the mean accuracies (frozen, LoRA) over tasks; None without any."""
    if not baselines:
        return None
    count = len(baselines)
    return (
        sum(b.frozen for b in baselines.values()) / count,
        sum(b.lora for b in baselines.values()) / count,
    )
