"""Accuracy of merged adapters, with the heads of honest clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.training.batches import sorted_batches
from share_client.training.evaluation import BATCH
from share_client.training.factors import FixedFactors
from share_client.training.inject import adapted, injected
from share_core.types import Adapter

Head = Mapping[str, Tensor]
"""``weight`` and ``bias`` of a linear head."""


def features_of(backbone: Backbone, task: PreparedTask, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return (features (rows, width), targets (rows,)) of the test rows: the costly part, the same for all heads."""
    modules = {}
    for site, factors in adapter.items():
        base = backbone.site(site)
        out, in_ = (part.to(base.device, base.compute_dtype()) for part in (factors.out, factors.in_))
        modules[site] = adapted(base, FixedFactors(out, in_))
    found: list[Tensor] = []
    targets: list[Tensor] = []
    with injected(backbone, modules), torch.inference_mode():
        for rows in sorted_batches(task.test, BATCH):
            inputs, target = task.test.batch(rows, backbone.device)
            found.append(backbone.features(inputs))
            targets.append(target)
    return torch.cat(found), torch.cat(targets)


def accuracy(features: Tensor, targets: Tensor, heads: Sequence[Head]) -> float:
    """Return the mean accuracy over heads; features that are not finite are wrong answers."""
    return _mean([float((_answers(features, head) == targets).double().mean()) for head in heads])


def fooled(features: Tensor, targets: Tensor, heads: Sequence[Head], wanted: int = 0) -> float:
    """Return the share of rows of other classes that are taken for the ``wanted`` one, mean over heads."""
    others = targets != wanted
    return _mean([float((_answers(features[others], head) == wanted).double().mean()) for head in heads])


def _answers(features: Tensor, head: Head) -> Tensor:
    scores = features @ head["weight"].T + head["bias"]
    finite = torch.isfinite(scores).all(dim=1)
    return torch.where(finite, scores.argmax(dim=1), -1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
