"""tasks.toml: what is read, and that every mistake is named."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from share_client import tasks_file
from share_client.backbone_config import BackboneConfig
from share_client.tasks_file import TaskConfig, read_tasks, tasks_from_toml
from share_core.errors import ConfigError

TASK = '[[task]]\nname = "a"\nkind = "image-classification"\ntrain = "t.npz"\ntest = "t.npz"\n'
HEAD = 'backbone = "digits-vit"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "t.npz").write_bytes(b"")
    return tmp_path / "tasks.toml"


def test_reads_defaults_and_overrides(path: Path) -> None:
    second = TASK.replace('"a"', '"b"') + "epochs = 9\nshare_head = true\n"
    path.write_text(HEAD + "[defaults]\nepochs = 6\npace = 1\n" + TASK + second)
    file = read_tasks(path)
    assert (file.backbone, file.device) == (BackboneConfig("digits-vit"), "auto")
    assert [task.name for task in file.tasks] == ["a", "b"]
    assert [task.epochs for task in file.tasks] == [6, 9]
    assert [task.share_head for task in file.tasks] == [False, True]
    assert file.tasks[0].pace == 1.0
    assert file.tasks[0].train == (path.parent / "t.npz").resolve()


def test_backbone_may_be_a_directory_beside_the_file(path: Path) -> None:
    (path.parent / "model").mkdir()
    assert tasks_from_toml('backbone = "model"\n' + TASK, path).backbone.model == str((path.parent / "model").resolve())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backbone = ", ["not valid TOML"]),
        (TASK, ["'backbone'", "missing"]),
        (HEAD, ["at least one [[task]]"]),
        ('backbone = "resnet"\n' + TASK, ["backbone", "minilm", "'resnet'"]),
        (HEAD + 'device = "gpu"\n' + TASK, ["device", "auto, cpu, cuda", "'gpu'"]),
        ("bakbone = 1\n" + HEAD + TASK, ["unknown key 'bakbone'", "did you mean 'backbone'"]),
        (HEAD + "[defaults]\nepoch = 3\n" + TASK, ["[defaults]", "'epoch'", "did you mean 'epochs'"]),
        (HEAD + '[defaults]\nname = "x"\n' + TASK, ["[defaults]", "unknown key 'name'"]),
        (HEAD + TASK + "lr = 3\n", ["task 'a'", "unknown key 'lr'"]),
        (HEAD + TASK.replace('name = "a"\n', ""), ["task number 1", "'name'", "missing"]),
        (HEAD + TASK.replace('"a"', '"A b"'), ["task 'A b'", "name", "a-z 0-9"]),
        (HEAD + TASK + TASK, ["task 'a'", "used once", "twice"]),
        (HEAD + TASK.replace("image-c", "c"), ["task 'a'", "kind", "text-classification", "'classification'"]),
        (HEAD + TASK.replace('train = "t.npz"', 'train = "no.npz"'), ["task 'a'", "train", "no.npz", "does not exist"]),
        (HEAD + TASK.replace('test = "t.npz"\n', ""), ["task 'a'", "'test'", "missing"]),
        (HEAD + TASK + "epochs = 0\n", ["task 'a'", "epochs", "integer from 1", "0 (int)"]),
        (HEAD + TASK + "epochs = true\n", ["epochs", "integer", "True (bool)"]),
        (HEAD + TASK + 'batch_size = "32"\n', ["batch_size", "integer", "(str)"]),
        (HEAD + TASK + "learning_rate = 0\n", ["learning_rate", "above 0"]),
        (HEAD + TASK + "learning_rate = nan\n", ["learning_rate", "nan"]),
        (HEAD + TASK + "pace = -1\n", ["pace", "from 0 to 60"]),
        (HEAD + TASK + "share_head = 1\n", ["share_head", "true or false"]),
        (HEAD + "task = 3\n", ["[[task]]", "3"]),
        (HEAD + "task = [3]\n", ["task number 1", "table"]),
    ],
)
def test_every_mistake_is_named(path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tasks_from_toml(text, path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        read_tasks(tmp_path / "nothing.toml")


def test_every_field_has_a_reader() -> None:
    assert set(tasks_file._READERS) == {field.name for field in fields(TaskConfig)}


@pytest.mark.parametrize(
    ("more", "name"),
    [("directions = 2", "directions"), ('[task.privacy]\nmechanism = "coefficients"\nepsilon = 1.0', "privacy")],
)
def test_a_budget_stands_alone(tmp_path: Path, more: str, name: str) -> None:
    (tmp_path / "a.npz").write_bytes(b"")
    head = 'backbone = "digits-vit"\n[[task]]\nname = "a"\nkind = "image-classification"\ntrain = "a.npz"\n'
    text = f"{head}validation = 0.2\nbudget = 0.2\n"
    assert tasks_from_toml(text, tmp_path / "tasks.toml").tasks[0].budget == 0.2
    with pytest.raises(ConfigError, match=f"budget: expected none beside {name}"):
        tasks_from_toml(text + more + "\n", tmp_path / "tasks.toml")
