"""The operator's choices for merging what not everybody may be trusted with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from share_core.errors import ConfigError

FILTERS = ("cosine", "off")
"""How contributions to a shared task are judged."""


@dataclass(frozen=True)
class RobustPolicy:
    """Limits. Everything is off unless set: a version that was made without them is made again without them."""

    filter: str = "off"
    """``cosine``: direction and length against the others' contributions; ``off``: nothing is judged."""
    organisations: int = 4
    """Fewest organisations that can outvote one; with fewer, contributions are only cut to a length."""
    cosine: float = 0.4
    """Least agreement with the others, as a share of what is usual among them."""
    clip: float = 1.5
    """Longer contributions are cut to this multiple of the median length."""
    norm: float = 10.0
    """Contributions longer than this multiple of the median length are set aside."""
    influence: float = 1.0
    """Largest share of one organisation's tasks in the choice of directions when a space compacts; 1: no limit."""
    past: float = 1.0
    """Most relative error that a version may add to a stored task of another organisation; 1: no limit."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.filter not in FILTERS:
            raise ConfigError(f"robust filter: expected one of {', '.join(FILTERS)}, got {self.filter!r}")
        if self.organisations < 3:
            raise ConfigError(
                f"robust organisations: expected at least 3, got {self.organisations}: two have no majority"
            )
        if not (0 < self.cosine < 1 and 1 <= self.clip <= self.norm):
            raise ConfigError(
                "robust limits: expected 0 < cosine < 1 and 1 <= clip <= norm, "
                f"got {self.cosine:g}, {self.clip:g} and {self.norm:g}"
            )
        if not (0 < self.influence <= 1 and 0 < self.past <= 1):
            raise ConfigError(
                "robust limits: expected influence and past above 0 and at most 1, "
                f"got {self.influence:g} and {self.past:g}"
            )

    @property
    def filters(self) -> bool:
        """Whether contributions to shared tasks are judged."""
        return self.filter != "off"


OFF = RobustPolicy()
"""Nothing is judged, capped or held."""


def robust_policy(values: Mapping[str, Any] | None) -> RobustPolicy:
    """Read what was recorded with a version; versions of before had nothing of it."""
    return OFF if values is None else RobustPolicy(**values)
