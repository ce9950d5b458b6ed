"""Merging in constant time per update: the cost does not depend on how many tasks the space already holds.

:func:`share_core.streaming.fold.fold` takes one adapter into the subspace; :mod:`share_core.streaming.state` says what
is kept between two calls, :mod:`share_core.streaming.reflect` how directions leave the bases without a dense rotation,
:mod:`share_core.streaming.select` which ones leave, :mod:`share_core.streaming.chunks` how the coefficients of
thousands of tasks follow lazily.
"""
