"""What an update says of the noise in it: canonical JSON that travels in its header, is signed, and is kept.

Two mechanisms::

    {"clip":1.0,"delta":1e-05,"mechanism":"coefficients","noise_multiplier":4.0}
    {"delta":1e-05,"epsilon":2.0,"max_grad_norm":1.0,"mechanism":"dp-sgd","noise_multiplier":1.1,"sample_rate":0.05,
     "steps":60}                                            (one line, without spaces)

Canonical means: exactly these keys, sorted, no spaces, every number but ``steps`` written as Python writes a float.
What is not canonical is refused, so that equal declarations are equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from share_core.errors import HeaderError, RequestError
from share_core.tensorfile import no_duplicates

LONGEST = 1024
"""Most characters of a declaration."""

SAMPLES = "dp-sgd"
COEFFICIENTS = "coefficients"


@dataclass(frozen=True)
class SampleNoise:
    """Training by DP-SGD: hides whether any one training row was there (Abadi et al., arXiv 1607.00133)."""

    mechanism: ClassVar[str] = SAMPLES
    epsilon: float
    """What this training spends, by an accountant that counts Poisson sampling."""
    delta: float
    """Probability with which epsilon may not hold."""
    noise_multiplier: float
    """Standard deviation of the noise of one step, in units of :attr:`max_grad_norm`."""
    max_grad_norm: float
    """Norm to which the gradient of every row is clipped."""
    steps: int
    """Steps taken."""
    sample_rate: float
    """Probability with which each row takes part in a step."""


@dataclass(frozen=True)
class CoefficientNoise:
    """Noise on clipped coefficients: hides what the whole data set of the client contributed to one update."""

    mechanism: ClassVar[str] = COEFFICIENTS
    noise_multiplier: float
    """Standard deviation of the noise on every coefficient, in units of :attr:`clip`."""
    clip: float
    """Norm to which the coefficients of all sites together are clipped."""
    delta: float
    """Probability with which epsilon may not hold."""


Declaration = SampleNoise | CoefficientNoise

_KINDS: Mapping[str, type[SampleNoise] | type[CoefficientNoise]] = {
    SAMPLES: SampleNoise,
    COEFFICIENTS: CoefficientNoise,
}

_BOUNDS = {
    "epsilon": (0.0, 1e9),
    "delta": (1e-30, 0.1),
    "noise_multiplier": (1e-3, 1e6),
    "max_grad_norm": (1e-9, 1e9),
    "clip": (1e-9, 1e9),
    "steps": (1, 10**9),
    "sample_rate": (1e-12, 1.0),
}
"""Least and largest value of every number: outside of them the arithmetic of the ledger has no meaning."""


def declaration_to_text(declaration: Declaration) -> str:
    """Return a declaration as canonical JSON."""
    body = {"mechanism": declaration.mechanism, **asdict(declaration)}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def declaration_from_text(text: str) -> Declaration | None:
    """Read what came from somebody else; None for an empty text, which declares nothing.

    Raises:
        RequestError: naming what was expected and what was got.
    """
    if not text:
        return None
    if len(text) > LONGEST:
        raise RequestError(f"privacy: at most {LONGEST} characters are accepted, got {len(text)}")
    try:
        body = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=_no_number)
    except (ValueError, RecursionError, HeaderError) as error:
        raise RequestError(f"privacy: expected canonical JSON, got {text[:80]!r}: {str(error)[:120]}") from None
    declaration = _declaration(body)
    if declaration_to_text(declaration) != text:
        raise RequestError(
            f"privacy: expected canonical JSON {declaration_to_text(declaration)!r}, got {text[:200]!r}: sort the "
            "keys, leave out spaces, write numbers but steps with a decimal point"
        )
    return declaration


def _declaration(body: Any) -> Declaration:
    mechanism = body.get("mechanism") if isinstance(body, dict) else None
    kind = _KINDS.get(mechanism) if isinstance(mechanism, str) else None
    if kind is None:
        raise RequestError(f"privacy: expected mechanism {SAMPLES!r} or {COEFFICIENTS!r}, got {str(mechanism)[:40]!r}")
    names = tuple(field.name for field in fields(kind))
    if set(body) != {"mechanism", *names}:
        raise RequestError(
            f"privacy: expected the keys mechanism, {', '.join(names)}, got {', '.join(sorted(body))[:200]}"
        )
    return kind(**{name: _number(name, body[name]) for name in names})


def _number(name: str, value: Any) -> Any:
    low, high = _BOUNDS[name]
    wanted = int if name == "steps" else float
    good = type(value) in (int, wanted) and low <= value <= high
    if not good:
        raise RequestError(f"privacy: {name}: expected a number from {low:g} to {high:g}, got {str(value)[:40]!r}")
    return wanted(value)


def _no_number(text: str) -> Any:
    raise RequestError(f"privacy: {text} is no number")
