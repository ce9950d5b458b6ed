"""``python -m share_simulations.fuzz.worker [--without GUARD] CORPUS [libFuzzer's own options]``: one fuzzing process.

The reader is instrumented: libFuzzer keeps a file when it reaches something new in it. What is found is written to the
place that ``-artifact_prefix`` names, and the process ends with a code of its own.
"""

from __future__ import annotations

import random
import sys

import atheris
import torch

from share_simulations.fuzz import planted


def main(arguments: list[str]) -> None:
    """Run; never returns."""
    guard = None
    if arguments[1:2] == ["--without"]:
        guard = planted.GUARDS[arguments[2]]
        arguments = [arguments[0], *arguments[3:]]
    torch.set_num_threads(1)
    with planted.without(guard, _instrumented) as modules:
        look = modules["share_simulations.fuzz.target"].look
        from share_simulations.fuzz.mutator import mutate

        def change(data: bytes, most: int, seed: int) -> bytes:
            return mutate(bytes(data), random.Random(seed), lambda raw: atheris.Mutate(raw, len(raw) + 32))[:most]

        def once(data: bytes) -> None:
            look(data)

        atheris.Setup(arguments, once, custom_mutator=change)
        atheris.Fuzz()


def _instrumented(source: str, name: str) -> object:
    code = compile(source, name, "exec")
    return code if name.endswith("target.py") else atheris.patch_code(code, True)


if __name__ == "__main__":
    main(sys.argv)
