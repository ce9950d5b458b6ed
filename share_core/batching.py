"""Computing many sites at once: stack what has equal shape, compute, hand back per name."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def stacks(items: Mapping[Key, tuple[Tensor, ...]]) -> Iterator[tuple[list[Key], tuple[Tensor, ...]]]:
    """Yield groups of names whose tensors have equal shapes, with each tensor stacked along a new first dimension.

    A backbone has hundreds of sites of a handful of shapes; one batched decomposition per shape replaces hundreds of
    small ones.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[Key]] = {}
    for key, tensors in items.items():
        groups.setdefault(tuple(tuple(t.shape) for t in tensors), []).append(key)
    for keys in groups.values():
        columns = zip(*(items[key] for key in keys), strict=True)
        yield keys, tuple(torch.stack(list(column)) for column in columns)
