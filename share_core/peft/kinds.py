"""Which adapters are not plain LoRA, why, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from share_core.errors import UnsupportedAdapterError

_PLAIN = "train a plain LoRA adapter"
_CONVERT = "convert it with peft.save_as_lora, or train a plain LoRA adapter"
_PROMPTS = f"it learns virtual tokens and no change of a weight, so there is nothing to merge: {_PLAIN}"
_TURNS = f"it multiplies the weights by a rotation, which depends on the backbone and is not of low rank: {_PLAIN}"
_SCALES = f"it scales activations, which is not of low rank: {_PLAIN}"
_PROJECTS = f"its change is made from frozen vectors or a transform, not from two factors: {_CONVERT}"
_ROUTES = f"it mixes several adapters by the input: save its LoRA experts one by one and merge those, or {_PLAIN}"

_TYPES = {
    "ADALORA": "AdaLoRA keeps singular values in lora_E and prunes ranks: multiply lora_E into lora_A and save it as "
    f"LORA with rank_pattern, or {_PLAIN}",
    "LOHA": f"LoHa is an elementwise product of two low-rank matrices, of rank up to r squared: {_CONVERT}",
    "LOKR": f"LoKr is a Kronecker product, not of low rank: {_CONVERT}",
    "HIRA": f"HiRA multiplies the weight elementwise, which is not of low rank: {_PLAIN}",
    "IA3": _SCALES,
    "LN_TUNING": f"it trains layer norms, which are no matrices: {_PLAIN}",
    "BEFT": f"it trains biases, which are no matrices: {_PLAIN}",
    "TRAINABLE_TOKENS": f"it trains single rows of the embedding: {_PLAIN}",
    **dict.fromkeys(
        (
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "ADAPTION_PROMPT",
            "CPT",
            "CARTRIDGE",
        ),
        _PROMPTS,
    ),
    **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD", "PSOFT"), _TURNS),
    **dict.fromkeys(("VERA", "PVERA", "VBLORA", "UNILORA", "RANDLORA", "FOURIERFT", "WAVEFT", "C3A"), _PROJECTS),
    **dict.fromkeys(("XLORA", "POLY"), _ROUTES),
}
"""Why a ``peft_type`` cannot be merged and what to do; others are refused in general terms."""

_OPTIONS = {
    "use_dora": "DoRA rescales whole rows of the weight, which is not of low rank",
    "lora_bias": "it trains a bias inside LoRA, which a merge would lose",
    "layer_replication": "it repeats layers, so that one module of the backbone has several adapters",
    "alora_invocation_tokens": "activated LoRA (aLoRA) changes only tokens behind the invocation",
    "use_qalora": "QA-LoRA pools the inputs in groups before A",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA) stores blocks and not whole factors",
    "target_parameters": "it adapts bare parameters, which have no module of their own",
    "trainable_token_indices": "it trains single rows of the embedding beside LoRA",
    "megatron_config": "Megatron splits a layer over processes, so that this may be one part of it",
    "arrow_config": "Arrow mixes several adapters by the input",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA keeps projections beside its factors",
    "kasa_config": "KaSA puts a diagonal between A and B and changes the backbone's weights",
}
"""Options of a LoRA config that make it something else than ``W + scale B A``."""

_HARMLESS = {"use_rslora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}
"""Options whose name looks like those above, but which are understood or decide only how training starts."""

_OFF: tuple[Any, ...] = (None, False, {}, [])
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


def refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    """Refuse a config that describes something else than plain LoRA.

    Args:
        raw: the parsed ``adapter_config.json``.
        where: the file, for the message.

    Raises:
        UnsupportedAdapterError: naming the kind, why it cannot be merged and what to do.
    """
    kind = raw.get("peft_type")
    if kind != "LORA":
        why = _TYPES.get(kind) if isinstance(kind, str) else None
        raise UnsupportedAdapterError(
            f"{where}: peft_type is {_shown(kind)}, only LORA is supported; "
            f"{why or f'this kind is not known to be of low rank: {_CONVERT}'}"
        )
    for option, why in _OPTIONS.items():
        if raw.get(option) not in _OFF:
            raise UnsupportedAdapterError(f"{where}: {option} is not supported: {why}; {_PLAIN} without it")
    for option, value in raw.items():
        looks_like_one = option.startswith("use_") or option.endswith("_config")
        if looks_like_one and option not in {*_OPTIONS, *_HARMLESS} and value not in _OFF:
            raise UnsupportedAdapterError(
                f"{where}: option {option[:60]!r} is unknown here and may change what the factors mean: {_PLAIN} "
                "without it"
            )
    _refuse_init(raw.get("init_lora_weights", True), where)


def refuse_tensor(key: str, where: str) -> None:
    """Refuse a tensor that is part of LoRA's relatives and that no LoRA factor is.

    Raises:
        UnsupportedAdapterError: naming the tensor.
    """
    shown = repr(key[:160])
    if "lora_magnitude_vector" in key:
        raise UnsupportedAdapterError(f"{where}: tensor {shown} belongs to DoRA, which is not of low rank: {_PLAIN}")
    if ".lora_E" in key or ".ranknum" in key:
        raise UnsupportedAdapterError(f"{where}: tensor {shown}: {_TYPES['ADALORA']}")
    if ".lora_" in key and key.endswith(".bias"):
        raise UnsupportedAdapterError(f"{where}: tensor {shown} is a bias inside LoRA (lora_bias): {_PLAIN} without it")
    if ".lora_" in key:
        raise UnsupportedAdapterError(f"{where}: tensor {shown} is no lora_A or lora_B of a known form: {_PLAIN}")


def _refuse_init(init: Any, where: str) -> None:
    if not isinstance(init, str) or init.lower() in _PLAIN_INITS or init.lower() == "true":
        return
    what = f"{where}: init_lora_weights is {_shown(init)}"
    if init.lower().startswith(_CONVERTIBLE_INITS):
        raise UnsupportedAdapterError(
            f"{what}, so that the factors are relative to a changed backbone: save the adapter again with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it plain LoRA"
        )
    if init.lower() == "loftq":
        raise UnsupportedAdapterError(
            f"{what}, so that the factors are relative to a quantised backbone and PEFT has no conversion: {_PLAIN} on "
            "the original backbone"
        )
    raise UnsupportedAdapterError(f"{what}, which is unknown here and may change the backbone: {_PLAIN}")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) <= 60 else repr(str(value)[:60])
