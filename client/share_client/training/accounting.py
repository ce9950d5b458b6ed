"""From a ``[privacy]`` table to what one training declares, and from declarations to what they have spent together.

Poisson sampling is counted by dp-accounting's Renyi accountant (Mironov, Talwar and Zhang, arXiv 1908.10530) at the
orders of :mod:`share_core.privacy` from 2 on: below, its series often does not converge. Fewer orders can only make
epsilon larger. Rows are added or removed (not exchanged): the neighbouring relation of dp-accounting and Opacus.
"""

from __future__ import annotations

from collections.abc import Sequence

from share_client.privacy_table import PrivacyConfig
from share_client.tasks_file import TaskConfig
from share_client.training.options import DEFAULT_EPOCHS
from share_core.errors import ConfigError
from share_core.privacy import (
    COEFFICIENTS,
    ORDERS,
    CoefficientNoise,
    Declaration,
    SampleNoise,
    gaussian_epsilon,
    least_noise,
)

_ORDERS = tuple(order for order in ORDERS if order >= 2)

CLIENT_DELTA = 1e-6
"""Delta for noise on coefficients where none is given. It is about clients, so no number of rows says what is small."""


def declare(task: TaskConfig, rows: int) -> Declaration | None:
    """Return what training a task on ``rows`` rows will declare; None without a ``[privacy]`` table.

    Raises:
        ConfigError: epsilon is too small for any noise, or the packages of the extra ``privacy`` are missing.
    """
    privacy = task.privacy
    if privacy is None:
        return None
    try:
        return _coefficients(privacy) if privacy.mechanism == COEFFICIENTS else _samples(task, privacy, rows)
    except ValueError as error:
        raise ConfigError(f"task {task.name!r}: privacy: {error}; raise epsilon") from error


def _coefficients(privacy: PrivacyConfig) -> CoefficientNoise:
    delta = CLIENT_DELTA if privacy.delta is None else privacy.delta
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None, "a table has one of both"
        noise = least_noise(privacy.epsilon, lambda one: gaussian_epsilon([(one, 1)], delta))
    return CoefficientNoise(noise_multiplier=noise, clip=privacy.clip, delta=delta)


def _samples(task: TaskConfig, privacy: PrivacyConfig, rows: int) -> SampleNoise:
    delta = 1 / (10 * rows) if privacy.delta is None else privacy.delta
    rate = min(1.0, task.batch_size / rows)
    steps = (task.epochs or DEFAULT_EPOCHS) * -(-rows // task.batch_size)

    def spent(noise: float) -> float:
        return _epsilon([(noise, rate, steps)], delta)

    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None, "a table has one of both"
        noise = least_noise(privacy.epsilon, spent)
    return SampleNoise(spent(noise), delta, noise, privacy.max_grad_norm, steps, rate)


def total_epsilon(declarations: Sequence[Declaration]) -> float:
    """Return what several trainings of one task have spent together, at the smallest delta any of them declares.

    Where all add noise to coefficients it is about the whole data set, else about single rows: a training with noise on
    its coefficients then counts as one step that takes every row.
    """
    if not declarations:
        return 0.0
    delta = min(one.delta for one in declarations)
    return _epsilon([_event(one) for one in declarations], delta)


def _event(declared: Declaration) -> tuple[float, float, int]:
    if isinstance(declared, CoefficientNoise):
        return declared.noise_multiplier, 1.0, 1
    return declared.noise_multiplier, declared.sample_rate, declared.steps


def _epsilon(events: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return epsilon of (noise multiplier, sample rate, steps) one after the other.

    Raises:
        ConfigError: dp-accounting is not installed, and rows are sampled.
    """
    if all(rate == 1.0 for _, rate, _ in events):
        return gaussian_epsilon([(noise, steps) for noise, _, steps in events], delta)
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise ConfigError("DP-SGD needs dp-accounting: pip install 'fedshare[privacy]'") from error
    accountant = rdp.RdpAccountant(_ORDERS)
    for noise, rate, steps in events:
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(step, steps)
    return float(accountant.get_epsilon(delta))
