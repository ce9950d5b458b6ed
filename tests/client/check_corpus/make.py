"""Writes the corpus of broken tasks files beside itself: ``python tests/client/check_corpus/make.py``.

Every folder but ``data`` and ``model`` is one case: a ``tasks.toml``, the small files that it needs, and ``words.txt``,
whose every line must be in what ``share-client check`` says of it. Private rows hold the word of :data:`SECRET`, which
may not be said. ``model`` is a transformer of one tiny layer, so that texts can be tried in no time.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SECRET = "qzsecret"
IMAGES = 'backbone = "digits-vit"\n'
TEXTS = 'backbone = "../model"\n'
Files = Mapping[str, bytes]


def task(
    kind: str = "text", train: str = "../data/train.jsonl", test: str | None = "../data/test.jsonl", **more: Any
) -> str:
    """Return a ``[[task]]`` table; ``more`` are keys with their TOML values."""
    lines = ["[[task]]", 'name = "one"', f'kind = "{kind}-classification"', f'train = "{train}"']
    lines += [f'test = "{test}"'] * (test is not None) + [f"{key} = {value}" for key, value in more.items()]
    return "\n".join(lines) + "\n"


def image_task(train: str = "../data/train.npz", test: str | None = "../data/train.npz", **more: Any) -> str:
    return task("image", train, test, **more)


def jsonl(*rows: Mapping[str, object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def row(number: int, **more: object) -> dict[str, object]:
    return {"text": f"word{number} {SECRET}", "label": number % 2, **more}


GOOD = [row(number) for number in range(8)]
RENAMED = [{"sentence": one["text"], "gold": one["label"]} for one in GOOD]


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def pixels(*shape: int) -> Any:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def png(mode: str = "L", size: tuple[int, int] = (8, 8), kind: str = "png") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()


def parquet(rows: Sequence[Mapping[str, object]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), out)
    return out.getvalue()


CASES: dict[str, tuple[str | bytes, list[str], Files]] = {}


def case(name: str, toml: str | bytes, words: list[str], files: Files | None = None) -> None:
    """Add one case; ``words`` must all be said."""
    assert name not in CASES, name
    CASES[name] = (toml, words, files or {})


def bad_train(name: str, file: str, data: bytes, words: list[str], **more: Any) -> None:
    """Add a case whose training file is broken."""
    case(name, TEXTS + task(train=file, **more), [f"{name}/{file}", *words], {file: data})


def tasks_file_cases() -> None:
    case("no-toml", "backbone = \n", ["not valid TOML", "line 1"])
    case("latin-tasks-file", 'backbone = "caf\xe9"\n'.encode("latin-1"), ["cannot read the tasks file", "utf-8"])
    case("no-backbone", task(), ["key 'backbone' is missing", 'add backbone = "..."'])
    case("unknown-backbone", 'backbone = "resnet9"\n' + task(), ["backbone", "'resnet9'", "digits-vit", "not tried"])
    case("backbone-without-model", 'backbone = "."\n' + task(), ["config.json"])
    case("no-task", TEXTS, ["at least one [[task]]"])
    case("key-at-the-top", "epochs = 3\n" + TEXTS + task(), ["epochs", "in [defaults] for all; move it there"])
    case("misspelt-top-key", "devise = 'cpu'\n" + TEXTS + task(), ["unknown key 'devise'", "did you mean 'device'"])
    case("misspelt-key", TEXTS + task(epoch=3), ["task 'one'", "unknown key 'epoch'", "did you mean 'epochs'"])
    case(
        "misspelt-default", TEXTS + "[defaults]\nbatchsize = 3\n" + task(), ["[defaults]", "did you mean 'batch_size'"]
    )
    case("unknown-device", TEXTS + 'device = "gpu"\n' + task(), ["device", "auto, cpu, cuda", "'gpu'"])
    case("no-name", TEXTS + task().replace('name = "one"\n', ""), ["task number 1", "key 'name' is missing"])
    case("bad-name", TEXTS + task().replace('"one"', '"My Task"'), ["'My Task'", "name", "a-z 0-9"])
    case("same-name-twice", TEXTS + task() + task(), ["task 'one'", "a name used once, got it twice"])
    case("unknown-kind", TEXTS + task("sound"), ["kind", "text-classification", "'sound-classification'"])
    case("no-kind", TEXTS + task().replace('kind = "text-classification"\n', ""), ["key 'kind' is missing"])
    case("no-test", TEXTS + task(test=None), ["key 'test' is missing", "validation = 0.2"])
    case("test-and-validation", TEXTS + task(validation=0.2), ["either test or validation, got both"])
    case("validation-too-large", TEXTS + task(test=None, validation=1.5), ["validation", "from 0.01 to 0.9", "1.5"])


def value_cases() -> None:
    case("no-epochs", TEXTS + task(epochs=0), ["epochs", "integer from 1", "0 (int)"])
    case("batch-size-in-quotes", TEXTS + task(batch_size='"32"'), ["batch_size", "integer", "'32' (str)"])
    case("learning-rate-nan", TEXTS + task(learning_rate="nan"), ["learning_rate", "number above 0 to 1", "nan"])
    case("share-head-a-number", TEXTS + task(share_head=1), ["share_head", "true or false", "1 (int)"])
    organisations = ["share_with", 'expected "everybody" or a list of organisations']
    case("share-with-a-name", TEXTS + task(share_with='"lab"'), [*organisations, "'lab' (str)"])
    case("share-with-nobody", TEXTS + task(share_with="[]"), [*organisations, "[] (list)", "leave it out"])
    case("share-with-everybody-in-a-list", TEXTS + task(share_with='["everybody", "lab"]'), organisations)
    case(
        "share-with-no-name",
        TEXTS + task(share_with='["lab", "Lab & Co"]'),
        ["share_with", "'Lab & Co' is not allowed"],
    )
    case("share-with-a-number", TEXTS + task(share_with='["lab", 1]'), ["share_with", "non-empty string", "1 (int)"])
    case("owner-a-list", TEXTS + task(owner='["acme"]'), ["owner", "non-empty string", "['acme'] (list)"])
    case("owner-a-task-id", TEXTS + task(owner='"acme/one"'), ["owner", "'acme/one' is not allowed"])
    case(
        "owner-and-share-with",
        TEXTS + task(owner='"acme"', share_with='["lab"]'),
        ["either owner or share_with", "got both"],
    )
    case("columns-a-string", TEXTS + task(columns='"text"'), ["columns", "expected a table", "(str)"])
    case("column-a-number", TEXTS + task(columns="{ text = 1 }"), ["columns: text", "non-empty string", "1 (int)"])
    case("options-a-list", TEXTS + task(options="[1]"), ["options", "expected a table", "(list)"])
    case("unknown-option", IMAGES + image_task(options="{ resise = true }"), ["options", "did you mean 'resize'"])
    case(
        "option-not-for-text",
        TEXTS + task(options="{ resize = true }"),
        ["options", "unknown key 'resize'", "none here"],
    )
    case(
        "missing-file",
        TEXTS + task(train="../data/trian.jsonl"),
        ["train", "does not exist", "did you mean 'train.jsonl'"],
    )
    case(
        "missing-folder", TEXTS + task(test="tests/test.jsonl"), ["test", "does not exist", "relative to the directory"]
    )
    case("text-on-an-image-backbone", IMAGES + task(), ["task 'one'", "kind", "image-classification", "digits-vit"])
    case("image-on-a-text-backbone", TEXTS + image_task(), ["task 'one'", "kind", "text-classification"])


def privacy_cases() -> None:
    privacy = "[privacy]\n"
    case("privacy-without-a-number", TEXTS + privacy + task(), ["privacy", "epsilon or noise_multiplier, got neither"])
    case(
        "privacy-mechanism-unknown",
        TEXTS + privacy + 'mechanism = "laplace"\nepsilon = 1\n' + task(),
        ["privacy: mechanism", "dp-sgd, coefficients", "'laplace'"],
    )
    case(
        "shared-head-beside-noisy-coefficients",
        TEXTS + privacy + 'mechanism = "coefficients"\nepsilon = 1\n' + task(share_head="true", directions=2),
        ["share_head: expected false", "directions: expected 0"],
    )
    case(
        "privacy-delta",
        TEXTS + privacy + "epsilon = 1\ndelta = 0.5\n" + task(),
        ["privacy: delta", "to 0.1", "0.5 (float)"],
    )
    case(
        "many-problems",
        TEXTS
        + 'devise = "cpu"\n'
        + task(epochs=-1, share_head='"no"')
        + task(train="b.csv").replace('"one"', '"two"')
        + image_task().replace('"one"', '"three"'),
        ["'devise'", "epochs", "share_head", "many-problems/b.csv: line 3", "task 'three': kind", "5 problems"],
        {"b.csv": b"text,label\na,1\nb\n"},
    )


def column_cases() -> None:
    bad_train(
        "wrong-column", "a.jsonl", jsonl(*RENAMED), ["line 1", "'text' is missing", "gold, sentence", "columns = {"]
    )
    bad_train(
        "misspelt-column",
        "a.jsonl",
        jsonl(*RENAMED),
        ["'sentense'", "did you mean 'sentence'"],
        columns='{ text = "sentense", label = "gold" }',
    )
    case(
        "unknown-field",
        TEXTS + task(columns='{ labels = "gold" }'),
        ["columns: unknown field 'labels'", "label, text, text_b", "did you mean 'label'"],
    )


def json_cases() -> None:
    bad_train("no-json", "a.jsonl", jsonl(*GOOD) + f"{SECRET}\n".encode(), ["line 9", "one JSON object"])
    bad_train("json-list", "a.jsonl", json.dumps(GOOD).encode(), ["line 1", "a JSON object, got list", "for each line"])
    bad_train(
        "label-true", "a.jsonl", jsonl(row(0), row(1, label=True)), ["line 2: label", "integer or a string, got bool"]
    )
    bad_train("label-missing", "a.jsonl", jsonl(row(0), {"text": SECRET}), ["line 2", "'label' is missing", "got text"])
    bad_train(
        "label-null",
        "a.jsonl",
        jsonl(row(0), row(1, label=None)),
        ["line 2: label", "got nothing", "leave the row out"],
    )
    bad_train("label-nan", "a.jsonl", jsonl(row(0), row(1, label=float("nan"))), ["line 2: label", "got float"])
    scores = TEXTS + task(train="a.jsonl").replace("classification", "regression")
    case("score-too-large", scores, ["line 1: score", "one too large"], {"a.jsonl": jsonl(row(0, score=10**400))})
    bad_train(
        "labels-mixed",
        "a.jsonl",
        jsonl(row(0), row(1, label=SECRET)),
        ["line 2: label", "int as in the first row, got str"],
    )
    bad_train(
        "label-empty",
        "a.jsonl",
        jsonl(row(0, label="a"), row(1, label="")),
        ["label", "got an empty one", "fill it in"],
        test="a.jsonl",
    )


def text_cases() -> None:
    bad_train("text-a-number", "a.jsonl", jsonl(row(0), row(1, text=7)), ["line 2: text", "a string, got int"])
    bad_train(
        "text-half-character", "a.jsonl", jsonl(row(0, text="\ud800")), ["line 1: text", "half of a surrogate pair"]
    )
    bad_train(
        "pair-in-some-rows",
        "a.jsonl",
        jsonl(row(0), row(1, text_b=SECRET)),
        ["line 2: text_b", "in all rows or in none"],
    )
    bad_train(
        "pair-in-train-only",
        "a.jsonl",
        jsonl(*[{**one, "text_b": SECRET} for one in GOOD]),
        ["text_b", "got it in one"],
    )
    bad_train("empty-file", "a.jsonl", b"", ["at least one row, got an empty file"])
    bad_train("one-class", "a.jsonl", jsonl(row(0), row(2)), ["at least two classes, got one"], test="a.jsonl")
    for name, rows, words in (
        (
            "class-without-training-rows",
            [row(0), row(1, label=5)],
            ["test.jsonl: line 2", "cannot be learned", "4 test row(s)"],
        ),
        (
            "labels-of-another-type",
            [row(0, label="a"), row(1, label="b")],
            ["test.jsonl: line 1: label", "str as in a.jsonl, got int"],
        ),
    ):
        case(name, TEXTS + task(train="a.jsonl"), words, {"a.jsonl": jsonl(*rows)})
    bad_train("cut-off-gzip", "a.jsonl.gz", gzip.compress(jsonl(*GOOD), mtime=0)[:-9], ["cannot read text"])
    bad_train(
        "too-few-to-hold-out",
        "a.jsonl",
        jsonl(row(0)),
        ["validation", "rows on both sides", "add rows"],
        test=None,
        validation=0.2,
    )
    bad_train("a-spreadsheet", "a.xlsx", b"PK", ["ends with .jsonl", "'.xlsx'", "docs/data.md"])


def word_cases() -> None:
    def words(**more: object) -> dict[str, object]:
        return {"words": ["word1", SECRET], "tags": ["O", "B-X"], **more}

    for name, rows, said, keys in (
        ("tags-too-few", [words(), words(tags=["O"])], ["line 2: tags", "got 1 for 2", "take it out"], {}),
        ("tags-numbers", [words(tags=[0, 1])], ["line 1: tags", "a list of strings", "got int; write strings"], {}),
        ("words-none", [words(words=[], tags=[])], ["line 1: tags", "at least one word"], {}),
        ("words-not-cut", [words(words=SECRET)], ["line 1: words", "a list, got str; write it as JSON"], {}),
        ("words-deep", [words(words=json.loads("[" * 600 + "]" * 600))], ["line 1: words", "strings", "got list"], {}),
        ("word-of-nothing", [words(words=["word1", " "])], ["number 2, which the tokenizer", "drops or joins"], {}),
        ("word-half-character", [words(words=["\ud800", SECRET])], ["line 1: words", "half of a surrogate pair"], {}),
        ("one-tag", [words(tags=["O", "O"])], ["tags", "at least two different ones, got one"], {}),
        (
            "row-too-long",
            [words(words=["word1"] * 9, tags=["O"] * 9)],
            ["max_length = 8 tokens, got 9"],
            {"max_length": 8},
        ),
    ):
        # A good row is put behind, so that nothing but what is meant is wrong.
        whole = rows if name == "one-tag" else [*rows, words()]
        data = jsonl(*whole)
        case(name, TEXTS + task("token", "a.jsonl", "a.jsonl", **keys), [f"{name}/a.jsonl", *said], {"a.jsonl": data})
    case(
        "row-beyond-the-positions",
        TEXTS + task("token", "a.jsonl", "a.jsonl", max_length=99),
        ["task 'one'", "at most 64 tokens", "got one of 65", "max_length = 64 or less"],
        {"a.jsonl": jsonl(words(words=["word1"] * 65, tags=["O", "B-X"] + ["O"] * 63))},
    )
    case(
        "tag-without-training-rows",
        TEXTS + task("token", "a.jsonl", "b.jsonl"),
        ["b.jsonl: line 1: tags", "cannot be learned", "add training rows"],
        {"a.jsonl": jsonl(words()), "b.jsonl": jsonl(words(tags=["O", SECRET]))},
    )


def csv_cases() -> None:
    lines = [b"text,label", *(f"{one['text']},{one['label']}".encode() for one in GOOD)]
    table = b"\n".join(lines) + b"\n"
    bad_train("utf-16", "a.csv", table.decode().encode("utf-16"), ["line 1", "UTF-16", "iconv -f UTF-16"])
    bad_train(
        "latin-1", "a.csv", table + "caf\xe9,1\n".encode("latin-1"), ["line 10", "Latin-1", "iconv -f WINDOWS-1252"]
    )
    bad_train(
        "csv-cells",
        "a.csv",
        table + f"{SECRET},with,commas\n".encode(),
        ["line 10", "2 cells as in the header, got 3", "quotes"],
    )
    bad_train("csv-semicolons", "a.csv", table.replace(b",", b";"), ["line 1", "commas", "semicolons"])
    bad_train(
        "csv-no-header",
        "a.csv",
        b"\n".join(lines[1:]) + b"\n",
        ["line 2", "'text' is missing", "no well-known name", "columns = {"],
    )
    bad_train("csv-open-quote", "a.csv", table + b'"open,1\n', ["line 10", "comma-separated", "quotes"])
    bad_train("csv-label-empty", "a.csv", table + b"a,\n", ["line 10: label", "got nothing"])
    bad_train("csv-same-column-twice", "a.csv", b"text,label,text\na,1,b\n", ["line 1", "a name twice"])


def arrow_cases() -> None:
    bad_train("no-parquet", "a.parquet", b"PAR1 but no more", ["cannot read Parquet"])
    bad_train(
        "parquet-gaps",
        "a.parquet",
        parquet([row(0, label=0.0), row(1, label=1.0)]),
        ["row 0: label", "got float", "gaps"],
    )
    bad_train("parquet-null", "a.parquet", parquet([row(0), row(1, label=None)]), ["row 1: label", "got nothing"])
    bad_train("parquet-column", "a.parquet", parquet(RENAMED), ["row 0", "column 'text' is missing", "gold, sentence"])
    case(
        "a-folder-of-texts",
        TEXTS + task(train="../data"),
        ["a table in one file", "got a directory without state.json"],
    )
    case(
        "all-splits-of-a-data-set",
        TEXTS + task(train="set"),
        ["one split of a datasets directory", 'train = "set/train"'],
        {"set/dataset_dict.json": b'{"splits": ["train"]}', "set/train/state.json": b"{}"},
    )


def image_cases() -> None:
    labels = np.arange(8) % 2

    def broken(name: str, words: list[str], **arrays: Any) -> None:
        case(name, IMAGES + image_task("a.npz", "a.npz"), [f"{name}/a.npz", *words], {"a.npz": npz(**arrays)})

    broken("no-labels", ["arrays x and y, got x"], x=pixels(8, 8, 8))
    broken("image-rows-flat", ["x: expected shape (n, h, w)"], x=pixels(8, 64), y=labels)
    broken("labels-too-few", ["y: expected shape (8,), one label for each"], x=pixels(8, 8, 8), y=labels[:5])
    broken("labels-floats", ["integer labels, got dtype float64"], x=pixels(8, 8, 8), y=labels * 1.0)
    holed = pixels(8, 8, 8)
    holed[3, 4, 4] = np.nan
    broken("pixel-nan", ["row 3", "NaN or infinity"], x=holed, y=labels)
    broken("pixels-huge", ["finite gradients", "extreme numbers"], x=pixels(8, 8, 8) * 1e38, y=labels)
    broken(
        "images-too-large", ["8 x 8 with 1 channel(s)", "got 28 x 28", "resize = true"], x=pixels(8, 28, 28), y=labels
    )
    broken("images-coloured", ["got 8 x 8 with 3", "convert = true"], x=pixels(8, 8, 8, 3), y=labels)
    case(
        "columns-of-an-archive",
        IMAGES + image_task(columns='{ x = "pixels" }'),
        ["columns: expected none for an .npz archive", "take the key out"],
    )
    torn = npz(x=pixels(8, 8, 8), y=labels)
    torn = torn[:100] + b"\xff" * 100 + torn[200:]
    case("archive-torn", IMAGES + image_task("a.npz"), ["cannot read images", "save the archive anew"], {"a.npz": torn})
    case("no-archive", IMAGES + image_task("a.npz"), ["cannot read images"], {"a.npz": b"no zip"})


def folder_cases() -> None:
    def folder(name: str, words: list[str], files: Files) -> None:
        two = {f"images/{label}/{i}.png": png() for label in ("a", "b") for i in range(2)}
        case(name, IMAGES + image_task("images", "images"), words, {**two, **files})

    folder(
        "image-outside-a-class",
        ["images/x.png", "one folder for each class", "put it into that of its class"],
        {"images/x.png": png()},
    )
    folder(
        "empty-class", ["images/empty", "got an empty folder", "fill it or take it out"], {"images/empty/.gitkeep": b""}
    )
    folder("other-file-in-a-class", ["a/notes.txt", "expected an image (.png", "'.txt'"], {"images/a/notes.txt": b"x"})
    folder("image-cut-off", ["a/1.png", "cut off"], {"images/a/1.png": png()[:45]})
    folder("image-that-is-none", ["a/1.png", "a file that is none"], {"images/a/1.png": b"hello"})
    folder("image-of-another-size", ["b/0.png", "got 9 x 8", "resize = true"], {"images/b/0.png": png(size=(8, 9))})
    folder("image-in-colour", ["b/0.png", "mode L", "mode RGB", "convert = true"], {"images/b/0.png": png("RGB")})
    case(
        "train-archive-test-folder",
        IMAGES + image_task(test="images"),
        ["test: expected an .npz archive as in train"],
        {"images/a/0.png": png()},
    )
    listed = f"image,label\n0.png,a\n{SECRET}.png,b\n".encode()
    case(
        "list-names-no-file",
        IMAGES + image_task("list.csv", "list.csv"),
        ["list.csv: line 3: image", "does not exist there"],
        {"list.csv": listed, "0.png": png()},
    )
    base64 = {"a.jsonl": jsonl({"image": SECRET * 40, "label": 0})}  # what is longer than a name can be
    case("list-of-base64", IMAGES + image_task("a.jsonl", "a.jsonl"), ["line 1: image", "base64 is not read"], base64)
    case(
        "list-without-images",
        IMAGES + image_task("list.csv", "list.csv"),
        ["list.csv: line 2", "'image' is missing", "file"],
        {"list.csv": b"file,label\n0.png,a\n"},
    )


def write_shared() -> None:
    """Write the good files that cases share, and the model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    data = HERE / "data"
    data.mkdir(exist_ok=True)
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_bytes(jsonl(*GOOD))
    (data / "train.npz").write_bytes(npz(x=pixels(8, 8, 8), y=np.arange(8) % 2))
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=16, max_position_embeddings=64, **shape)).save_pretrained(HERE / "model")
    names = ["[UNK]", "[PAD]", *(f"word{number}" for number in range(8))]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(HERE / "model")


def main() -> None:
    """Write everything anew."""
    makers: list[Callable[[], None]] = [
        tasks_file_cases,
        value_cases,
        privacy_cases,
        column_cases,
        json_cases,
        text_cases,
        word_cases,
        csv_cases,
        arrow_cases,
        image_cases,
        folder_cases,
    ]
    for make in makers:
        make()
    for folder in HERE.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    write_shared()
    for name, (toml, words, files) in CASES.items():
        everything = {
            "tasks.toml": toml if isinstance(toml, bytes) else toml.encode(),
            "words.txt": "\n".join(words).encode() + b"\n",
            **files,
        }
        for file, content in everything.items():
            path = HERE / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    main()
