"""A small BERT on disk, a hub over its query and value maps, and adapters that the PEFT library made and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from share_client.enrol import enrol
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_core.fingerprint import describe_space
from share_core.types import SpaceSpec
from share_server.local import LocalHub

INPUTS = torch.tensor([[3, 5, 7, 11], [1, 2, 4, 8]])


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
    )


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


@pytest.fixture(scope="session")
def bert_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone as ``save_pretrained`` writes it: the bare encoder."""
    directory = tmp_path_factory.mktemp("bert") / "model"
    seeded(lambda: BertModel(bert_config())).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def bert_spec(bert_directory: Path) -> SpaceSpec:
    model = BertModel.from_pretrained(bert_directory)
    weights = {
        path: module.weight.detach()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in ("query", "value")
    }
    return describe_space("little-bert", weights, k_max=32, tau=0.0, rank_limit=8)


@pytest.fixture
def load_bare(bert_directory: Path) -> Callable[[], Any]:
    """Return a function that loads the backbone anew."""
    return lambda: seeded(lambda: BertModel.from_pretrained(bert_directory))


@pytest.fixture
def features() -> Callable[[nn.Module], Tensor]:
    """Return a function: the last hidden states (2, 4, 16) of a model for fixed tokens."""

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            answer = model(input_ids=INPUTS)
        hidden: Tensor = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
        return hidden

    return run


@pytest.fixture
def load_classifier(bert_directory: Path) -> Callable[[], Any]:
    """Return a function that loads the backbone with a fresh head, the same one each time."""
    return lambda: seeded(lambda: BertForSequenceClassification.from_pretrained(bert_directory, num_labels=3))


@pytest.fixture
def save_adapter(load_bare: Any, load_classifier: Any, tmp_path: Path) -> Callable[..., Path]:
    """Return a function (name, seed=1, head=False, **config) that saves an adapter with random factors by PEFT."""

    def save(name: str, seed: int = 1, head: bool = False, **config: Any) -> Path:
        options = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], **config}
        if head:
            options["task_type"] = "SEQ_CLS"
        model = get_peft_model(load_classifier() if head else load_bare(), LoraConfig(**options))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        directory = tmp_path / name
        model.save_pretrained(str(directory))
        return directory

    return save


class AdapterHub(LocalHub):
    """A real hub that also enrols client directories."""

    def client(self, root: Path, member: str) -> ClientLayout:
        layout = ClientLayout(root)
        enrol(self.invite(member), layout, datetime.now(UTC))
        return layout


@pytest.fixture(scope="session")
def bert_hub(tmp_path_factory: pytest.TempPathFactory, bert_spec: SpaceSpec) -> Iterator[AdapterHub]:
    """A hub that all tests of this directory share; every test uses an organisation of its own."""
    hub = AdapterHub(tmp_path_factory.mktemp("hub") / "server", bert_spec)
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def member(
    bert_hub: AdapterHub, tmp_path: Path, request: pytest.FixtureRequest, connect: Callable[[ClientLayout], HubLink]
) -> tuple[ClientLayout, HubLink, str]:
    """Return (client directory, link, organisation) of a member of the test's own organisation."""
    organisation = "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip("-")[-40:].strip("-")
    layout = bert_hub.client(tmp_path / "c", f"{organisation}/main")
    return layout, connect(layout), organisation
