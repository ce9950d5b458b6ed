"""Training and evaluating tasks on a frozen backbone."""

from __future__ import annotations

from share_client.backbones import Backbone, load_backbone
from share_client.kinds import PreparedTask, prepare_task
from share_client.training import refit
from share_client.training.accounting import declare, total_epsilon
from share_client.training.evaluation import evaluate
from share_client.training.in_space import train_in_space
from share_client.training.loop import fits_head
from share_client.training.lora import train_lora
from share_client.training.options import EvaluationResult, LoraResult, Progress, TrainingOptions, TrainResult

__all__ = [
    "Backbone",
    "EvaluationResult",
    "LoraResult",
    "PreparedTask",
    "Progress",
    "TrainResult",
    "TrainingOptions",
    "declare",
    "evaluate",
    "fits_head",
    "load_backbone",
    "prepare_task",
    "refit",
    "total_epsilon",
    "train_in_space",
    "train_lora",
]
