"""Benchmarks: a peer or a physical limit beside ours, in the same run. Ratios count; bare times do not.

:mod:`~share_simulations.bench.merge` times merges at Mistral-7B shapes, :mod:`~share_simulations.bench.compress` weighs
errors against sizes on pools of adapters, :mod:`~share_simulations.bench.endurance` merges ten thousand times,
:mod:`~share_simulations.bench.machine` measures the machine, :mod:`~share_simulations.bench.generated` makes adapters.
"""
