"""PEFT adapter directories, in and out, without the PEFT library: plain JSON and safetensors.

:mod:`~share_core.peft.config` says what an ``adapter_config.json`` means, :mod:`~share_core.peft.kinds` which kinds of
adapter are refused and why, :mod:`~share_core.peft.patterns` how PEFT matches module names,
:mod:`~share_core.peft.names` which module a tensor belongs to, :mod:`~share_core.peft.reader` gives an adapter with its
scale folded in, :mod:`~share_core.peft.export` what to keep of it, :mod:`~share_core.peft.writer` writes one that PEFT
loads.
"""
