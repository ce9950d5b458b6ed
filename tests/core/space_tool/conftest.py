"""Small adapter directories, models and a command line for the tests of ``share-space``."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from share_core.command_line import run_command
from share_core.peft.reader import read_adapter
from share_core.space_tool.build import Source, merge_sources
from share_core.space_tool.cli import app
from share_core.space_tool.spacefile import FilePolicy, SpaceFile
from share_core.types import Adapter

SITES = {"layer.0.query": (12, 10), "layer.0.value": (12, 10), "layer.1.out": (8, 14)}


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The JSON object in the last line of standard output."""
        return json.loads(self.out.strip().splitlines()[-1])


def command(*words: object) -> Answer:
    """Run ``share-space`` as its console script does, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["share-space", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            run_command(app, "share-space")
    finally:
        sys.argv = before
    code = ended.value.code
    return Answer(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def write(
    path: Path,
    seed: int = 0,
    sites: Mapping[str, tuple[int, int]] = SITES,
    *,
    rank: int = 3,
    scale: float = 1.0,
    base: str | None = "bert-tiny",
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an adapter of random factors; half of its directions are common to all seeds."""
    own, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(12345)
    tensors: dict[str, Tensor] = dict(extra or {})
    for name, (d_out, d_in) in sites.items():
        shared = torch.randn(d_out, rank, generator=common), torch.randn(rank, d_in, generator=common)
        b = shared[0] @ torch.randn(rank, rank, generator=own) + 0.3 * torch.randn(d_out, rank, generator=own)
        a = torch.randn(rank, rank, generator=own) @ shared[1] + 0.3 * torch.randn(rank, d_in, generator=own)
        tensors[f"base_model.model.bert.{name}.lora_B.weight"] = b * scale
        tensors[f"base_model.model.bert.{name}.lora_A.weight"] = a
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": base}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def model(path: Path, seed: int = 0, sites: Mapping[str, tuple[int, int]] = SITES) -> Path:
    """Write a model with one weight per site."""
    g = torch.Generator().manual_seed(seed)
    path.mkdir(parents=True, exist_ok=True)
    weights = {f"bert.{name}.weight": torch.randn(*shape, generator=g) for name, shape in sites.items()}
    save_file({**weights, "bert.norm.weight": torch.ones(4)}, path / "model.safetensors")
    return path


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """Return the changes of the weights themselves."""
    return {name: f.out.double() @ f.in_.double().T for name, f in adapter.items()}


def relative(original: Path, exported: Path) -> float:
    """Return ``sqrt(sum ||dW - dW^||^2 / sum ||dW||^2)`` the long way."""
    first, second = dense(read_adapter(original).factors), dense(read_adapter(exported).factors)
    lost = sum(float((w - second.get(n, torch.zeros_like(w))).square().sum()) for n, w in first.items())
    return float((lost / sum(float(w.square().sum()) for w in first.values())) ** 0.5)


@pytest.fixture(name="run")
def _run() -> Callable[..., Answer]:
    return command


def sentence(*words: object) -> str:
    """Run a command that must fail with one sentence on standard error and code 1, and return the sentence."""
    answer = command(*words)
    lines = answer.err.splitlines()
    assert (answer.code, answer.out, len(lines)) == (1, "", 1), answer
    assert lines[0].startswith("share-space: ")
    return lines[0]


@pytest.fixture(name="refused")
def _refused() -> Callable[..., str]:
    return sentence


@pytest.fixture(name="adapter")
def _adapter() -> Callable[..., Path]:
    return write


@pytest.fixture(name="backbone")
def _backbone() -> Callable[..., Path]:
    return model


@pytest.fixture(name="relative_error")
def _relative_error() -> Callable[[Path, Path], float]:
    return relative


@pytest.fixture(name="three")
def _three(tmp_path: Path) -> list[Path]:
    """Three adapters of one backbone."""
    return [write(tmp_path / "in" / name, seed) for seed, name in enumerate(("one", "two", "three"))]


@pytest.fixture(name="space")
def _space(three: list[Path], tmp_path: Path) -> Path:
    """Three adapters merged with a cap that costs something."""
    path = tmp_path / "merged.space"
    assert command("merge", *three, "-o", path, "--cap", 5).code == 0
    return path


@pytest.fixture(scope="session", name="sample")
def _sample(tmp_path_factory: pytest.TempPathFactory) -> SpaceFile:
    """A space in memory: three tasks, one of which changes one site only."""
    root = tmp_path_factory.mktemp("sample")
    few = {"layer.1.out": SITES["layer.1.out"]}
    sources = [Source("one", write(root / "one", 0)), Source("org/two", write(root / "two", 1, few, base=None))]
    sources.append(Source("three", write(root / "three", 2)))
    return merge_sources(sources, FilePolicy(5, 0.0, None, {"layer.1.*": 4, "layer.*": 6}), model(root / "model"))
