"""The loss of some rows: in which precision, in how many parts, and with activations kept or computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.tasks_file import TaskConfig
from share_client.training.options import TrainingOptions
from share_core.errors import ConfigError


def part_losses(
    backbone: Backbone, task: PreparedTask, head: nn.Module, rows: Sequence[int], options: TrainingOptions
) -> Iterator[Tensor]:
    """Yield shares of the mean loss of ``rows``, each a scalar with a graph of its own; their sum is that mean.

    The rows are cut into ``options.accumulate`` parts of like size. A part's share is its own mean loss times its share
    of the rows, which is exact because a kind's loss is the mean over its rows. A caller that is done with the graph of
    one part before it asks for the next needs memory for one part only.
    """
    dtype = autocast_dtype(options.precision, backbone.device)
    for part in parts_of(rows, options.accumulate):
        inputs, targets = task.train.batch(part, backbone.device)
        with torch.autocast(backbone.device.type, dtype=dtype, enabled=dtype is not None):
            loss = task.kind.loss(task.kind.outputs(backbone, head, inputs), targets)
        yield loss * (len(part) / len(rows)) if len(part) < len(rows) else loss


def parts_of(rows: Sequence[int], count: int) -> list[Sequence[int]]:
    """Return ``rows`` cut into at most ``count`` runs, none empty, whose lengths differ by at most one."""
    count = min(count, len(rows))
    cuts = [len(rows) * number // count for number in range(count + 1)]
    return [rows[start:end] for start, end in pairwise(cuts)]


def part_rows(config: TaskConfig) -> int:
    """Return the most rows that a training of a task passes through the backbone at one time."""
    return -(-config.batch_size // min(config.accumulate, config.batch_size))


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return what matrix products are computed in: bfloat16, or None for the type of the weights.

    Raises:
        ConfigError: ``bf16`` on a CUDA device that cannot.
    """
    if precision == "fp32":
        return None
    able = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and able else None
    if not able:
        raise ConfigError('precision: expected "fp32" or "auto" on this device, which has no bfloat16, got "bf16"')
    return torch.bfloat16


@contextmanager
def recomputed(backbone: Backbone, enabled: bool) -> Iterator[None]:
    """Keep only the inputs of the backbone's repeated blocks for the backward pass, which computes the rest again.

    This is gradient checkpointing (arXiv 1604.06174): the gradients are the same, the forward pass runs twice. The
    blocks are the members of module lists and sequences that have sites inside, the deepest ones of each site but none
    inside another. The methods of the modules are put back however the context ends.

    Raises:
        ConfigError: the backbone has no such blocks.
    """
    with ExitStack() as stack:
        for block in blocks_of(backbone) if enabled else ():
            own = {"forward": block.forward} if "forward" in block.__dict__ else {}
            block.forward = partial(_again, block.forward)
            stack.callback(_put_back, block, own)
        yield


def _put_back(block: nn.Module, own: Mapping[str, Any]) -> None:
    del block.forward
    block.__dict__.update(own)


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # Nothing random happens in a frozen backbone, so no state of a random generator needs to be kept.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    """Return the blocks that :func:`recomputed` wraps.

    Raises:
        ConfigError: there are none.
    """
    lists = [path for path, one in backbone.module.named_modules() if isinstance(one, nn.ModuleList | nn.Sequential)]
    members = {f"{path}.{name}".lstrip(".") for path in lists for name, _ in _module(backbone, path).named_children()}
    deepest = set()
    for site in backbone.sites:
        inside = [member for member in members if site.startswith(f"{member}.")]
        deepest.update(sorted(inside, key=len)[-1:])
    outer = sorted(path for path in deepest if not any(path.startswith(f"{other}.") for other in deepest))
    if not outer:
        raise ConfigError(
            f"checkpointing: backbone {backbone.name} has no repeated blocks around its sites; take checkpointing out "
            "of tasks.toml, and split the steps by accumulate instead"
        )
    return [_module(backbone, path) for path in outer]


def _module(backbone: Backbone, path: str) -> nn.Module:
    return backbone.module.get_submodule(path)
