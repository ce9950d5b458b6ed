"""Settings for every test."""

from __future__ import annotations

import torch

# Two test workers on two cores: threads inside a test would only fight each other, and one thread is deterministic.
torch.set_num_threads(1)
