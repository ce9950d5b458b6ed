"""The policy under which a version is made, as it is recorded with the version: what a replay needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from share_core.merge import MergePolicy
from share_core.mixing import Staleness
from share_core.robust.policy import OFF, RobustPolicy, robust_policy
from share_core.types import SpaceSpec
from share_server.config import MergeConfig

Rule = Literal["constant", "polynomial", "hinge"]


@dataclass(frozen=True)
class StepPolicy:
    """Everything that decides what a merge makes of its updates."""

    k_max: int
    """Largest number of basis vectors per site and side."""
    tau: float
    """Share of a task's norm that appending may leave out."""
    refits: int
    """Most tasks that one merge projects anew."""
    mixing: str
    """``mean``, ``fedasync`` or ``fedbuff``: how contributions to a shared task become one."""
    staleness: str
    """``constant``, ``polynomial`` or ``hinge``."""
    staleness_a: float
    """Strength of the staleness rule."""
    staleness_b: float
    """Versions that the hinge rule forgives."""
    alpha: float
    """Mixing rate of fedasync, server rate of fedbuff."""
    rows_cap: int
    """Declared rows weigh up to this number; 0: not at all."""
    robust: RobustPolicy = OFF
    """Who is judged, capped and held; off in versions of before."""

    @property
    def merge(self) -> MergePolicy:
        """The part that the merge itself takes."""
        return MergePolicy(k_max=self.k_max, tau=self.tau, refits=self.refits, influence=self.robust.influence)

    @property
    def most_rank(self) -> int:
        """Most rank that one merge takes in, over all its updates together, so that a version stays of bounded size."""
        return 4 * self.k_max

    @property
    def rule(self) -> Staleness:
        """The staleness rule."""
        return Staleness(cast(Rule, self.staleness), self.staleness_a, self.staleness_b)

    def to_text(self) -> str:
        """Return the policy as it is stored."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def policy_of(spec: SpaceSpec, config: MergeConfig, robust: RobustPolicy = OFF) -> StepPolicy:
    """Return the policy that the operator has set."""
    return StepPolicy(
        k_max=spec.k_max,
        tau=spec.tau,
        refits=config.refits,
        mixing=config.mixing,
        staleness=config.staleness,
        staleness_a=config.staleness_a,
        staleness_b=config.staleness_b,
        alpha=config.alpha,
        rows_cap=config.rows_cap,
        robust=robust,
    )


def policy_from_text(text: str) -> StepPolicy:
    """Read what :meth:`StepPolicy.to_text` wrote."""
    return policy_from_values(json.loads(text))


def policy_from_values(values: Mapping[str, Any]) -> StepPolicy:
    """Read a policy as it stands in an entry of the hash chain."""
    return StepPolicy(**{**values, "robust": robust_policy(values.get("robust"))})
