"""What this machine can do, measured in the run that is compared with it."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def matrix_product_rate(device: torch.device, size: int = 4096, repeats: int = 4) -> float:
    """Return floating-point operations per second of a large square float32 product: the best of some repeats.

    The strictest limit there is: products with few columns, which merging consists of, cannot reach it.
    """
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return 2.0 * size**3 / best_seconds(lambda: a @ b, device, repeats)


def skinny_product_rate(bases: torch.Tensor, columns: int, repeats: int = 3) -> float:
    """Return operations per second of the products that a merge consists of: every basis with a few columns, and back.

    Args:
        bases: (sites, d, k): all of them, so that they come from memory and not from the cache, as in a merge.
        columns: of the factor.
        repeats: timings, of which the best counts.
    """
    sites, d, k = bases.shape
    x = torch.randn(d, columns, device=bases.device)

    def passes() -> None:
        for basis in bases:
            torch.addmm(x, basis, basis.T @ x, alpha=-1)

    return 4.0 * sites * d * k * columns / best_seconds(passes, bases.device, repeats)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the shortest of some timings, after one that does not count."""
    work()
    return min(seconds(work, device) for _ in range(repeats))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of some work, waiting for an accelerator to finish."""
    return timed(work, device)[0]


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the wall time of some work and its result."""
    synchronise(device)
    begun = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - begun, result


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(device: torch.device) -> float:
    """Return the most memory that was used so far, in MiB: of the accelerator if there is one, else of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def describe(device: torch.device) -> dict[str, Any]:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is the GPU where there is one.

    Raises:
        ConfigError: if it is not there.
    """
    from share_core.errors import ConfigError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available here: use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"no device {name!r}: use auto, cpu or cuda") from None
