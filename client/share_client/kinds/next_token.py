"""What causal language modelling and instruction tuning share: rows of tokens of which some are to be predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from share_client.backbones import Backbone, Batch, DecoderBackbone
from share_client.kinds.fitting import misfit
from share_client.kinds.kind import Kind, PreparedTask
from share_client.kinds.texts import TextRows
from share_client.tasks_file import TaskConfig

SCORES = 2**25
"""Scores in memory at a time, at most: positions times tokens of the vocabulary."""


@dataclass(frozen=True)
class Tokens:
    """One row: tokens that are given, and tokens after them that are predicted, each from all before it."""

    given: Sequence[int]
    """At least one."""
    predicted: Sequence[int]
    """At least one."""

    def columns(self) -> dict[str, list[int]]:
        """Return what a batch is made of; padding is 0 in ``scored``."""
        tokens = [*self.given, *self.predicted]
        scored = [0] * len(self.given) + [1] * len(self.predicted)
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "scored": scored}


def token_rows(rows: Sequence[Tokens], backbone: DecoderBackbone) -> TextRows:
    """Return rows whose target is the number of their predicted tokens."""
    counts = torch.tensor([float(len(row.predicted)) for row in rows])
    return TextRows([row.columns() for row in rows], counts, backbone)


def decoder(config: TaskConfig, backbone: Backbone) -> DecoderBackbone:
    """Return the backbone of a task with next tokens.

    Raises:
        ConfigError: it predicts none.
    """
    if isinstance(backbone, DecoderBackbone):
        return backbone
    such_as = (
        'the directory of a causal language model, whose config.json says so in "architectures" (such as '
        "LlamaForCausalLM)"
    )
    raise misfit(config.name, config.kind, backbone, "predicts the next token", such_as)


class NextToken(Kind):
    """The next token, for the predicted tokens of each row. The backbone's own output map is used; there is no head."""

    metric = "token-accuracy"

    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a head without parameters."""
        return nn.Identity()

    def outputs(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        """Return of each row the sum of ``-log p`` over its predicted tokens, and how many are likeliest, (rows, 2).

        Scores are made for predicted tokens only, and for at most :data:`SCORES` numbers at a time: with a large
        vocabulary they would be most of the memory. Where that takes several runs, each is computed again in the
        backward pass.
        """
        assert isinstance(backbone, DecoderBackbone), "prepare has checked it"
        hidden = backbone.hidden(batch)
        row, position = batch["scored"][:, 1:].nonzero(as_tuple=True)
        states, wanted = hidden[row, position], batch["input_ids"][row, position + 1]
        size = max(1, SCORES // backbone.vocabulary)
        several = len(row) > size and states.requires_grad
        judged = [
            checkpoint(_judged, backbone, *run, use_reentrant=False) if several else _judged(backbone, *run)
            for run in zip(torch.split(states, size), torch.split(wanted, size), strict=True)
        ]
        found = hidden.new_zeros(len(hidden), 2, dtype=torch.float32)
        return found.index_add(0, row, torch.cat(judged))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over rows of each row's mean ``-log p``.

        Long rows weigh no more than short ones: so the loss of a row does not depend on the others in its batch.
        """
        return (outputs[:, 0] / targets).mean()

    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return of each row the sum of ``-log p``, the number of tokens that are right, and of all, (rows, 3)."""
        return torch.cat([outputs, targets.unsqueeze(1)], dim=1)

    def score(self, judged: Tensor) -> float:
        """Return the fraction of all predicted tokens that are the likeliest after the true ones before them."""
        total = judged.double().sum(dim=0)
        return float(total[1] / total[2])

    def details(self, judged: Tensor) -> Mapping[str, float]:
        """Return the perplexity: e to the mean ``-log p`` over all predicted tokens."""
        total = judged.double().sum(dim=0)
        return {"perplexity": math.exp(min(700.0, float(total[0] / total[2])))}


def _judged(backbone: DecoderBackbone, states: Tensor, wanted: Tensor) -> Tensor:
    """Return ``-log p`` of the wanted tokens and whether they are the likeliest, (positions, 2)."""
    scores = backbone.scores(states).float()
    cost = nn.functional.cross_entropy(scores, wanted, reduction="none")
    return torch.stack([cost, (scores.argmax(dim=1) == wanted).float()], dim=1)
