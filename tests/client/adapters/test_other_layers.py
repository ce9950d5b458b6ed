"""GPT-2's Conv1D and convolutions: in by PEFT's own adapter, out for somebody who has only the space."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from share_client.contribute import contribute, read_contributions
from share_client.pull import PullOptions, pull
from share_core.fingerprint import describe_space
from share_core.types import SpaceSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
TARGETS = ["a.square", "a.wide", "a.kernel", "a.line"]


class Net(nn.Module):
    """A square and a wide Conv1D, a Conv2d and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict(
            {
                "square": Conv1D(6, 6),  # type: ignore[no-untyped-call]
                "wide": Conv1D(8, 6),  # type: ignore[no-untyped-call]
                "kernel": nn.Conv2d(2, 3, 2),
                "line": nn.Linear(3, 5),
            }
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a["wide"](torch.tanh(self.a["square"](x))).reshape(-1, 2, 2, 2)
        out: Tensor = self.a["line"](torch.tanh(self.a["kernel"](hidden)).flatten(1))
        return out


@pytest.fixture
def net() -> Callable[[], Net]:
    def make() -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return Net().eval()

    return make


def spec_of(net: Net) -> SpaceSpec:
    weights = {name: net.get_parameter(f"{name}.weight").detach() for name in TARGETS}
    matrices = {
        name: weight.T if isinstance(net.get_submodule(name), Conv1D) else weight.flatten(1)
        for name, weight in weights.items()
    }
    return describe_space("net", matrices, k_max=16, tau=0.0, rank_limit=4)


def test_every_layer_goes_in_and_comes_back(own_hub_class: Any, connect: Any, net: Any, tmp_path: Path) -> None:
    backbone, inputs = tmp_path / "model.safetensors", torch.linspace(-1, 1, 12).reshape(2, 6)
    save_file(dict(net().state_dict()), backbone)
    source = get_peft_model(net(), LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS)).eval()
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))))
    source.save_pretrained(str(tmp_path / "source"))
    hub = own_hub_class(tmp_path / "server", spec_of(net()))
    hub.start()
    try:
        owner, guest = hub.client(tmp_path / "owner", "owner/main"), hub.client(tmp_path / "guest", "guest/main")
        wanted = read_contributions([tmp_path / "source"])
        (sent,) = contribute(owner, connect(owner), wanted, backbone=str(backbone), wait=True)
        assert sent.state == "merged"
        own = pull(owner, connect(owner), "source", tmp_path / "own")
        known = PullOptions(backbone=str(backbone))
        pull(guest, connect(guest), "owner/source", tmp_path / "known", known)
        pull(guest, connect(guest), "owner/source", tmp_path / "model", PullOptions(merged_into=backbone))
        pull(guest, connect(guest), "owner/source", tmp_path / "blind")
    finally:
        hub.stop()
    assert own.head == "none"
    with torch.no_grad():
        expected = source(inputs)
        for name in ("own", "known"):
            loaded = PeftModel.from_pretrained(net(), tmp_path / name).eval()
            assert torch.allclose(loaded(inputs), expected, atol=1e-4), name
            assert torch.allclose(loaded.merge_and_unload()(inputs), expected, atol=1e-4), name
        merged = net()
        merged.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
        assert torch.allclose(merged(inputs), expected, atol=1e-4)
        assert not torch.allclose(net()(inputs), expected, atol=1e-2)
    # A kernel cannot be told from a matrix: PEFT says so, and nothing wrong is computed.
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(net(), tmp_path / "blind")
