"""Figures out of samples: percentiles and slopes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not exceeded by ``share`` (0 to 1) of the values; NaN if there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 10_000) * len(ordered) // 10_000) - 1))]


def slope_per_minute(samples: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through (seconds, value), per minute; 0 for fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    mean_t = sum(t for t, _ in samples) / len(samples)
    mean_v = sum(v for _, v in samples) / len(samples)
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    return 60.0 * sum((t - mean_t) * (v - mean_v) for t, v in samples) / spread if spread else 0.0


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB
    except (OSError, IndexError):
        return 0.0


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used so far; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class RssSampler:
    """Samples the resident memory of some processes together while the ``with`` block runs."""

    def __init__(self, *pids: int, every_s: float = 1.0) -> None:
        self._pids = pids
        self._every_s = every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rss", daemon=True)
        self.samples: list[tuple[float, float]] = []
        """(monotonic seconds, MiB)."""

    def __enter__(self) -> RssSampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def peak(self) -> float:
        """Return the largest sample in MiB; 0 without samples."""
        return max((mib for _, mib in self.samples), default=0.0)

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            self.samples.append((time.monotonic(), sum(map(rss_mib, self._pids))))
