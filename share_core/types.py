"""The frozen values that everything else computes with.

Shapes, with ``k_out``, ``k_in`` the sizes of the two bases at a site, ``p`` the rank of a core, ``phi`` the number of
free directions and ``r`` the rank of an adapter:

==================  ==========================================================
``SiteBasis.left``  (d_out, k_out), orthonormal columns; the paper's beta
``SiteBasis.right`` (d_in, k_in), orthonormal columns; the paper's alpha
``Core``            ``out`` (k_out, p), ``in_`` (k_in, p); the core is ``C = out @ in_.T``
``Factors``         ``out`` (d_out, r), ``in_`` (d_in, r); the adapter is ``dW = out @ in_.T``
``SiteUpdate``      a core in a base version plus residual factors: ``dW = left C right.T + residual``
==================  ==========================================================

The right factor is always kept as (d_in, r), columns beside columns, so that both sides are treated by the same code.
PEFT's ``lora_A`` is ``in_.T`` and its scale is folded into ``out``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # processes that only hand such values on do without PyTorch
    from torch import Tensor


@dataclass(frozen=True)
class SiteSpec:
    """One adapted weight matrix of the backbone."""

    name: str
    """Module path inside the backbone, e.g. ``blocks.0.query``."""
    d_out: int
    """Rows of the weight."""
    d_in: int
    """Columns of the weight."""
    sha256: str
    """Fingerprint of the frozen weight, see :mod:`share_core.fingerprint`."""


@dataclass(frozen=True)
class SpaceSpec:
    """What a space is made for and how large it may grow; set by the operator at creation."""

    space_id: str
    """Fingerprint of the backbone: ``sha256:<hex>``."""
    backbone: str
    """Name of the backbone for people. Never an identity."""
    sites: Mapping[str, SiteSpec]
    """Adapted matrices by name."""
    k_max: int = 64
    """Largest number of basis vectors per site and side. Growth stops here; then the space compacts."""
    tau: float = 0.05
    """Share of a task's norm that appending may leave out, both sides together."""
    rank_limit: int = 64
    """Largest rank of one update at one site."""


@dataclass(frozen=True)
class Factors:
    """A low-rank matrix ``out @ in_.T``."""

    out: Tensor
    """(d_out, r)"""
    in_: Tensor
    """(d_in, r)"""

    @property
    def rank(self) -> int:
        """Number of columns r."""
        return int(self.out.shape[1])


class Core(Factors):
    """A low-rank matrix in subspace coordinates: ``out`` (k_out, p), ``in_`` (k_in, p)."""


@dataclass(frozen=True)
class SiteBasis:
    """The two orthonormal bases of one site."""

    left: Tensor
    """(d_out, k_out)"""
    right: Tensor
    """(d_in, k_in)"""

    @property
    def k_out(self) -> int:
        """Number of left basis vectors."""
        return int(self.left.shape[1])

    @property
    def k_in(self) -> int:
        """Number of right basis vectors."""
        return int(self.right.shape[1])


Adapter = Mapping[str, Factors]
"""LoRA at every site, by site name. Sites may be missing; ranks may differ."""

Cores = Mapping[str, Core]
"""A task in subspace coordinates, by site name."""


@dataclass(frozen=True)
class Space:
    """One published version: bases and the cores of every task."""

    version: int
    """0 is the empty subspace; every merge adds one."""
    bases: Mapping[str, SiteBasis]
    """By site name; every site of the spec is present, possibly with zero columns."""
    cores: Mapping[str, Cores]
    """By task id, then site name. A missing site means that the task does not change it."""


@dataclass(frozen=True)
class SiteUpdate:
    """What a client learned at one site. Either part may be absent, not both."""

    core: Core | None = None
    """Coordinates in the base version."""
    residual: Factors | None = None
    """Free directions that the base version could not express."""


@dataclass(frozen=True)
class Update:
    """What a client submits for one task."""

    base_version: int
    """Version in whose coordinates the cores are expressed."""
    sites: Mapping[str, SiteUpdate]
    """By site name."""
    head: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """Task head tensors the owner chose to share, by parameter name."""


@dataclass(frozen=True)
class SharedHead:
    """What the contributors to a task share of its head, in one version."""

    task_id: str
    """``organisation/name``."""
    version: int
    """The version with whose core it goes."""
    organisations: tuple[str, ...]
    """Whose heads it is the weighted mean of, sorted; none where nobody shares one."""
    left_out: tuple[str, ...]
    """Who shares one of other names or shapes than the newest, sorted: it is not in the mean."""
    schema_sha256: str
    """Digest of the label schema it was trained for; empty where it was not told."""
    tensors: Mapping[str, Tensor]
    """By parameter name; none where nobody shares one."""


@dataclass(frozen=True)
class SiteTransition:
    """How the bases of one site change: ``left' = [left append_left] @ rotate_left``, and likewise right."""

    append_left: Tensor
    """(d_out, q_out), orthonormal and orthogonal to ``left``. Zero columns: nothing new."""
    append_right: Tensor
    """(d_in, q_in)"""
    rotate_left: Tensor | None = None
    """(k_out + q_out, k_out'), full column rank. None: the identity, old coordinates only gain zeros."""
    rotate_right: Tensor | None = None
    """(k_in + q_in, k_in')"""


@dataclass(frozen=True)
class Delta:
    """The step from one version to the next, as it is broadcast."""

    version: int
    """The version it leads to; it starts from ``version - 1``."""
    transition: Mapping[str, SiteTransition]
    """By site name; sites that do not change are absent."""
    cores: Mapping[str, Cores]
    """New cores, in coordinates of ``version``, of the tasks this step merged. All others follow the transition."""

    @property
    def compacts(self) -> bool:
        """Whether any site is rotated, so that old coordinates change by more than zeros."""
        return any(s.rotate_left is not None or s.rotate_right is not None for s in self.transition.values())
