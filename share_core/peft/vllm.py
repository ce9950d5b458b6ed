"""Whether vLLM loads an adapter directory, and gives what PEFT gives.

vLLM reads the directory itself (``vllm/lora/peft_helper.py``, ``lora_model.py`` and ``utils.py``; ``config/lora.py``
has the ranks). It takes less than PEFT, and some things it takes and leaves out without a word:

===================  =================================================================================================
configuration        ``r``, ``lora_alpha`` and ``target_modules`` must be there
rank                 at most ``--max-lora-rank``, one of :data:`MAX_RANKS`
scale                ``lora_alpha / r``, or with rsLoRA ``lora_alpha / sqrt(r)``, for all modules: ``rank_pattern`` and
                     ``alpha_pattern`` are not read
left out             ``modules_to_save``, biases, DoRA and every tensor that is no lora_A or lora_B are refused
tensor names         ``base_model.model.<module>.lora_A.weight``, without an adapter's name in between
modules              linear layers that the model has in vLLM, by the last part of the name
===================  =================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from share_core.errors import UnsupportedAdapterError
from share_core.peft.config import CONFIG_FILE, PeftConfig
from share_core.peft.names import tensor_key
from share_core.peft.reader import TENSOR_FILE, PeftAdapter, read_adapter
from share_core.tensorfile import tensor_sizes

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be. Newer releases of vLLM also take 1."""
_REQUIRED = ("r", "lora_alpha", "target_modules")
_LINEAR = ("linear", "conv1d_transposed")


def check_vllm(directory: Path, modules: Collection[str] | None = None) -> int:
    """Return the smallest ``--max-lora-rank`` with which vLLM loads an adapter directory.

    Args:
        directory: as PEFT or :func:`~share_core.peft.writer.write_adapter` wrote it.
        modules: last parts of the names of the layers that take LoRA in the served model, such as ``q_proj``; None
            leaves that to vLLM.

    Raises:
        UnsupportedAdapterError: naming every rule that it breaks, or a kind of adapter that is not plain LoRA.
        AdapterError, PayloadError: the directory is incomplete or contradicts itself.
    """
    adapter = read_adapter(directory)
    present = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    keys = tensor_sizes((directory / TENSOR_FILE).read_bytes())
    top = max(factors.rank for factors in adapter.factors.values())
    broken = [f"{CONFIG_FILE} has no {key}" for key in _REQUIRED if present.get(key) is None]
    broken += [*_of_config(adapter.config, top), *_of_modules(adapter, modules), *_of_tensors(adapter, keys)]
    if broken:
        raise UnsupportedAdapterError(f"{directory}: vLLM does not serve it as it is: {'; '.join(broken)}")
    return next(rank for rank in MAX_RANKS if rank >= max(top, adapter.config.r))


def _of_config(config: PeftConfig, top: int) -> Iterator[str]:
    if config.modules_to_save:
        yield f"modules_to_save is {', '.join(config.modules_to_save[:3])}: export without heads"
    if config.bias != "none":
        yield f"bias is {config.bias!r}: export without biases"
    if max(config.r, top) > MAX_RANKS[-1]:
        yield f"its rank is {max(config.r, top)}, at most {MAX_RANKS[-1]} are served"
    if top > config.r:
        yield f"a module has rank {top}, r is {config.r} and rank_pattern is not read: pad all modules to one rank"


def _of_modules(adapter: PeftAdapter, modules: Collection[str] | None) -> Iterator[str]:
    config = adapter.config
    scale = replace(config, rank_pattern={}, alpha_pattern={}).scale_of("")
    for site in adapter.sites.values():
        if site.kind not in _LINEAR:
            yield f"module {site.module!r} is of kind {site.kind}, only linear layers are served"
        if modules is not None and site.module.rpartition(".")[2] not in modules:
            yield f"module {site.module!r} is none of the model's layers that take LoRA: {', '.join(sorted(modules))}"
        if config.scale_of(site.module) != scale:
            yield (
                f"module {site.module!r} has scale {config.scale_of(site.module):g} by its patterns, which are not "
                f"read: {scale:g} would be used"
            )


def _of_tensors(adapter: PeftAdapter, keys: Collection[str]) -> Iterator[str]:
    known = {
        tensor_key(site.module, part, site.kind == "embedding") for site in adapter.sites.values() for part in "AB"
    }
    for key in sorted(set(keys) - known):
        expected = "base_model.model.<module>.lora_A.weight or lora_B.weight"
        yield f"tensor {key[:160]!r} has another name than {expected}"
