"""``share-client check``: every broken file of the corpus is told in words that help, and nothing private is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from share_client import check as check_module
from share_client import sharing as sharing_module
from share_client import tasks_file as tasks_module
from share_client import values as values_module
from share_client.backbones import huggingface as huggingface_module
from share_client.check import check_tasks, print_check
from share_client.cli import app
from share_client.data import folders as folders_module
from share_client.data import images as images_module
from share_client.data import lines as lines_module
from share_client.data import pictures as pictures_module
from share_client.data import splits as splits_module
from share_client.data import table as table_module
from share_client.kinds import text_classification as text_module
from share_client.kinds import token_classification as token_module
from share_client.tasks_file import read_tasks
from share_client.training import TrainingOptions, load_backbone, prepare_task, train_in_space
from share_client.training import evaluation as evaluation_module
from share_client.training import gradients as gradients_module
from share_client.watched import Dropped
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.space import empty_space
from share_core.tensorfile import describe_tensors
from share_core.types import SiteBasis, Space
from share_core.wire import encode_snapshot, encode_update

CORPUS = Path(__file__).parent / "check_corpus"
CASES = sorted(path.parent.name for path in CORPUS.glob("*/words.txt"))
SECRET = "qzsecret"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _needs(name: str) -> None:
    """Skip a case whose format takes a package that is not installed."""
    text = (CORPUS / name / "tasks.toml").read_bytes()
    for mark, package in ((b".parquet", "pyarrow"), (b'"set"', "datasets"), (b'"../model"', "transformers")):
        if mark in text:
            pytest.importorskip(package)


def _unsaid(name: str) -> list[str]:
    """Return the words of a case that are not said, and the secret where it is."""
    said: list[str] = []
    found = check_tasks(CORPUS / name / "tasks.toml")
    print_check(found, said.append)
    text = "\n".join(said)
    words = (CORPUS / name / "words.txt").read_text(encoding="utf-8").splitlines()
    return [word for word in words if word not in text] + [SECRET] * (SECRET in text)


def test_the_corpus_is_there() -> None:
    assert len(CASES) >= 90


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_is_told_in_words_that_help(name: str) -> None:
    _needs(name)
    assert _unsaid(name) == []


def _none(*_: Any, **__: Any) -> Any:
    return []


def _plain_encodable(value: Any) -> bool:
    """Look at a string itself and into nothing."""
    return not isinstance(value, str) or all(not "\ud800" <= one <= "\udfff" for one in value)


def _finite_by_recursion(value: Any) -> bool:
    return not isinstance(value, list) or all(map(_finite_by_recursion, value))


GUARDS: dict[str, tuple[str, Any, str, Any]] = {
    "encodings": ("latin-1", lines_module, "_decoded", lambda line, *_: line.decode("utf-8", "replace")),
    "finite gradients": ("pixels-huge", gradients_module, "require_finite_gradients", _none),
    "surrogates": ("text-half-character", table_module, "_encodable", lambda _: True),
    "surrogates in lists": ("word-half-character", table_module, "_encodable", _plain_encodable),
    "names that are none": ("list-of-base64", pictures_module, "_is_file", Path.is_file),
    "large integers": ("score-too-large", table_module, "_as_float", float),
    "depth": ("words-deep", table_module, "_finite", _finite_by_recursion),
    "positions": ("row-beyond-the-positions", huggingface_module, "positions_of", lambda _: None),
    "unknown keys": ("misspelt-key", values_module, "unknown", _none),
    "two tasks of one name": ("same-name-twice", tasks_module, "_twins", _none),
    "what leaves beside noise": ("shared-head-beside-noisy-coefficients", tasks_module, "_exposed", _none),
    "names of organisations": ("share-with-no-name", sharing_module, "check_name", lambda name, _: name),
    "strings": ("tags-numbers", token_module, "strings_of", lambda table, field: table.columns[field]),
    "options": ("option-not-for-text", text_module, "read_options", _none),
    "litter in folders": ("other-file-in-a-class", folders_module, "SUFFIXES", (".png", ".txt")),
    "one format": ("train-archive-test-folder", images_module, "_format", lambda _: images_module.ARCHIVE),
    "rows on both sides": ("too-few-to-hold-out", splits_module, "held_out", lambda *_: ([0], [0])),
    "watched folders": ("watched-folder-without-test", check_module, "dropped_tasks", lambda *_: Dropped()),
    "existing files": ("missing-file", tasks_module, "_data_path", lambda path, _: path),
}
"""A case, and a guard whose absence it must show."""


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_that_is_taken_out_is_noticed(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, module, attribute, instead = GUARDS[guard]
    _needs(name)
    monkeypatch.setattr(module, attribute, instead)
    try:
        unsaid = _unsaid(name)
    except (AttributeError, TypeError, ValueError, RuntimeError, OSError, OverflowError) as error:
        unsaid = [str(error)]  # what nothing refuses ends the program later
    assert unsaid != []


def test_a_secret_that_is_said_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = table_module._checked

    def telling(value: Any, *others: Any) -> Any:
        try:
            return plain(value, *others)
        except ConfigError as error:
            raise ConfigError(f"{error}: {value!r}") from None

    monkeypatch.setattr(table_module, "_checked", telling)
    assert _unsaid("labels-mixed") == [SECRET]


@pytest.fixture
def good(tmp_path: Path) -> Callable[[str], Path]:
    """Return a writer of a tasks file of bars; the argument is put behind the task."""

    def write(more: str = "") -> Path:
        draw = np.random.default_rng(0)
        y = draw.integers(0, 4, 100)
        np.savez(tmp_path / "bars.npz", x=draw.random((100, 8, 8)), y=y)
        path = tmp_path / "tasks.toml"
        path.write_text(
            'backbone = "digits-vit"\ndevice = "cpu"\n[[task]]\nname = "bars"\nkind = "image-classification"\n'
            f'train = "bars.npz"\nvalidation = 0.2\nepochs = 2\n{more}'
        )
        return path

    return write


def _really(path: Path, space: Space | None = None) -> bytes:
    """Return the payload that a real training of the only task makes."""
    file = read_tasks(path)
    backbone = load_backbone(file.backbone, "cpu")
    space = space or empty_space(describe_space(backbone.name, backbone.site_weights()))
    task = prepare_task(file.tasks[0], backbone)
    result = train_in_space(backbone, task, space, "org/bars", TrainingOptions.of(file.tasks[0]))
    return encode_update(result.update)


@pytest.mark.parametrize("share_head", [False, True])
def test_what_it_says_leaves_is_what_a_real_training_sends(good: Callable[[str], Path], share_head: bool) -> None:
    path = good(f"share_head = {str(share_head).lower()}\n")
    found = check_tasks(path)
    assert found.problems == ()
    (task,) = found.tasks
    payload = _really(path)
    assert task.payload_bytes == len(payload)
    assert task.most_bytes is None
    assert [(t.name, t.dtype, list(t.shape), t.bytes) for t in task.leaves] == [
        tuple(one.values()) for one in describe_tensors(payload)
    ]
    assert any(t.name.startswith("head/") for t in task.leaves) is share_head
    assert [t.name for t in task.stays] == ([] if share_head else ["weight", "bias"])
    assert (task.train_rows, task.test_rows, task.classes, task.steps) == (82, 18, 4, 6)
    assert task.peak_bytes > 10 << 20
    assert task.reports == "accuracy"


@pytest.mark.parametrize("share_head", [False, True])
def test_what_is_chosen_by_what_is_learned_has_a_bound(good: Callable[[str], Path], share_head: bool) -> None:
    path = good(f"share_head = {str(share_head).lower()}\nbudget = 0.3\n")
    (task,) = check_tasks(path).tasks
    sent = describe_tensors(_really(path))
    assert task.most_bytes is not None
    assert 0.5 * task.most_bytes < sum(one["bytes"] for one in sent) <= task.most_bytes
    assert all(one["name"].partition("/")[0] in ("A", "B", "E_o", "E_i", "head") for one in sent)
    said: list[str] = []
    print_check(check_tasks(path), said.append)
    assert any(f"leaves at most {task.most_bytes} bytes" in line for line in said)


def test_a_given_version_shows_coefficients(good: Callable[[str], Path], tmp_path: Path) -> None:
    path = good("")
    backbone = load_backbone("digits-vit", "cpu")
    empty = empty_space(describe_space(backbone.name, backbone.site_weights()))
    bases = {
        site: SiteBasis(torch.eye(basis.left.shape[0])[:, :3], torch.eye(basis.right.shape[0])[:, :5])
        for site, basis in empty.bases.items()
    }
    space = replace(empty, version=7, bases=bases)
    (tmp_path / "space.safetensors").write_bytes(encode_snapshot(space))
    answer = CliRunner().invoke(app, ["check", str(path), "--space", str(tmp_path / "space.safetensors"), "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["version"] == 7
    shapes = {tensor["name"]: tensor["shape"] for tensor in found["tasks"][0]["leaves"]}
    assert shapes["E_o/blocks.0.attention.query"] == [3, 3]
    assert shapes["E_i/blocks.0.attention.query"] == [5, 3]
    assert shapes["A/blocks.0.attention.query"] == [2, 64]


@pytest.mark.parametrize(
    ("privacy", "kind"), [("mechanism = 'coefficients'", "CoefficientNoise"), ("mechanism = 'dp-sgd'", "SampleNoise")]
)
def test_noise_is_declared_as_for_the_whole_training(good: Callable[[str], Path], privacy: str, kind: str) -> None:
    if kind == "SampleNoise":
        pytest.importorskip("opacus")
    found = check_tasks(good(f"[task.privacy]\n{privacy}\nnoise_multiplier = 2.0\n"))
    assert found.problems == ()
    (task,) = found.tasks
    assert task.privacy.startswith(kind)
    assert task.reports is None
    kinds = {tensor.name.partition("/")[0] for tensor in task.leaves}
    assert kinds == ({"E_o", "E_i"} if kind == "CoefficientNoise" else {"A", "B"})
    assert task.steps == (12 if kind == "CoefficientNoise" else 6)
    assert any("tried with random ones" in note for note in task.notes) is (kind == "CoefficientNoise")


def test_a_version_of_another_backbone_is_a_problem(good: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "space.safetensors").write_bytes(b"nothing")
    found = check_tasks(good(""), tmp_path / "space.safetensors")
    assert "does not fit the backbone" in found.problems[0]
    assert found.untried == ("bars",)
    assert "cannot read" in check_tasks(good(""), tmp_path / "no.safetensors").problems[0]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ('share_with = ["lab", "clinic"]', "shared with clinic, lab: as the first update says it, a later change"),
        ('share_with = "everybody"', "shared with everybody in the federation: as"),
        ('owner = "acme"', "into the task acme/bars of acme, who must have made it and named your organisation"),
        ("", ""),
    ],
)
def test_it_says_whose_task_it_is_and_with_whom_it_is_shared(good: Callable[[str], Path], key: str, says: str) -> None:
    found = check_tasks(good(f"{key}\n"))
    (task,) = found.tasks
    said: list[str] = []
    print_check(found, said.append)
    if says:
        assert task.goes_to.startswith(says)
        assert f"  {task.goes_to}" in said
    else:
        assert task.goes_to == ""
        assert "shared" not in "\n".join(said)
    assert task.reports == (None if "owner" in key else "accuracy"), "the hub takes evaluations from the owner only"


def test_a_file_that_cannot_be_read_ends_one_task_and_is_not_named(
    good: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from share_client import training as training_module

    plain = training_module.prepare_task

    def failing(config: Any, backbone: Any) -> Any:
        if config.name == "bars":
            raise OSError(36, "File name too long", f"/{SECRET}")
        return plain(config, backbone)

    monkeypatch.setattr(training_module, "prepare_task", failing)
    second = '[[task]]\nname = "more"\nkind = "image-classification"\ntrain = "bars.npz"\nvalidation = 0.2\n'
    found = check_tasks(good(second))
    assert [task.name for task in found.tasks] == ["more"]
    (problem,) = found.problems
    assert "task 'bars': a file that it needs cannot be read (File name too long)" in problem
    assert SECRET not in problem


def test_code_and_text_for_people(good: Callable[[str], Path]) -> None:
    answer = CliRunner().invoke(app, ["check", str(good(""))])
    assert answer.exit_code == 0, answer.output
    for words in ("82 training and 18 test rows, 4 classes", "leaves, ", "A/blocks.0.attention.query  F32  4 x 64"):
        assert words in answer.stdout
    assert "stays here, the private head:\n    weight  float32  4 x 64  1024 bytes" in answer.stdout
    bad = CliRunner().invoke(app, ["check", str(good("epoch = 3\n"))])
    assert bad.exit_code == 1
    assert "problem 1: " in bad.stdout


def test_the_estimate_counts_steps_rows_and_pace() -> None:
    class _Cost:
        def __init__(self, lengths: list[int]) -> None:
            self._lengths = lengths

        def lengths(self) -> list[int]:
            return self._lengths

    class _Task:
        def __init__(self, lengths: list[int]) -> None:
            self.train, self.train_rows = _Cost(lengths), len(lengths)
            self.config = type("config", (), {"batch_size": 2})

    whole, one = _Task([8, 8, 2, 2, 2, 2]), _Task([8, 8])
    assert check_module._relative_cost(whole, one) == pytest.approx(24 / 3 / 16)  # type: ignore[arg-type]


def test_a_task_in_a_watched_folder_is_tried_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most memory may be needed for the test rows: they are passed through the backbone as they will be."""
    folder = tmp_path / "incoming" / "bars"
    folder.mkdir(parents=True)
    for part, rows in (("train", 6), ("test", 200)):
        x = np.random.default_rng(0).random((rows, 8, 8), dtype=np.float32)
        np.savez(folder / f"{part}.npz", x=x, y=np.arange(rows) % 2)
    (tmp_path / "tasks.toml").write_text(
        'backbone = "digits-vit"\ndevice = "cpu"\nwatch = "incoming"\n'
        '[defaults]\nkind = "image-classification"\nbatch_size = 6\naccumulate = 2\n'
    )
    judged = []
    plain = evaluation_module.judged_rows

    def counting(*given: Any) -> Any:
        judged.append(len(plain(*given)))
        return plain(*given)

    monkeypatch.setattr(evaluation_module, "judged_rows", counting)
    found = check_tasks(tmp_path / "tasks.toml")
    assert found.problems == ()
    assert [(task.name, task.train_rows, task.test_rows) for task in found.tasks] == [("bars", 6, 200)]
    assert judged == [12], "four times the three rows of a part"


def test_what_fails_in_no_foreseen_way_is_a_problem_of_its_task_without_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).random((6, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "rows.npz", x=x, y=np.arange(6) % 2)
    task = '[[task]]\nname = "{}"\nkind = "image-classification"\ntrain = "rows.npz"\ntest = "rows.npz"\n'
    text = 'backbone = "digits-vit"\ndevice = "cpu"\n' + task.format("one") + task.format("two")
    (tmp_path / "tasks.toml").write_text(text)

    def failing(_: Any, task: Any, *others: Any) -> Any:
        if task.config.name == "one":
            raise ValueError(f"no such word: {SECRET}")
        return None

    monkeypatch.setattr(evaluation_module, "judged_rows", failing)
    found = check_tasks(tmp_path / "tasks.toml")
    assert [one.name for one in found.tasks] == ["two"]
    assert len(found.problems) == 1
    assert "task 'one': failed with ValueError at test_check.py, line " in found.problems[0]
    assert SECRET not in found.problems[0]
