"""What streaming keeps between two merges: frozen values, stacked over sites of equal shape.

Shapes, with S sites in a stack, ``k_out``, ``k_in`` basis vectors, n tasks, p the largest rank among those tasks:

==========================  =============================================================================
``SiteStack.left``          (S, d_out, k_out) float32, orthonormal columns
``SiteStack.right``         (S, d_in, k_in)
``SiteStack.gram_left``     (S, k_out, k_out) float64: sum over settled tasks of ``w_t C_t C_t^T``, an upper bound
``TaskChunk.out``           (S, n, k_out', p) float32: cores ``C_t = out_t in_t^T``; k' as when the chunk was made
``TaskChunk.map_left``      (S, k_out, k_out') float64: ``C_now = map_left C map_right^T``; None is the identity
``TaskChunk.bounds``        (S, n) float64: error bound per site and task when the chunk was made
==========================  =============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.errors import ConfigError
from share_core.types import Adapter, SiteBasis, SiteSpec


@dataclass(frozen=True)
class StreamPolicy:
    """How a streamed subspace grows and shrinks."""

    k_max: int = 64
    """Largest number of basis vectors per site and side."""
    tau: float = 0.0
    """Share of an adapter's norm that appending may leave out; 0 keeps all that is not rounding noise."""
    window: int = 16
    """The newest tasks, up to twice this many, whose cores enter the choice of directions one by one; older ones enter
    through their Gram matrices."""
    sweeps: int = 1
    """HOOI sweeps after the HOSVD start."""
    rank: int | None = None
    """Pseudo-rank p: largest rank of a stored core; what is cut is charged to the ledger. None: the adapter's own."""
    site_caps: Mapping[str, tuple[int, int]] | None = None
    """Caps (out, in) of single sites where they differ from ``k_max``."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        caps = [self.k_max, *(cap for pair in (self.site_caps or {}).values() for cap in pair)]
        if min(caps) < 1:
            raise ConfigError(f"a cap must be at least 1, got {min(caps)}")
        if not 0 <= self.tau < 1:
            raise ConfigError(f"tau must be at least 0 and below 1, got {self.tau}")
        if self.window < 1 or self.sweeps < 0 or (self.rank is not None and self.rank < 1):
            raise ConfigError(
                f"expected window >= 1, sweeps >= 0 and rank >= 1, got {self.window}, {self.sweeps}, {self.rank}"
            )

    def caps(self, site: str) -> tuple[int, int]:
        """Return the caps (out, in) of a site."""
        return (self.site_caps or {}).get(site, (self.k_max, self.k_max))


@dataclass(frozen=True)
class TaskChunk:
    """Cores of some tasks at the sites of one stack, in the coordinates of the moment the chunk was made."""

    tasks: tuple[str, ...]
    out: Tensor
    in_: Tensor
    weights: Tensor
    """(n,) float64: ``w_t``."""
    norms: Tensor
    """(S, n) float64: ``||dW_t||`` as submitted."""
    bounds: Tensor
    measured: Tensor
    """(n,) bool: True while ``bounds`` are exact, because nothing has been cut from the task since."""
    map_left: Tensor | None = None
    map_right: Tensor | None = None
    pending: Tensor | None = None
    """(S,) float64: bound on ``sqrt(w_t)`` times what any of these tasks lost since; None is nothing."""
    cuts: int = 0
    """Compactions since the chunk was made."""

    @property
    def count(self) -> int:
        """Number of tasks n."""
        return len(self.tasks)


@dataclass(frozen=True)
class SiteStack:
    """Sites of equal shape and equal basis sizes."""

    names: tuple[str, ...]
    left: Tensor
    right: Tensor
    gram_left: Tensor
    gram_right: Tensor
    settled: tuple[TaskChunk, ...]
    """Older tasks, oldest and largest chunk first."""
    recent: TaskChunk
    """The newest tasks, in current coordinates: its maps are always None."""

    @property
    def k_out(self) -> int:
        """Left basis vectors."""
        return int(self.left.shape[-1])

    @property
    def k_in(self) -> int:
        """Right basis vectors."""
        return int(self.right.shape[-1])

    @property
    def chunks(self) -> tuple[TaskChunk, ...]:
        """All tasks, oldest first."""
        return (*self.settled, self.recent)


@dataclass(frozen=True)
class StreamState:
    """One version of a streamed subspace."""

    stacks: tuple[SiteStack, ...]
    tasks: tuple[str, ...]
    """Every task in arrival order, also those that change nothing."""
    version: int = 0


def empty_chunk(stack_size: int, k_out: int, k_in: int, device: torch.device) -> TaskChunk:
    """Return a chunk without tasks."""

    def real(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    return TaskChunk(
        tasks=(),
        out=torch.zeros(stack_size, 0, k_out, 0, device=device),
        in_=torch.zeros(stack_size, 0, k_in, 0, device=device),
        weights=real(0),
        norms=real(stack_size, 0),
        bounds=real(stack_size, 0),
        measured=torch.zeros(0, dtype=torch.bool, device=device),
    )


def empty_stream(sites: Mapping[str, SiteSpec], device: torch.device | str = "cpu") -> StreamState:
    """Return version 0: no directions, no tasks."""
    none = {
        name: SiteBasis(torch.zeros(site.d_out, 0), torch.zeros(site.d_in, 0)) for name, site in sorted(sites.items())
    }
    return seeded_stream(none, device)


def seeded_stream(bases: Mapping[str, SiteBasis], device: torch.device | str = "cpu") -> StreamState:
    """Return version 0 of a subspace that starts from given orthonormal bases and has no tasks.

    Sites of equal shape and size are stacked. The directions give way to what tasks need, see
    :mod:`share_core.cold_start`.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, basis in sorted(bases.items()):
        groups.setdefault((*basis.left.shape, *basis.right.shape), []).append(name)
    return StreamState(
        tuple(
            seeded_stack(
                names,
                torch.stack([bases[name].left for name in names]).to(device, torch.float32),
                torch.stack([bases[name].right for name in names]).to(device, torch.float32),
            )
            for names in groups.values()
        ),
        tasks=(),
    )


def seeded_stack(names: list[str], left: Tensor, right: Tensor) -> SiteStack:
    """Return a stack with given bases (S, d_out, k_out), (S, d_in, k_in) and no tasks."""
    s, k_out, k_in = left.shape[0], left.shape[-1], right.shape[-1]
    return SiteStack(
        names=tuple(names),
        left=left,
        right=right,
        gram_left=torch.zeros(s, k_out, k_out, dtype=torch.float64, device=left.device),
        gram_right=torch.zeros(s, k_in, k_in, dtype=torch.float64, device=left.device),
        settled=(),
        recent=empty_chunk(s, k_out, k_in, left.device),
    )


def stacked_factors(stack: SiteStack, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return the adapter's factors at the sites of a stack, (S, d_out, r) and (S, d_in, r) in float32.

    Ranks are padded with zero columns and a missing site is zero: neither changes dW.
    """
    rank = max((adapter[name].rank for name in stack.names if name in adapter), default=0)
    out = stack.left.new_zeros(len(stack.names), stack.left.shape[-2], rank)
    in_ = stack.right.new_zeros(len(stack.names), stack.right.shape[-2], rank)
    for i, name in enumerate(stack.names):
        if name in adapter:
            own = adapter[name]
            out[i, :, : own.rank].copy_(own.out)
            in_[i, :, : own.rank].copy_(own.in_)
    return out, in_
