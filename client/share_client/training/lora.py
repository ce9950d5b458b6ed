"""The baselines: a separate LoRA for each task, and the frozen backbone with a trained head."""

from __future__ import annotations

import time

import torch

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.training.factors import LoraFactors
from share_client.training.loop import fresh_head, head_tensors, train
from share_client.training.options import LoraResult, ProgressCallback, TrainingOptions
from share_core.types import Factors


def train_lora(
    backbone: Backbone,
    task: PreparedTask,
    rank: int,
    options: TrainingOptions,
    progress: ProgressCallback | None = None,
) -> LoraResult:
    """Train plain LoRA of ``rank`` at every site, with alpha = 2 rank and the usual start; rank 0 trains the head only.

    Rows, epochs, order of rows, head and learning rate are those of :func:`train_in_space` with the same options;
    ``directions`` and ``pseudo_rank`` have no meaning here.
    """
    began = time.monotonic()
    head = fresh_head(backbone, task, options.seed, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        changes = {
            site: LoraFactors(weight.shape[0], weight.shape[1], rank, alpha=2.0 * rank).to(backbone.device)
            for site, weight in (backbone.site_weights() if rank else {}).items()
        }
    trained = train(backbone, task, head, changes, options, progress)
    adapter: dict[str, Factors] = {}
    for site, change in changes.items():
        out, in_ = change.factors()
        adapter[site] = Factors(out.detach().cpu(), in_.detach().cpu())
    return LoraResult(
        adapter=adapter,
        head=head_tensors(head),
        loss=trained.loss,
        steps=trained.steps,
        seconds=time.monotonic() - began,
        trained_numbers=sum(p.numel() for change in changes.values() for p in change.parameters()),
    )
