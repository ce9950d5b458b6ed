"""One set of rows in every format reads alike, and what is wrong with each format is named."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from share_client import trainer
from share_client.data import Field, content_hash, held_out, read_splits, read_table, splits
from share_client.data import delimited as delimited_module
from share_client.data import lines as lines_module
from share_client.data import table as table_module
from share_client.data.content import stamps
from share_client.kind_names import KINDS
from share_client.tasks_file import TaskConfig
from share_client.trainer import BackboneTrainer
from share_client.watched import Settling
from share_core.errors import ConfigError

FIELDS = (Field("text", (str,)), Field("text_b", (str,), required=False), Field("label", (int, str)))
ROWS = [
    {"sentence": 'a "quoted", part', "gold": 1, "idx": 0},
    {"sentence": "two\nlines", "gold": 0, "idx": 1},
    {"sentence": "ünïcödé", "gold": 1, "idx": 2},
]
NAMES = {"text": "sentence", "label": "gold"}


def _jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def _csv(path: Path) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def _parquet(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def _dataset(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    # Shuffled and put back: a data set on disk may carry an order of its own.
    datasets.Dataset.from_list(ROWS).select([2, 1, 0]).select([2, 1, 0]).save_to_disk(str(path))
    return path


WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "a.jsonl": _jsonl,
    "a.csv": _csv,
    "a.csv.gz": _csv,
    "a.parquet": _parquet,
    "dataset": _dataset,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name)
    table = read_table(path, FIELDS, NAMES)
    assert table.columns == {"text": tuple(row["sentence"] for row in ROWS), "label": (1, 0, 1)}
    assert read_table(path, FIELDS, NAMES, rows=2).columns["label"] == (1, 0)
    assert table.take([2, 0]).where(1) == table.where(0)
    with pytest.raises(ConfigError) as caught:
        read_table(path, FIELDS, {"text": "sentense", "label": "gold"})
    for words in (str(path), "'sentense' is missing", "did you mean 'sentence'", "idx", 'columns = { text = "..." }'):
        assert words in str(caught.value)


def test_names_of_columns_are_not_told_where_they_may_be_a_row(tmp_path: Path) -> None:
    path = tmp_path / "headless.csv"
    path.write_text("my secret,1\nother,0\n")
    with pytest.raises(ConfigError, match="line 2: column 'text' is missing; got no well-known name among 2") as caught:
        read_table(path, FIELDS, {})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"text,label\na,1\nb\n", "line 3: expected 2 cells as in the header, got 1"),
        (b"text,label\na,1\n\nb,c,1\n", "line 4: expected 2 cells .* got 3"),
        (b'text,label\n"a\nb",1\n"c,1\n', "line 4: expected comma-separated cells"),
        (b'text,label\n"a"b,1\n', "line 2: expected comma-separated"),
        (b"text;label\na;1\n", "line 1: expected commas"),
        (b"text,label,text\na,1,b\n", "line 1: expected columns with different names"),
        (b"", "at least one row"),
        (b"text,label\n", "at least one row"),
        (b"text,label\na,\n", "line 2: label: expected an integer or a string, got nothing"),
        ("text,label\nä,1\n".encode("latin-1"), "line 2: expected text in UTF-8.*Latin-1.*iconv -f WINDOWS-1252"),
        ("text,label\na,1\n".encode("utf-16"), "line 1: .*UTF-16.*iconv -f UTF-16"),
        ("text,label\na,1\n".encode("utf-16-le"), "line 1: .*zero bytes, as UTF-16"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        read_table(path, FIELDS, {})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_byte_order_mark_and_windows_lines_are_accepted(tmp_path: Path, ending: bytes) -> None:
    path = tmp_path / "windows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + ending.join([b"text,label", b"a,1", b"b,0", b""]))
    assert read_table(path, FIELDS, {}).columns == {"text": ("a", "b"), "label": (1, 0)}


def test_cells_become_what_the_field_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "typed.csv"
    path.write_text('f,i,b,points,s\n1,-3,True,"[[1, 2.5], [3, 4]]",07\n2e-1,0,false,"[[0, 0]]",8\n')
    fields = [
        Field("f", (float, int)),
        Field("i", (int,)),
        Field("b", (bool,)),
        Field("points", (list,)),
        Field("s", (int, str)),
    ]
    assert read_table(path, fields, {}).columns == {
        "f": (1.0, 0.2),
        "i": (-3, 0),
        "b": (True, False),
        "points": ([[1, 2.5], [3, 4]], [[0, 0]]),
        "s": ("07", "8"),
    }


@pytest.mark.parametrize(
    ("cell", "types", "words"),
    [
        ("nan", (float,), "finite"),
        ("1e999", (float,), "finite"),
        ("x", (float,), "expected a number, got str"),
        ("1.5", (int,), "expected an integer, got str"),
        ("[1, NaN]", (list,), "finite"),
        ("[1", (list,), "expected a list, got str"),
        ("", (float,), "expected a number, got nothing"),
    ],
)
def test_bad_cells_are_named(tmp_path: Path, cell: str, types: tuple[type, ...], words: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f'v,w\n"{cell}",x\n')
    with pytest.raises(ConfigError, match=f"line 2: v: .*{words}"):
        read_table(path, [Field("v", types)], {})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"v": NaN}', "finite"),
        ('{"v": [1, [2, -Infinity]]}', "finite"),
        ('{"v": 1' + "0" * 400 + "}", "finite numbers, got .* one too large"),
        ('{"v": ' + "[" * 600 + "NaN" + "]" * 600 + "}", "finite"),
        ('{"v": ' + "[" * 600 + '"\\ud800"' + "]" * 600 + "}", "half of a surrogate pair"),
        ('{"v": [{"\\ud800": 1}]}', "half of a surrogate pair"),
        ('{"v": "\\ud800"}', "half of a surrogate pair"),
        ('{"v": 1' + "0" * 5000 + "}", "number too long"),
        ('{"v": ' + "[" * 100_000 + "}", "too deep"),
        ('{"v": null}', "got nothing"),
    ],
)
def test_bad_json_values_are_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=f"line 1: .*{words}"):
        read_table(path, [Field("v", (float, list, str))], {})


def test_lists_deeper_than_the_stack_are_read(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"v": ' + "[" * 600 + "]" * 600 + "}\n")
    (value,) = read_table(path, [Field("v", (list,))], {}).columns["v"]
    depth = 0
    while value:
        (value,) = value
        depth += 1
    assert depth == 599


def test_arrow_trouble_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "bad.parquet"
    for column, words in (
        ([1.0, 2.0], "row 0: label: .*got float; integers with gaps"),
        ([1, None], "row 1: label: expected .* got nothing"),
        ([b"x", b"y"], "row 0: label: .* got bytes"),
    ):
        parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": column}), path)
        with pytest.raises(ConfigError, match=words):
            read_table(path, FIELDS, {})
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(ConfigError, match="cannot read Parquet"):
        read_table(path, FIELDS, {})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install 'fedshare\[data\]'"):
        read_table(path, FIELDS, {})


def test_directory_trouble_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"a directory without state\.json"):
        read_table(tmp_path, FIELDS, {})
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ConfigError, match=r"name one, for example train = .*/train\" \(splits: train\)"):
        read_table(tmp_path, FIELDS, {})
    (tmp_path / "dataset_dict.json").unlink()
    (tmp_path / "state.json").write_text("{}")
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="cannot read the datasets directory"):
        read_table(tmp_path, FIELDS, {})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs datasets: pip install 'fedshare\[data\]'"):
        read_table(tmp_path, FIELDS, {})


def test_unknown_field_and_format_are_named(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"columns: unknown field 'txt': .*did you mean 'text'"):
        read_table(path, FIELDS, {"txt": "sentence"})
    with pytest.raises(ConfigError, match=r"ends with .jsonl.*got '.xlsx'"):
        read_table(tmp_path / "a.xlsx", FIELDS, {})


@pytest.fixture
def config(tmp_path: Path) -> TaskConfig:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"text": "row {row}", "label": {row % 2}}}\n' for row in range(40)))
    return TaskConfig("t", "text-classification", path, validation=0.25)


def test_held_out_rows_are_not_trained_on(config: TaskConfig) -> None:
    train, test = read_splits(config, FIELDS)
    assert set(train.columns["text"]).isdisjoint(test.columns["text"])
    assert train.rows + test.rows == 40
    assert read_splits(config, FIELDS)[1] == test
    short, small = read_splits(replace(config, rows=5, test_rows=2), FIELDS)
    assert (short.columns["text"], small.columns["text"]) == (train.columns["text"][:5], test.columns["text"][:2])


def test_fields_in_one_split_only_are_named(config: TaskConfig, tmp_path: Path) -> None:
    pairs = tmp_path / "test.jsonl"
    pairs.write_text('{"text": "a", "text_b": "b", "label": 1}\n')
    with pytest.raises(ConfigError, match=r"text_b: expected it in both files or in none.*test\.jsonl"):
        read_splits(replace(config, test=pairs, validation=None), FIELDS)


@given(st.integers(2, 400), st.integers(0, 200), st.floats(0.05, 0.9))
@settings(max_examples=60, deadline=None)
def test_rows_that_are_added_move_no_row_to_the_other_side(rows: int, more: int, share: float) -> None:
    try:
        before = held_out(range(rows), share, "here")
    except ConfigError:
        return  # a side without rows
    after = held_out(range(rows + more), share, "here")
    for old, new in zip(before, after, strict=True):
        assert [row for row in new if row < rows] == old
    assert sorted(after[0] + after[1]) == list(range(rows + more))


def test_held_out_share_is_about_what_was_asked_for() -> None:
    for share in (0.05, 0.2, 0.5):
        assert abs(len(held_out(range(20_000), share, "")[1]) / 20_000 - share) < 0.01


def test_too_few_rows_to_hold_out_are_named() -> None:
    with pytest.raises(ConfigError, match="here: validation: expected rows on both sides, got 1 to train on and 0"):
        held_out([1], 0.2, "here")


def test_hash_of_a_directory_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "d" / "x").mkdir(parents=True)
    (tmp_path / "d" / "x" / "1").write_bytes(b"a")
    seen = [content_hash(tmp_path / "d")]
    (tmp_path / "d" / "x" / "1").write_bytes(b"b")
    seen.append(content_hash(tmp_path / "d"))
    (tmp_path / "d" / "x" / "1").rename(tmp_path / "d" / "x" / "2")
    seen.append(content_hash(tmp_path / "d"))
    assert len(set(seen)) == 3


def test_what_a_link_leads_to_is_looked_at_and_a_link_in_a_circle_ends(tmp_path: Path) -> None:
    """Readers follow links: what is not looked at could change unseen, and a folder of links would never be whole."""
    store, folder = tmp_path / "store", tmp_path / "d"
    for name in ("cats", "dogs"):
        (store / name).mkdir(parents=True)
        (store / name / "1").write_bytes(name.encode())
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(store / name)
    (store / "dogs" / "back").symlink_to(folder)
    names = [Path(name).relative_to(folder).as_posix() for name, _, _ in stamps(folder)]
    assert names == ["cats/1", "dogs/1"]
    assert Settling(now=lambda: time.time() + 60).is_whole(folder, named=True)
    before = content_hash(folder)
    (store / "dogs" / "1").write_bytes(b"other dogs")
    assert content_hash(folder) != before


def _nothing(*_: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("module", "guard", "instead", "check"),
    [
        (table_module, "_finite", _nothing, ("a.jsonl", b'{"text": "a", "label": 1, "v": NaN}\n')),
        (table_module, "_encodable", _nothing, ("a.jsonl", b'{"text": "\\ud800", "label": 1, "v": 1}\n')),
        (lines_module, "_UTF16_MARKS", (b"never",), ("a.csv", b"\xff\xfetext,label,v\na,1,1\n")),
        (delimited_module, "_header", lambda cells, where: list(cells), ("a.csv", b"text,label,v,text\na,1,1,b\n")),
    ],
)
def test_a_guard_that_is_taken_out_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    guard: str,
    instead: Any,
    check: tuple[str, bytes],
) -> None:
    path = tmp_path / check[0]
    path.write_bytes(check[1])

    def said() -> str:
        try:
            read_table(path, [*FIELDS, Field("v", (float,))], {})
        except ConfigError as error:
            return str(error)
        return "nothing"

    before = said()
    monkeypatch.setattr(module, guard, instead)
    assert before != "nothing"
    assert said() != before


def test_a_split_that_lets_a_row_stand_on_both_sides_is_noticed(
    config: TaskConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(keys: Sequence[int], share: float | None, where: str) -> tuple[list[int], list[int]]:
        return list(range(len(keys))), list(range(0, len(keys), 4))

    monkeypatch.setattr(splits, "held_out", both)
    with pytest.raises(AssertionError):
        test_held_out_rows_are_not_trained_on(config)


def test_who_reads_otherwise_asks_for_another_training(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a.jsonl", "d/x"):
        (tmp_path / name).write_text("{}\n")

    def hashed(train: str, *more: str) -> str:
        path = tmp_path / "tasks.toml"
        lines = ['name = "t"', 'kind = "text-classification"', f'train = "{train}"', *more]
        path.write_text('backbone = "minilm"\n[[task]]\n' + "\n".join(lines))
        (task,) = BackboneTrainer(path).tasks()
        return task.content_hash

    seen = [
        hashed("a.jsonl", "validation = 0.2"),
        hashed("a.jsonl", "validation = 0.3"),
        hashed("a.jsonl", "validation = 0.2", 'columns = { text = "t" }'),
        hashed("a.jsonl", "validation = 0.2", "options = { x = 1 }"),
        hashed("a.jsonl", 'test = "a.jsonl"'),
        hashed("d", "validation = 0.2"),
    ]
    (tmp_path / "d" / "y").write_text("new")
    seen.append(hashed("d", "validation = 0.2"))
    assert len(set(seen)) == len(seen)
    assert hashed("a.jsonl", 'test = "a.jsonl"', "epochs = 9") == hashed("a.jsonl", 'test = "a.jsonl"')


def test_another_kind_asks_for_another_training(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("{}\n")

    def hashed(backbone: str, kind: str, *more: str, folder: Path = tmp_path) -> str:
        path = folder / "tasks.toml"
        lines = ['name = "t"', f'kind = "{kind}"', 'train = "a.jsonl"', 'test = "a.jsonl"', *more]
        path.write_text(f'backbone = "{backbone}"\n[[task]]\n' + "\n".join(lines))
        (task,) = BackboneTrainer(path).tasks()
        return task.content_hash

    for backbone in ("minilm", "digits-vit"):
        for more in ((), ("options = { x = 1 }",)):
            seen = [hashed(backbone, kind, *more) for kind in (*KINDS, "own:Kind", "sub/own:Kind")]
            assert len(set(seen)) == len(seen)
    as_before = content_hash(data, data)  # of clients that trained when no other kind was possible on the backbone
    assert hashed("minilm", "text-classification") == hashed("digits-vit", "image-classification") == as_before
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    (elsewhere / "a.jsonl").write_text("{}\n")
    assert hashed("minilm", "own:Kind", folder=elsewhere) == hashed("minilm", "own:Kind")


def test_a_kind_that_is_left_out_of_the_hash_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_portable", lambda kind, file: None)
    with pytest.raises(AssertionError):
        test_another_kind_asks_for_another_training(tmp_path)
