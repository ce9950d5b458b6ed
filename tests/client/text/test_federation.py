"""Each kind end to end: two clients with two tasks of it at a real hub, real texts, above the stated baseline."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from share_client.backbone_config import BackboneConfig
from share_client.link import HubLink
from share_client.session import SessionOptions, run_session
from share_client.tasks_file import read_tasks
from share_client.training import Backbone, TrainingOptions, evaluate, load_backbone, prepare_task, train_lora
from share_core.fingerprint import describe_space
from share_proto.v1 import hub_pb2

TEXTS = Path(__file__).resolve().parents[4] / "shared" / "data" / "text"
OPTIONS = SessionOptions(linger_s=0.5, poll_s=0.02)
STEPS = 200
"""Steps of the teaching of a tiny model."""
LAST_LAYERS = BackboneConfig(
    "minilm", sites=tuple(f"{layer}.attention.self.{part}" for layer in (4, 5) for part in ("query", "value"))
)
"""Not all, to save time."""
Rows = Sequence[Mapping[str, Any]]

pytestmark = pytest.mark.skipif(not TEXTS.is_dir(), reason="needs ../shared/data/text")


def real(name: str, split: str, count: int) -> list[dict[str, Any]]:
    with gzip.open(TEXTS / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


@pytest.fixture(scope="module")
def taught(save_decoder: Callable[..., Path]) -> Path:
    """A tiny Llama that has read some news, reviews and questions."""
    from transformers import AutoModelForCausalLM

    texts = [row["text"][:160] for name in ("agnews", "cr", "trec", "qqp") for row in real(name, "train", 250)]
    folder = save_decoder("llama", texts, vocabulary=384, width=32, spread=0.02)
    backbone: Any = load_backbone(str(folder), "cpu")
    rows = [backbone.encode(text)[:32] for text in texts]
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = [rows[row] for row in torch.randint(len(rows), (16,), generator=draw).tolist()]
        inputs = backbone.collate([{"input_ids": row, "attention_mask": [1] * len(row)} for row in batch])
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        falling.step()
    model.save_pretrained(folder)
    return folder


@contextmanager
def federation(own_hub_class: Any, folder: Path, backbone: Backbone) -> Iterator[Any]:
    hub = own_hub_class(folder / "server", describe_space(backbone.name, backbone.site_weights()))
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


def write_client(root: Path, backbone: BackboneConfig, tasks: Mapping[str, tuple[str, Rows, Rows]], keys: str) -> Path:
    """Write rows and tasks.toml of one client."""
    text = f'device = "cpu"\n[backbone]\nmodel = "{backbone.model}"\n'
    text += f"sites = {json.dumps(backbone.sites)}\n"
    text += f"[defaults]\n{keys}\n"
    for name, (kind, train, test) in tasks.items():
        for split, rows in (("train", train), ("test", test)):
            (root / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text += (
            f'[[task]]\nname = "{name}"\nkind = "{kind}"\ntrain = "{name}-train.jsonl"\ntest = "{name}-test.jsonl"\n'
        )
    (root / "tasks.toml").write_text(text)
    return root / "tasks.toml"


def measured(link: HubLink) -> dict[str, float]:
    """Return the newest evaluation of every task that the hub knows."""
    lines = link.hub.ListEvaluations(hub_pb2.ListEvaluationsRequest()).evaluations
    return {line.task_id: line.value for line in sorted(lines, key=lambda line: line.version)}


def shown(
    hub: Any,
    tmp_path: Path,
    connect: Callable[..., HubLink],
    backbone: Backbone,
    model: BackboneConfig,
    clients: Mapping[str, Mapping[str, tuple[str, Rows, Rows]]],
    keys: str,
) -> dict[str, tuple[float, float]]:
    """Run every client's session; return the baseline and what the hub was told, by task."""
    found = {}
    for name, tasks in clients.items():
        layout = hub.client(tmp_path / name, f"{name}/main")
        path = write_client(layout.root, model, tasks, keys)
        counters = run_session(layout.root, path, options=OPTIONS)
        assert counters.refused == 0
        assert counters.merged >= len(tasks)
        values = measured(connect(layout))
        for task in read_tasks(path).tasks:
            prepared = prepare_task(task, backbone)
            head = train_lora(backbone, prepared, 0, TrainingOptions.of(task)).head
            found[f"{name}/{task.name}"] = (
                evaluate(backbone, prepared, None, head).value,
                values[f"{name}/{task.name}"],
            )
    return found


def instructions(name: str, split: str, count: int) -> Rows:
    return [{"prompt": row["text"], "response": f"kind {row['label']}"} for row in real(name, split, count)]


def test_language_models(taught: Path, own_hub_class: Any, tmp_path: Path, connect: Callable[..., HubLink]) -> None:
    model = BackboneConfig(str(taught), sites="all-linear")
    backbone = load_backbone(model, "cpu")

    def two(name: str) -> dict[str, tuple[str, Rows, Rows]]:
        texts, asked = (
            [make(name, split, count) for split, count in (("train", 224), ("test", 60))]
            for make in (real, instructions)
        )
        return {"texts": ("causal-lm", *texts), "asked": ("instruction", *asked)}  # type: ignore[dict-item]

    clients = {"north": two("snips"), "south": two("trec")}
    keys = "accumulate = 2\ncheckpointing = true"
    with federation(own_hub_class, tmp_path, backbone) as hub:
        found = shown(hub, tmp_path, connect, backbone, model, clients, keys)
    assert len(found) == 4
    for task_id, (frozen, adapted) in found.items():
        assert adapted > frozen + (0.3 if task_id.endswith("asked") else 0.02), task_id


def pairs(split: str, first: int, count: int, sign: int) -> Rows:
    """Return pairs of sentences with how alike they are, or with ``sign`` -1 how different."""
    rows = real("stsb", split, first + count)[first:]
    return [{"text": row["text"], "text_b": row["text_b"], "score": sign * row["label"]} for row in rows]


def test_numbers_of_texts(own_hub_class: Any, tmp_path: Path, connect: Callable[..., HubLink]) -> None:
    backbone = load_backbone(LAST_LAYERS, "cpu")
    clients = {
        client: {"pairs": ("text-regression", pairs("train", first, 96, sign), pairs("test", first, 48, sign))}
        for client, first, sign in (("north", 0, 1), ("south", 96, -1))
    }
    with federation(own_hub_class, tmp_path, backbone) as hub:
        found = shown(hub, tmp_path, connect, backbone, LAST_LAYERS, clients, "")
    assert len(found) == 2
    for task_id, (probe, adapted) in found.items():
        assert adapted > probe + 0.1, task_id


def names(split: str, first: int, count: int) -> Rows:
    """Return questions cut into words, with runs of capitals tagged: the model has to tell them, it reads no case."""
    rows = []
    for row in real("trec", split, first + count)[first:]:
        words, tags = row["text"].split(), ["O"]
        for word in words[1:]:
            tags.append("O" if not word[0].isupper() else "I-NAME" if tags[-1] != "O" else "B-NAME")
        rows.append({"words": words, "tags": tags})
    return rows


def test_tags_of_words(own_hub_class: Any, tmp_path: Path, connect: Callable[..., HubLink]) -> None:
    backbone = load_backbone(LAST_LAYERS, "cpu")
    clients = {
        client: {"names": ("token-classification", names("train", first, 160), names("test", first, 80))}
        for client, first in (("north", 0), ("south", 160))
    }
    with federation(own_hub_class, tmp_path, backbone) as hub:
        found = shown(hub, tmp_path, connect, backbone, LAST_LAYERS, clients, "")
    assert len(found) == 2
    for task_id, (probe, adapted) in found.items():
        assert adapted > probe + 0.1, task_id
