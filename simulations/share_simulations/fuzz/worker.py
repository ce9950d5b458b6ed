"""``python -m share_simulations.fuzz.worker TALLY GUARD CORPUS [libFuzzer's own options]``: one fuzzing process.

The reader is instrumented: libFuzzer keeps a file in CORPUS when it reaches something new. What breaks a rule is
written to the place that ``-artifact_prefix`` names, and the process ends with a code other than 0. How files ended is
counted in the file TALLY, as JSON. GUARD is the name of a guard to take out of the reader, or empty.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import CodeType

import atheris
import torch

from share_simulations.fuzz import planted
from share_simulations.fuzz.mutator import mutate

_WRITE_EVERY = 2_000


def main(arguments: list[str]) -> None:
    """Run; libFuzzer ends the process."""
    program, tally, guard, *options = arguments
    torch.set_num_threads(1)
    ends: Counter[str] = Counter()
    with planted.without(planted.GUARDS[guard] if guard else None, _instrumented) as modules:
        look = modules["share_simulations.fuzz.target"].look

        def once(data: bytes) -> None:
            ends[look(data)] += 1
            if ends.total() % _WRITE_EVERY == 0:
                Path(tally).write_text(json.dumps(ends))

        def change(data: bytes, most: int, seed: int) -> bytes:
            return mutate(bytes(data), random.Random(seed), lambda raw: atheris.Mutate(raw, len(raw) + 32))[:most]

        atheris.Setup([program, *options], once, custom_mutator=change)
        atheris.Fuzz()


def _instrumented(source: str, name: str) -> CodeType:
    code = planted.plain(source, name)
    return code if Path(name).name == "target.py" else atheris.patch_code(code, True)


if __name__ == "__main__":
    main(sys.argv)
