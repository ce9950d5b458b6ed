"""One version of a space made ready for serving: the bases once, the coefficients of all tasks in one tensor a site.

At a site a task changes ``y = W x`` to ``y = W x + left C right^T x`` (MATH section 2). ``right`` and ``left`` are
common to all tasks, so a batch of mixed tasks needs two products with them for all rows together, and between those one
small product per row. For ``z = right^T x`` of a row that small product is ``C z``, or ``E_o (E_i^T z)`` where the
factors of rank p are fewer numbers than the core, ``p (k_out + k_in) < k_out k_in``. The record of decision 18 has the
costs that were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from share_client.backbones.places import Place
from share_core.errors import TensorShapeError
from share_core.space import check_core
from share_core.types import Core, SiteBasis, Space

Heads = Mapping[str, Mapping[str, Tensor]]
"""Head tensors by task id: ``weight`` (classes, width) and perhaps ``bias`` (classes,)."""


@dataclass(frozen=True)
class RowCores:
    """The coefficients of a batch at one site: one matrix per row, or one matrix that all rows have in common."""

    in_: Tensor
    """(rows, k_in, p) or (k_in, p); the whole transposed core where ``out`` is None, and then p is k_out."""
    out: Tensor | None
    """(rows, p, k_out) or (p, k_out)."""

    @property
    def rows(self) -> int:
        """How many rows have a matrix of their own; 1 where all have the same."""
        return 1 if self.in_.ndim == 2 else int(self.in_.shape[0])

    def apply(self, z: Tensor) -> Tensor:
        """Map coordinates (rows, n, k_in) to (rows, n, k_out)."""
        z = z @ self.in_
        return z if self.out is None else z @ self.out


@dataclass(frozen=True)
class SiteStack:
    """The bases of one site and the coefficients of every task there. Entry 0 is zero: the backbone alone."""

    left_t: Tensor
    """(k_out, d_out)"""
    right: Tensor
    """(d_in, k_in)"""
    in_: Tensor
    """(tasks + 1, k_in, p), or (tasks + 1, k_in, k_out) where ``out`` is None."""
    out: Tensor | None
    """(tasks + 1, p, k_out), or None: ``in_`` holds whole cores, transposed."""

    def rows(self, entries: Tensor | int) -> RowCores:
        """Return the coefficients of each row; of all rows at once if they have one task."""
        if isinstance(entries, int):
            return RowCores(self.in_[entries], None if self.out is None else self.out[entries])
        return RowCores(
            self.in_.index_select(0, entries), None if self.out is None else self.out.index_select(0, entries)
        )

    def change(self, entry: int) -> Tensor:
        """Return one task's dW (d_out, d_in) in float32, of the factors as they are held."""
        core_t = self.in_[entry].float() if self.out is None else self.in_[entry].float() @ self.out[entry].float()
        return (self.right.float() @ core_t @ self.left_t.float()).T

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what all tasks share, and what grows with them."""
        return [self.left_t, self.right], [self.in_] if self.out is None else [self.in_, self.out]


@dataclass(frozen=True, eq=False)
class ServedVersion:
    """A version of the space on the model's devices. Never changed; replaced as a whole."""

    version: int
    entries: Mapping[str, int]
    """Task id to its entry in every stack."""
    stacks: Mapping[str, SiteStack]
    """By site; sites at which no task changes anything are absent."""
    heads: Heads

    @property
    def shared_bytes(self) -> int:
        """Bytes of the bases, however many tasks there are."""
        return sum(_bytes(stack.tensors()[0]) for stack in self.stacks.values())

    @property
    def task_bytes(self) -> int:
        """Bytes of the coefficients of all tasks; heads are not counted."""
        return sum(_bytes(stack.tensors()[1]) for stack in self.stacks.values())


def build_version(space: Space, places: Mapping[str, Place], heads: Heads) -> ServedVersion:
    """Return a version ready for serving, in the dtype and on the device of each adapted module.

    Raises:
        TensorShapeError: a core or a head does not fit, or a task changes a site that the model lacks.
    """
    tasks = sorted(space.cores)
    for task in tasks:
        unknown = sorted(set(space.cores[task]) - set(places))
        if unknown:
            raise TensorShapeError(f"version {space.version}: task {task!r} changes site {unknown[0]!r}, unknown here")
    stacks: dict[str, SiteStack] = {}
    for site, place in places.items():
        cores = [space.cores[task].get(site) for task in tasks]
        if any(core is not None for core in cores):
            what = f"version {space.version}, site {site}"
            stacks[site] = _stack(what, space.bases[site], cores, place.compute_dtype(), place.device)
    return ServedVersion(
        version=space.version,
        entries={task: entry for entry, task in enumerate(tasks, start=1)},
        stacks=stacks,
        heads=_heads(heads, next(iter(places.values()), None)),
    )


def _stack(
    what: str, basis: SiteBasis, cores: Sequence[Core | None], dtype: torch.dtype, device: torch.device
) -> SiteStack:
    for core in cores:
        if core is not None:
            check_core(what, core, basis)
    k_out, k_in, p = basis.k_out, basis.k_in, max(core.rank for core in cores if core is not None)
    whole = p * (k_out + k_in) >= k_out * k_in
    in_ = torch.zeros(len(cores) + 1, k_in, k_out if whole else p)
    out = None if whole else torch.zeros(len(cores) + 1, p, k_out)
    for entry, core in enumerate(cores, start=1):
        if core is None:
            continue
        if out is None:
            in_[entry] = core.in_ @ core.out.T
        else:
            in_[entry, :, : core.rank] = core.in_
            out[entry, : core.rank] = core.out.T
    return SiteStack(
        left_t=basis.left.T.to(device, dtype).contiguous(),
        right=basis.right.to(device, dtype),
        in_=in_.to(device, dtype),
        out=None if out is None else out.to(device, dtype),
    )


def _heads(heads: Heads, beside: Place | None) -> Heads:
    """Return heads that were looked at, where an adapted module is."""
    for task, tensors in heads.items():
        if not is_linear(tensors):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise TensorShapeError(
                f"head of task {task!r}: expected weight (classes, width) and perhaps bias (classes,), got {shapes}"
            )
    device, dtype = (None, None) if beside is None else (beside.device, beside.compute_dtype())
    return {task: {name: t.to(device, dtype) for name, t in tensors.items()} for task, tensors in heads.items()}


def is_linear(head: Mapping[str, Tensor]) -> bool:
    """Return whether head tensors are those of one linear map."""
    weight, bias = head.get("weight"), head.get("bias")
    if weight is None or weight.ndim != 2 or set(head) - {"weight", "bias"}:
        return False
    return bias is None or bias.shape == weight.shape[:1]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
