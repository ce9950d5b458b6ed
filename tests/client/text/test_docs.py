"""What docs/kinds.md shows can be read and trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

from share_client.kind_names import KINDS
from share_client.tasks_file import tasks_from_toml
from share_client.training import Backbone, TrainingOptions, evaluate, prepare_task, train_lora

TEXT = (Path(__file__).parents[3] / "docs" / "kinds.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_every_tasks_file_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "models" / "small-llama").mkdir(parents=True)
    files = blocks("toml")
    assert len(files) == 4
    for text in files:
        for name in re.findall(r"^(?:train|test) = \"(.*?)\"", text, re.MULTILINE):
            (tmp_path / name).touch()
        assert tasks_from_toml(text, tmp_path / "tasks.toml").tasks


def test_every_kind_of_texts_is_in_the_table() -> None:
    named = set(re.findall(r"^\| `([a-z-]+)` \|", TEXT, re.MULTILINE))
    assert named >= {kind for kind in KINDS if kind not in ("keypoints", "pose", "text-to-image")}


def test_the_kind_of_ones_own_is_trained(llama: Backbone, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(blocks("python")[0])
    words = ("awful", "poor", "fair", "good", "great")
    rows = [
        {"text": f"a {word} film {number}", "rank": words.index(word) + 1} for word in words for number in range(12)
    ]
    (tmp_path / "ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = next(text for text in blocks("toml") if "ranks:Ranks" in text)
    task = prepare_task(tasks_from_toml(text, tmp_path / "tasks.toml").tasks[0], llama)
    trained = train_lora(llama, task, 4, TrainingOptions(epochs=15, batch_size=8, learning_rate=1e-2))
    learned = evaluate(llama, task, trained.adapter, trained.head)
    assert learned.metric == "within-one"
    assert learned.value > 0.9
