"""What one member, one organisation, and all uploads together may cost: token buckets, and bytes in flight.

Everything here runs on the event loop, so that no lock is needed: a call is either taken from every bucket, or from
none. Quotas count per organisation beside per member, because an operator gives certificates to organisations, and one
that holds many must not get more than its share.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from share_core.errors import OverloadError
from share_server.config import LimitConfig

BURST_S = 2.0
"""A bucket holds so many seconds' worth, and at least one payload."""

_MOST_BUCKETS = 16_384
_SHORTEST_MS, _LONGEST_MS = 50, 60_000
_FIRST_HOLD_S = 0.5
_CROWD_S = 3.0
_HOLD_WEIGHT = 0.1


class Bucket:
    """A token bucket: ``rate`` tokens per second flow in, at most ``capacity`` are kept. It begins full."""

    def __init__(self, rate: float, capacity: float, now_s: float) -> None:
        self.rate = rate
        self.capacity = capacity
        self._level = capacity
        self._last = now_s

    def wait_s(self, cost: float, now_s: float) -> float:
        """Return the seconds until ``cost`` tokens are there; 0 if they are. Nothing is taken.

        A cost above the capacity counts as the capacity: it is admitted from a full bucket and leaves a debt.
        """
        self._level = min(self.capacity, self._level + max(0.0, now_s - self._last) * self.rate)
        self._last = now_s
        return max(0.0, min(cost, self.capacity) - self._level) / self.rate

    def take(self, cost: float) -> None:
        """Take ``cost`` tokens; call :meth:`wait_s` before, in the same step of the event loop."""
        self._level -= cost


class Buckets:
    """One bucket per name. The one unused for longest is forgotten when there are too many."""

    def __init__(self, rate: float, capacity: float, most: int = _MOST_BUCKETS) -> None:
        self._rate = rate
        self._capacity = capacity
        self._most = most
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def of(self, name: str, now_s: float) -> Bucket:
        """Return the bucket of ``name``, a full one the first time."""
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket(self._rate, self._capacity, now_s)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        return bucket


@dataclass(frozen=True)
class _Rule:
    """One limit that is set."""

    per_member: bool
    in_bytes: bool
    buckets: Buckets
    sentence: str


class Quota:
    """The limits of one hub, applied to uploads."""

    def __init__(self, limits: LimitConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the limits; ``clock`` gives seconds that never go back."""
        self._limits = limits
        self._clock = clock
        self._rules = _rules(limits)
        self._hold_s = _FIRST_HOLD_S
        self.bytes_in_flight = 0
        """Payload bytes that are being received now."""

    def admit(self, member: str, organisation: str, size: int) -> None:
        """Count one upload of ``size`` payload bytes (what is still to be sent) by ``organisation/name``.

        Raises:
            OverloadError: a limit is used up; nothing was counted. The hint is when the last of them has room.
        """
        now = self._clock()
        costs = []
        longest, sentence = 0.0, ""
        for rule in self._rules:
            name = member if rule.per_member else organisation
            bucket, cost = rule.buckets.of(name, now), float(size) if rule.in_bytes else 1.0
            costs.append((bucket, cost))
            if (wait := bucket.wait_s(cost, now)) > longest:
                longest, sentence = wait, rule.sentence.format(name=name)
        if longest > 0:
            hint = retry_ms(longest)
            raise OverloadError(f"{sentence}: try again in {hint} ms", hint)
        for bucket, cost in costs:
            bucket.take(cost)

    @contextmanager
    def in_flight(self, size: int) -> Iterator[None]:
        """Hold ``size`` payload bytes of the budget while the block runs. One upload is always let in.

        Raises:
            OverloadError: the budget is used up; the hint is how long uploads have taken lately.
        """
        most = self._limits.inflight_bytes
        if self.bytes_in_flight and self.bytes_in_flight + size > most:
            hint = retry_ms(self._hold_s)
            raise OverloadError(
                f"{self.bytes_in_flight} bytes are being received, and {size} more would be above {most}: "
                f"try again in {hint} ms",
                hint,
            )
        begun = self._clock()
        self.bytes_in_flight += size
        try:
            yield
        finally:
            self.bytes_in_flight -= size
            self._hold_s += _HOLD_WEIGHT * (self._clock() - begun - self._hold_s)


class Crowd:
    """How many want in, against how many get in: from this follows when somebody who was turned away should come again.

    If everybody came back after the time that one upload takes, most would be turned away again, and turning away costs
    as well. So the hint grows with the number of those who come in vain, until about as many come as can be served.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refused, self._served = 0.0, 0.0  # per second, averaged over the last _CROWD_S
        self._last = clock()
        self._hold_s = _FIRST_HOLD_S

    def served(self, seconds: float) -> None:
        """Count an upload that has ended after so many seconds."""
        self._fade()
        self._served += 1 / _CROWD_S
        self._hold_s += _HOLD_WEIGHT * (seconds - self._hold_s)

    def turned_away(self) -> int:
        """Count one that was refused; return after how many milliseconds it should try again."""
        self._fade()
        self._refused += 1 / _CROWD_S
        return retry_ms(self._hold_s * max(1.0, self._refused / max(self._served, 1 / _CROWD_S)))

    def _fade(self) -> None:
        now = self._clock()
        left = math.exp((self._last - now) / _CROWD_S)
        self._refused, self._served, self._last = self._refused * left, self._served * left, now


def retry_ms(wait_s: float) -> int:
    """Return a hint for a wait in seconds: whole milliseconds, rounded up, between 50 ms and a minute."""
    return min(_LONGEST_MS, max(_SHORTEST_MS, math.ceil(wait_s * 1000)))


def _rules(limits: LimitConfig) -> list[_Rule]:
    """Return the limits that are set; 0 means none."""
    rules = []
    for per_member, in_bytes, rate, unit in (
        (True, False, limits.member_calls_per_s, "uploads"),
        (True, True, limits.member_bytes_per_s, "bytes"),
        (False, False, limits.organisation_calls_per_s, "uploads"),
        (False, True, limits.organisation_bytes_per_s, "bytes"),
    ):
        if rate > 0:
            least = float(limits.max_payload_bytes) if in_bytes else 1.0
            whose = "member" if per_member else "organisation"
            sentence = f"{whose} {{name}} sends more than its {rate:g} {unit} per second"
            rules.append(_Rule(per_member, in_bytes, Buckets(rate, max(rate * BURST_S, least)), sentence))
    return rules
