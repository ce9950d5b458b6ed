"""Writes the corpus of hostile files: ``python tests/attacks/make.py``.

``files/NAME.safetensors`` are the files; ``expected.json`` says by name as which error class, with which words, each is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from share_simulations.fuzz.hostile import corpus

HERE = Path(__file__).parent


def main() -> None:
    """Write everything."""
    folder = HERE / "files"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    cases = corpus()
    for case in cases:
        (folder / f"{case.name}.safetensors").write_bytes(case.data)
    table = {case.name: [case.error, case.words] for case in cases}
    (HERE / "expected.json").write_text(json.dumps(table, indent=1, ensure_ascii=True) + "\n")
    print(f"{len(cases)} files, {sum(len(case.data) for case in cases)} bytes")


if __name__ == "__main__":
    main()
