"""A subspace before anybody has trained: the backbone's own strongest directions, as LoRA-XS uses them.

Every party could compute them, but signs and hardware differ; so one party does, submits the bases once as version 0,
and all others fetch them by hash (MATH section 2, cold start). :func:`share_core.streaming.state.seeded_stream` starts
from them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from share_core.errors import TensorShapeError
from share_core.linalg import float64, require_finite
from share_core.types import SiteBasis, SpaceSpec


def backbone_bases(weights: Mapping[str, Tensor], spec: SpaceSpec, k: int) -> dict[str, SiteBasis]:
    """Return the top ``k`` left and right singular vectors of every adapted weight, float32.

    Signs are fixed: the largest entry of every left vector is positive. Sites with fewer than k dimensions give all.

    Args:
        weights: frozen weights (d_out, d_in) by site.
        spec: the space; its sites are the ones wanted.
        k: vectors per site and side, at most ``spec.k_max``.

    Raises:
        TensorShapeError: if a weight is missing, does not fit its site, or k is out of range.
        NonFiniteError: if a weight holds NaN or infinity.
    """
    if not 1 <= k <= spec.k_max:
        raise TensorShapeError(f"cold start: expected 1 to {spec.k_max} directions, got {k}")
    bases: dict[str, SiteBasis] = {}
    for name, site in spec.sites.items():
        weight = weights.get(name)
        if weight is None or tuple(weight.shape) != (site.d_out, site.d_in):
            got = "none" if weight is None else tuple(weight.shape)
            raise TensorShapeError(
                f"cold start: weight of site {name!r}: expected {site.d_out} x {site.d_in}, got {got}"
            )
        require_finite(weight, f"weight of site {name!r}")
        u, _, vh = torch.linalg.svd(float64(weight), full_matrices=False)
        left, right = u[:, :k], vh[:k].T
        sign = torch.where(left.gather(0, left.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(left.dtype)
        bases[name] = SiteBasis((left * sign).to(torch.float32), (right * sign).to(torch.float32))
    return bases
