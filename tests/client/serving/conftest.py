"""Small models of every kind of adapted module, random spaces over them, and the obvious way to the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from share_core.types import Core, Cores, SiteBasis, Space

SHAPES = {"block.first": (7, 6), "block.second": (9, 7), "last": (5, 9)}
"""d_out, d_in of the sites of :class:`Toy`."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.second: nn.Module = Conv1D(9, 7)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class Toy(nn.Module):
    """A linear map, GPT-2's Conv1D, something between the layers that a test may set, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.last = nn.Linear(9, 5)
        self.between: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.block(x))
        self.between()
        out: Tensor = self.last(hidden)
        return out


def toy(seed: int = 0) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Toy()
        nn.init.normal_(model.get_parameter("block.second.weight"), std=0.4)
        return model.eval()


def space_over(
    shapes: Mapping[str, tuple[int, int]],
    tasks: int,
    k_out: int,
    k_in: int,
    p: int,
    seed: int = 0,
    version: int = 1,
    missing: int = 0,
) -> Space:
    """Return a space of tasks ``org/t0``, ...; every task leaves out the sites that ``missing`` and it hit on."""
    draw = torch.Generator().manual_seed(seed)

    def basis(rows: int, columns: int) -> Tensor:
        q: Tensor = torch.linalg.qr(torch.randn(rows, rows, generator=draw)).Q[:, : min(rows, columns)]
        return q.contiguous()

    bases = {site: SiteBasis(basis(d_out, k_out), basis(d_in, k_in)) for site, (d_out, d_in) in shapes.items()}
    cores: dict[str, Cores] = {}
    for task in range(tasks):
        rank = 1 + (p - 1) * (task % 2)  # ranks differ between tasks
        cores[f"org/t{task}"] = {
            site: Core(torch.randn(b.k_out, rank, generator=draw), torch.randn(b.k_in, rank, generator=draw))
            for number, (site, b) in enumerate(bases.items())
            if not missing or (task + number) % (missing + 1)
        }
    return Space(version, bases, cores)


def dense(space: Space, task: str, site: str) -> Tensor:
    """Return dW (d_out, d_in) in float64."""
    core, basis = space.cores[task][site], space.bases[site]
    left, right = basis.left.double() @ core.out.double(), basis.right.double() @ core.in_.double()
    return left @ right.T


def with_weights(model: nn.Module, space: Space, task: str | None) -> nn.Module:
    """Return a copy of the model with a task written into its weights."""
    changed = copy.deepcopy(model)
    for site in space.cores[task] if task else ():
        module = changed.get_submodule(site)
        weight = module.weight
        assert isinstance(weight, Tensor)
        change = dense(space, task or "", site)
        change = change.T if isinstance(module, Conv1D) else change.reshape(weight.shape)
        weight.data = (weight.double() + change).to(weight.dtype)
    return changed


def row_by_row(model: nn.Module, space: Space, tasks: list[str | None], x: Tensor) -> Tensor:
    """Return what a mixed batch must give: every row alone, through weights that hold its task."""
    with torch.no_grad():
        return torch.cat([with_weights(model, space, task)(x[row : row + 1]) for row, task in enumerate(tasks)])


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Toy]:
    return toy


@pytest.fixture(scope="session")
def shapes() -> Mapping[str, tuple[int, int]]:
    return SHAPES


@pytest.fixture(scope="session")
def make_space() -> Callable[..., Space]:
    return space_over


@pytest.fixture(scope="session")
def dense_change() -> Callable[..., Tensor]:
    return dense


@pytest.fixture(scope="session")
def expected() -> Callable[..., Tensor]:
    return row_by_row


@pytest.fixture(scope="session")
def written() -> Callable[..., nn.Module]:
    return with_weights
