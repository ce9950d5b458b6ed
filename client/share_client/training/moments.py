"""What Adam knows, carried from the factors of a wide training to the narrow ones that are cut out of them.

Adam divides a running mean of the gradients by the root of that of their squares. Begun anew it first moves every
number by about the learning rate, whatever the gradient, and late in a training that undoes much of what was learned
(docs/adr/0021-starts-directions-and-budgets.md).

With ``G`` the gradient of the weight, that of B in ``B A.T`` is ``G A``. Columns ``A' = A c`` give ``G A' = (G A) c``:
the mean goes on as ``m c``, exactly while A stands still. Of the squares only the diagonal is known, hence
``v c^2``, which is right where the columns' gradients are not correlated. What of a new column the old ones do not span
counts as an average old column. The same holds for A, and for the two factors of the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from share_client.training.factors import SpaceFactors
from share_core.linalg import float64

Moments = Mapping[Tensor, Any]
"""Adam's state by parameter, as ``torch.optim`` keeps it: ``step``, ``exp_avg`` and ``exp_avg_sq``."""


def carried(wide: Mapping[str, SpaceFactors], kept: Mapping[str, SpaceFactors], moments: Moments) -> dict[Tensor, Any]:
    """Return ``moments`` with those of the kept factors beside them.

    Args:
        wide: what was trained, by site.
        kept: what was cut out of it, by site.
        moments: after the wide training.
    """
    found = dict(moments)
    for site, new in kept.items():
        old = wide[site]
        for was, becomes, old_other, new_other in (
            (old.free_out, new.free_out, old.free_in, new.free_in),
            (old.free_in, new.free_in, old.free_out, new.free_out),
            (old.core_out, new.core_out, old.core_in, new.core_in),
            (old.core_in, new.core_in, old.core_out, new.core_out),
        ):
            if becomes.numel() and was in moments:
                found[becomes] = _mapped(moments[was], old_other.detach(), new_other.detach())
    return found


def _mapped(state: Mapping[str, Tensor], old: Tensor, new: Tensor) -> dict[str, Tensor]:
    """Return the state of a factor whose other factor was ``old`` (d, r) and is now ``new`` (d, n)."""
    before, after = float64(old.cpu()), float64(new.cpu())
    mix = torch.linalg.pinv(before) @ after
    unseen = (after - before @ mix).square().sum(0)
    mean, square = float64(state["exp_avg"].cpu()), float64(state["exp_avg_sq"].cpu())
    lengths = before.square().sum(0).clamp_min(torch.finfo(before.dtype).tiny)
    average = (square / lengths).mean(1, keepdim=True)
    return {
        "step": state["step"].clone(),
        "exp_avg": (mean @ mix).to(state["exp_avg"]),
        "exp_avg_sq": (square @ mix.square() + average * unseen).to(state["exp_avg_sq"]),
    }
