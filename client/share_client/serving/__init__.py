"""Serving many tasks at once from one shared factor set.

:mod:`~share_client.serving.places` finds the modules of a model that a space adapts,
:mod:`~share_client.serving.stacks` holds one version ready for use, :mod:`~share_client.serving.serving` runs batches
in which every row has a task of its own, :mod:`~share_client.serving.following` keeps the served version new, and
:mod:`~share_client.serving.hot_swap` writes a task into a PEFT model that runs.
"""

from share_client.serving.following import Follower, serve_directory
from share_client.serving.hot_swap import hot_swap
from share_client.serving.serving import Batch, Serving

__all__ = ["Batch", "Follower", "Serving", "hot_swap", "serve_directory"]
