"""Counting the floating-point operations of a piece of work while it runs, not from a formula about it.

PyTorch's counter knows products; the in-place products and the factorisations that a merge uses are added here, with
the leading term of their textbook cost (Golub and Van Loan, Matrix Computations).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """Return a context manager; afterwards ``get_total_flops()`` is the number of operations."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten.addmm_: _product,
            aten.baddbmm_: _product,
            aten.linalg_cholesky_ex: _cholesky,
            aten.linalg_solve_triangular: _triangular,
            aten.linalg_qr: _qr,
        },
    )


def _product(out: Any, a: Any, b: Any, *args: Any, **more: Any) -> int:
    """``out + a b``: 2 m k n."""
    return 2 * _size(a) * int(b[-1])


def _cholesky(a: Any, *args: Any, **more: Any) -> int:
    """n^3 / 3."""
    return _size(a) * int(a[-1]) // 3


def _triangular(a: Any, b: Any, *args: Any, **more: Any) -> int:
    """n^2 per right-hand side."""
    return _size(b) * int(a[-1])


def _qr(a: Any, *args: Any, **more: Any) -> int:
    """Reduced, with Q formed: 4 m n^2."""
    return 4 * _size(a) * int(a[-1])


def _size(shape: Any) -> int:
    return math.prod(int(n) for n in shape)
