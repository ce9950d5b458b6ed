"""What the published updates of one task have spent, all contributors together.

Every update with noise on its coefficients is one Gaussian release whose sensitivity is its clip. The ledger adds them
up whoever they come from, so for each contributor it says at least what that one has spent. Its delta is the smallest
that was declared: epsilon at a smaller delta is larger.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from share_core.privacy.accountant import gaussian_epsilon
from share_core.privacy.declaration import CoefficientNoise, Declaration


@dataclass(frozen=True)
class PrivacyLedger:
    """The releases of one task."""

    events: tuple[tuple[float, int], ...]
    """(noise multiplier, how many releases), sorted by noise multiplier."""
    delta: float
    """Smallest declared probability with which epsilon may not hold."""

    @property
    def epsilon(self) -> float:
        """What all releases together have spent, at :attr:`delta`."""
        return gaussian_epsilon(self.events, self.delta)

    def events_to_text(self) -> str:
        """Return the events as canonical JSON."""
        return json.dumps(self.events, separators=(",", ":"), allow_nan=False)


def read_ledger_events(events: str, delta: float) -> PrivacyLedger:
    """Return the ledger that :meth:`PrivacyLedger.events_to_text` wrote."""
    return PrivacyLedger(tuple((float(noise), int(count)) for noise, count in json.loads(events)), delta)


def spend(ledger: PrivacyLedger | None, declared: Declaration | None) -> PrivacyLedger | None:
    """Return the ledger after one more published update; unchanged where it declares no noise on coefficients."""
    if not isinstance(declared, CoefficientNoise):
        return ledger
    events = dict(ledger.events) if ledger is not None else {}
    events[declared.noise_multiplier] = events.get(declared.noise_multiplier, 0) + 1
    delta = declared.delta if ledger is None else min(ledger.delta, declared.delta)
    return PrivacyLedger(tuple(sorted(events.items())), delta)


def spend_all(declarations: Iterable[Declaration | None]) -> PrivacyLedger | None:
    """Return the ledger of several published updates; None if none of them declares noise on coefficients."""
    ledger: PrivacyLedger | None = None
    for declared in declarations:
        ledger = spend(ledger, declared)
    return ledger
