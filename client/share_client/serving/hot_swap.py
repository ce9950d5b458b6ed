"""Writing a task of a space into an adapter of a PEFT model that runs.

In place the adapter keeps its rank, its scale and its place in memory: nothing is allocated, a compiled model stays
compiled, and ``save_pretrained`` writes what is served. Call it between two forward passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from share_core.errors import AdapterError, UnsupportedAdapterError
from share_core.linalg import balanced, canonical, numerical_rank
from share_core.peft.kinds import refuse_unsupported
from share_core.peft.names import site_of
from share_core.types import Adapter, Factors

if TYPE_CHECKING:
    from peft import PeftModel


def hot_swap(model: PeftModel, name: str, factors: Adapter, recreate: bool = False) -> bool:
    """Make the adapter ``name`` of a PEFT model be ``factors``; return whether it was created anew.

    In place where every site of ``factors`` is one that the adapter has and the ranks suffice: a smaller rank is
    filled with zeros, and a site that ``factors`` leaves out changes nothing any more. Nothing is written unless all
    fits.

    Args:
        model: with a LoRA adapter of that name; for ``recreate`` it may be missing.
        name: as ``load_adapter`` or ``add_adapter`` got it.
        factors: from :func:`share_core.space.task_adapter`.
        recreate: where it does not fit in place, delete the adapter and add one of the rank and sites needed, for
            inference: the active adapters stay active and are not trained any more.

    Raises:
        AdapterError: it does not fit in place, or no module of the model is such a site, or the adapter is merged, or
            adding it anew would lose its ``modules_to_save``.
        UnsupportedAdapterError: the adapter is DoRA, AdaLoRA or another relative of plain LoRA, or at a layer whose
            factors are no matrices; or an adapter of the model has trained biases.
    """
    reduced = {site: _reduced(own) for site, own in factors.items()}
    layers = _layers(model, name)
    _refuse_configs(model, name)
    why = _misfit(layers, reduced, name)
    if why is None:
        _write(layers, reduced, name)
        return False
    if not recreate:
        raise AdapterError(f"{why}; with recreate=True it is deleted and added anew")
    _add(model, name, reduced)
    _write(_layers(model, name), reduced, name)
    return True


def _layers(model: PeftModel, name: str) -> dict[str, Any]:
    """Return the LoRA layers of an adapter by site."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if name in module.lora_embedding_A or (name in module.lora_A and module.use_dora.get(name)):
            raise UnsupportedAdapterError(
                f"adapter {name!r} at {path} is DoRA or of an embedding: only plain LoRA of linear layers and "
                "convolutions is swapped; delete the adapter and load the exported task"
            )
        if name in module.lora_A:
            if name in module.merged_adapters:
                raise AdapterError(f"adapter {name!r} is merged into the weights: call unmerge_adapter() first")
            found[site_of(path)] = module
    return found


def _refuse_configs(model: PeftModel, name: str) -> None:
    """Refuse an adapter that is more than factors: what a swap does not write would stay from the task before."""
    from peft import PeftType

    for other, config in model.peft_config.items():
        raw = {**config.to_dict(), "peft_type": PeftType(config.peft_type).value}
        if other == name or raw["peft_type"] != "LORA":  # PEFT adds no LoRA beside another kind
            refuse_unsupported(raw, f"adapter {other!r}")
        if raw["bias"] != "none":
            raise UnsupportedAdapterError(
                f"adapter {other!r} has trained biases (bias={raw['bias']!r}), which PEFT keeps in the backbone itself "
                "and a swap does not take out: load the backbone anew and add an adapter with bias='none'"
            )


def _reduced(factors: Factors) -> Factors:
    """Return balanced float32 factors of the numerical rank, which may be 0."""
    u, s, v = canonical(factors.out, factors.in_)
    keep = int(numerical_rank(s))
    out, in_ = balanced(u[:, :keep], s[:keep], v[:, :keep])
    return Factors(out.to(torch.float32), in_.to(torch.float32))


def _misfit(layers: Mapping[str, Any], factors: Adapter, name: str) -> str | None:
    """Return why factors cannot be written into these layers, or None."""
    if not layers:
        return f"the model has no LoRA adapter {name!r}"
    for site, own in factors.items():
        if own.rank == 0:
            continue
        if site not in layers:
            return f"adapter {name!r} does not change site {site!r}, the task does"
        a, b = layers[site].lora_A[name].weight, layers[site].lora_B[name].weight
        expected, got = (b.shape[0], a[0].numel()), (own.out.shape[0], own.in_.shape[0])
        if expected != got:
            raise AdapterError(
                f"site {site!r}: the model has a weight of {expected[0]} x {expected[1]}, the task of {got[0]} x "
                f"{got[1]}: load the backbone that the space was made for"
            )
        if own.rank > a.shape[0]:
            return f"site {site!r} needs rank {own.rank}, adapter {name!r} has {a.shape[0]}"
    return None


@torch.no_grad()
def _write(layers: Mapping[str, Any], factors: Adapter, name: str) -> None:
    for site, layer in layers.items():
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        a.zero_()
        b.zero_()
        own = factors.get(site)
        if own is None or own.rank == 0:
            continue
        # The layer multiplies B A with its scale, which stays as it is.
        _fill(a, own.in_.T, own.rank)
        _fill(b.transpose(0, 1), (own.out / float(layer.scaling[name])).T, own.rank)


def _fill(target: Tensor, rows: Tensor, rank: int) -> None:
    """Write the first ``rank`` rows of a factor, whose rows may have the shape of a kernel."""
    target[:rank] = rows.reshape(rank, *target.shape[1:]).to(target)


def _add(model: PeftModel, name: str, factors: Adapter) -> None:
    """Add an adapter with rank and sites of ``factors``, in place of the one of that name; the active one stays so."""
    from peft import LoraConfig

    base = model.get_base_model()
    paths: dict[str, str] = {}
    for path, _ in base.named_modules():
        paths.setdefault(site_of(path), path)
    missing = sorted(site for site, own in factors.items() if own.rank and site not in paths)
    if missing:
        raise AdapterError(f"the model has no module {missing[0]!r}, which the task changes: load the space's backbone")
    targets = [paths[site] for site, own in factors.items() if own.rank] or [paths[site] for site in factors]
    if not targets:
        raise AdapterError("the task changes no site at all: there is nothing to add")
    if heads := sorted(set(getattr(model.peft_config.get(name), "modules_to_save", None) or ())):
        raise AdapterError(
            f"adapter {name!r} has modules of its own ({', '.join(heads)}), which adding it anew would lose: make it "
            "with the rank and target modules that the task needs, so that it is swapped in place"
        )
    rank = max(1, *(own.rank for own in factors.values()))
    active, shown = list(model.active_adapters), model.active_adapter
    tuner: Any = model.base_model
    if name in model.peft_config:
        others = [other for other in model.peft_config if other != name]
        # Another one instead while it is gone: PEFT takes an empty list only where no adapter has modules_to_save.
        tuner.set_adapter([other for other in active if other != name] or others[:1], inference_mode=True)
        model.delete_adapter(name)
    # An expression for the whole name: PEFT takes a plain name for every module that ends in it.
    only = "|".join(re.escape(path) for path in targets)
    model.add_adapter(name, LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=only))
    tuner.set_adapter(active, inference_mode=True)
    model.active_adapter = shown
