"""The table ``[privacy]`` of ``tasks.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from share_client import values
from share_core.errors import ConfigError
from share_core.privacy import COEFFICIENTS, SAMPLES


@dataclass(frozen=True)
class PrivacyConfig:
    """A ``[privacy]`` table: what an update may tell of the data it was trained on."""

    mechanism: str = SAMPLES
    """``dp-sgd`` hides single rows, ``coefficients`` the whole data set of this client."""
    epsilon: float | None = None
    """What one training may spend; the noise is computed from it. Either this or :attr:`noise_multiplier`."""
    noise_multiplier: float | None = None
    """Noise in units of the norm that is clipped to."""
    max_grad_norm: float = 1.0
    """Norm to which the gradient of every row is clipped. For ``dp-sgd``."""
    clip: float = 1.0
    """Norm to which all coefficients together are clipped. For ``coefficients``."""
    delta: float | None = None
    """Probability with which epsilon may not hold. None: 1 / (10 rows) for ``dp-sgd``, 1e-6 for ``coefficients``."""
    budget: float | None = None
    """What all trainings of the task together may spend. None: :attr:`epsilon`, or no limit where that is not set."""
    report_metrics: bool = False
    """Whether evaluations on the test rows are reported to the hub. No noise is added to them."""

    @property
    def limit(self) -> float | None:
        """The budget in force, or None."""
        return self.epsilon if self.budget is None else self.budget


_PRIVACY_READERS: Mapping[str, values.Reader] = {
    "mechanism": lambda value, where: values.one_of(value, (SAMPLES, COEFFICIENTS), where),
    "epsilon": values.number(0, 1e6, above=True),
    "noise_multiplier": values.number(1e-3, 1e6),
    "max_grad_norm": values.number(0, 1e6, above=True),
    "clip": values.number(0, 1e6, above=True),
    "delta": values.number(1e-30, 0.1),
    "budget": values.number(0, 1e9, above=True),
    "report_metrics": values.boolean,
}


def read_privacy(value: object, where: str) -> PrivacyConfig:
    """Return the table, checked.

    Raises:
        ConfigError: an unknown key, a value out of range, or keys that exclude each other.
    """
    table = values.table(value, where)
    privacy = PrivacyConfig(**values.read_keys(table, _PRIVACY_READERS, where))  # type: ignore[arg-type]
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        got = "neither" if privacy.epsilon is None else "both"
        raise ConfigError(f"{where}: expected either epsilon or noise_multiplier, got {got}")
    other = {SAMPLES: "clip", COEFFICIENTS: "max_grad_norm"}[privacy.mechanism]
    if other in table:
        raise ConfigError(f"{where}: {other}: has no meaning for mechanism {privacy.mechanism!r}: take it out")
    return privacy
