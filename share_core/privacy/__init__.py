"""Differential privacy: what an update declares, what it spends, and noise on coefficients. Pure functions."""

from __future__ import annotations

from share_core.privacy.accountant import ORDERS, gaussian_epsilon, least_noise
from share_core.privacy.coefficients import Normal, noisy_cores
from share_core.privacy.declaration import (
    COEFFICIENTS,
    SAMPLES,
    CoefficientNoise,
    Declaration,
    SampleNoise,
    declaration_from_text,
    declaration_to_text,
)
from share_core.privacy.ledger import PrivacyLedger, read_ledger_events, spend, spend_all

__all__ = [
    "COEFFICIENTS",
    "ORDERS",
    "SAMPLES",
    "CoefficientNoise",
    "Declaration",
    "Normal",
    "PrivacyLedger",
    "SampleNoise",
    "declaration_from_text",
    "declaration_to_text",
    "gaussian_epsilon",
    "least_noise",
    "noisy_cores",
    "read_ledger_events",
    "spend",
    "spend_all",
]
