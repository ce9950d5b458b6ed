"""Canaries in a client's data: what it trains on is found nowhere but in its own files.

A real client trains a real, tiny transformer on marked rows and sends what it learns to a real hub. Then everything
that left the client (every message and its metadata, before TLS), the whole directory of the server with its log,
and what the client logs and raises is searched for the marks, in every form in which a program might write them down.
Names (of files, folders, keys of the tasks file, variables) may stand in the client's own logs and nowhere else; what
rows hold must not even stand there. Each kind of leak is planted once, to show that it would be found.
"""

from __future__ import annotations

import base64
import importlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from share_client import session as session_module
from share_client.data import Field
from share_client.data import table as table_module
from share_client.kinds.classification import Classification
from share_client.member import ClientLayout
from share_client.session import SessionOptions, run_session
from share_client.training import load_backbone
from share_core import lifeline
from share_core.errors import ConfigError, FedshareError
from share_core.fingerprint import describe_space
from share_core.lease import LEASE_RECORD, MESSAGE_ACTION, REPORT_RECORD, LeaseReport
from share_core.types import SpaceSpec, Update
from share_core.wire import encode_update

OPTIONS = SessionOptions(linger_s=0.3, poll_s=0.02, lock_s=0.5)

ROWS = {"text": "qzcanarytext", "label": "qzcanarylabel", "bad row": "qzcanarybad"}
"""What rows hold."""
NAMES = {
    "folder": "qzcanaryfolder",
    "file": "qzcanaryfile",
    "tasks file": "qzcanarytasks",
    "comment": "qzcanarycomment",
    "variable": "qzcanaryvariable",
}
"""What they are called."""

SENTENCE = f"the {ROWS['text']} lives at elm street seven with two dogs"
WORDS = [f"word{number}" for number in range(4000)]


def _forms(text: str) -> dict[str, bytes]:
    """Return how a string may be written down; of base64 the part that does not depend on what stands around it."""
    raw = text.encode()
    forms = {"plain": raw, "upper": raw.upper()}
    forms |= {coding: text.encode(coding) for coding in ("utf-16-le", "utf-16-be")}
    forms["hex"], forms["HEX"] = raw.hex().encode(), raw.hex().upper().encode()
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + raw)[4 * bool(before) : -4]
        forms[f"base64+{before}"] = coded
        forms[f"base64url+{before}"] = coded.translate(bytes.maketrans(b"+/", b"-_"))
    return forms


def _number_forms(numbers: Sequence[int]) -> dict[str, bytes]:
    """Return how a row of token ids may be written down."""
    forms = {
        f"{kind}{order}": struct.pack(f"{order}{len(numbers)}{kind}", *numbers) for kind in "hiqfd" for order in "<>"
    }
    return forms | {f"text {between!r}": between.join(map(str, numbers)).encode() for between in (", ", ",", " ", "\n")}


@dataclass
class Marks:
    """What to look for."""

    rows: dict[str, dict[str, bytes]]
    names: dict[str, dict[str, bytes]]

    def found(self, places: Mapping[str, bytes], names: bool = True) -> set[tuple[str, str]]:
        """Return (mark, place) of everything that is found, row contents first, then names unless told otherwise."""
        marks = {**self.rows, **(self.names if names else {})}
        return {
            (mark, place)
            for place, data in places.items()
            for mark, forms in marks.items()
            if any(form in data for form in forms.values())
        }


class Recorder(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Keeps the plain bytes of everything that is sent: method, metadata and messages."""

    def __init__(self) -> None:
        self.sent: dict[str, bytes] = {}

    def _note(self, details: Any, message: Any) -> None:
        said = str((details.method, details.metadata)).encode() + message.SerializeToString()
        self.sent[f"wire {details.method} {len(self.sent)}"] = said

    def _noted(self, details: Any, messages: Iterator[Any]) -> Iterator[Any]:
        for message in messages:
            self._note(details, message)
            yield message

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self._note(details, request)
        return continuation(details, request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        self._note(details, request)
        return continuation(details, request)

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details, self._noted(details, requests))

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details, self._noted(details, requests))


@dataclass
class Life:
    """A client with marked data at a real hub."""

    hub: Any
    layout: ClientLayout
    tasks: Path
    marks: Marks
    recorder: Recorder
    raised: dict[str, bytes] = field(default_factory=dict)

    def work(self) -> None:
        """Run one session; what it raises is kept as text."""
        try:
            run_session(self.layout.root, self.tasks, options=OPTIONS)
        except FedshareError as error:
            self.raised[f"error {len(self.raised)}"] = repr((error, error.__cause__, error.args)).encode()

    def lease(self) -> bytes:
        """Work one lease as Flower's worker does; return the reply that it would send."""
        from flwr.app import ConfigRecord, Message, RecordDict

        app = importlib.import_module("share_client.fleet.client_app")
        record = {"lease_id": "ab" * 16, "node_id": "5", "space_id": self.hub.spec.space_id, "hub_address": ""}
        content = RecordDict({LEASE_RECORD: ConfigRecord({**record, "deadline_unix_ms": 2**50, "max_updates": 0})})
        message = Message(content, dst_node_id=5, message_type=f"train.{MESSAGE_ACTION}")
        return json.dumps(dict(app.work(message, None).content[REPORT_RECORD])).encode()

    def outside(self) -> dict[str, bytes]:
        """Return everything that may not hold a mark: what was sent, and every file of the server."""
        root = self.hub.layout.root
        files = {f"server {path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert any("journal.db" in name for name in files) and any("hub.log" in name for name in files)
        return {**self.recorder.sent, **files}

    def own(self) -> dict[str, bytes]:
        """Return what the client itself has logged and raised."""
        logs = {f"log {path.name}": path.read_bytes() for path in self.layout.logs.rglob("*") if path.is_file()}
        return {**logs, **self.raised}

    def write(self, *rows: Mapping[str, object], task: str = "plain", share_head: bool = False) -> None:
        """Write the data and the tasks file anew; files of a split hold the same rows."""
        folder = self.tasks.parent / NAMES["folder"]
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            (folder / f"{NAMES['file']}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = f"{NAMES['folder']}/{NAMES['file']}"
        self.tasks.write_text(
            f'# {NAMES["comment"]}\nbackbone = "model"\n[[task]]\nname = "{task}"\nkind = "text-classification"\n'
            f'train = "{data}-train.jsonl"\ntest = "{data}-test.jsonl"\nepochs = 1\n'
            f"share_head = {str(share_head).lower()}\n"
        )


GOOD = (
    {"text": SENTENCE, "label": ROWS["label"]},
    {"text": "word1 word2 word3", "label": "other"},
    {"text": SENTENCE + " word9", "label": ROWS["label"]},
)


def _make_model(folder: Path) -> list[int]:
    """Make a transformer of one small layer with a vocabulary of its own; return the ids of the marked sentence."""
    pytest.importorskip("transformers", reason="text backbones need transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=5000, max_position_embeddings=32, **shape)).save_pretrained(folder)  # type: ignore[arg-type]
    names = ["[UNK]", "[PAD]", *WORDS, *dict.fromkeys(SENTENCE.split())]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)  # type: ignore[no-untyped-call]
    return [names.index(word) for word in SENTENCE.split()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Marks, SpaceSpec]:
    """The backbone's folder, the marks, and the space of the backbone."""
    folder = tmp_path_factory.mktemp("model")
    ids = _make_model(folder)
    marks = Marks(
        {**{name: _forms(text) for name, text in ROWS.items()}, "token ids": _number_forms(ids[:6])},
        {name: _forms(text) for name, text in NAMES.items()},
    )
    return folder, marks, describe_space("tiny", load_backbone(str(folder), "cpu").site_weights())


@pytest.fixture
def life(
    model: tuple[Path, Marks, SpaceSpec], tmp_path: Path, own_hub_class: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Life]:
    """A client of a hub of its own, whose every message is recorded."""
    folder, marks, spec = model
    recorder, honest = Recorder(), grpc.secure_channel
    monkeypatch.setenv("FEDSHARE_CANARY", NAMES["variable"])
    hub = own_hub_class(tmp_path / "server", spec)
    hub.start()
    monkeypatch.setattr(
        grpc, "secure_channel", lambda *rest, **named: grpc.intercept_channel(honest(*rest, **named), recorder)
    )
    monkeypatch.setattr(lifeline, "arm", lambda: None)  # this process is not Flower's worker, but plays it
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 5)
    layout = hub.client(tmp_path / "client", "org/one")
    tasks = tmp_path / NAMES["tasks file"] / "tasks.toml"
    tasks.parent.mkdir()
    (tasks.parent / "model").symlink_to(folder)
    monkeypatch.setenv("FEDSHARE_CLIENT_DIR", str(layout.root))
    monkeypatch.setenv("FEDSHARE_TASKS", str(tasks))
    monkeypatch.setenv("FEDSHARE_LINGER_S", "0.3")
    yield Life(hub, layout, tasks, marks, recorder)
    hub.stop()


def test_nothing_of_the_data_leaves_the_client(life: Life) -> None:
    life.write(*GOOD)
    life.work()
    log = life.layout.session_log.read_text()
    assert '"event": "merged"' in log and '"event": "evaluation"' in log and life.raised == {}
    assert any(b"org/plain" in said for name, said in life.recorder.sent.items() if "Submit" in name)
    assert any(b"accuracy" in said for name, said in life.recorder.sent.items() if "ReportEvaluation" in name)
    assert life.marks.found(life.outside()) == set()
    assert life.marks.found(life.own()) == set()


BAD: dict[str, tuple[Mapping[str, object], ...]] = {
    "another kind of label": (*GOOD, {"text": "word1", "label": 3}),
    "a label that is none": (*GOOD, {"text": "word1", "label": [ROWS["bad row"]]}),
    "a text that is none": (*GOOD, {"text": [ROWS["bad row"]], "label": "other"}),
    "a key that is missing": (*GOOD, {ROWS["bad row"]: "word1", "label": "other"}),
    "one class": ({"text": "word1", "label": ROWS["bad row"]},),
}


def test_errors_name_the_place_and_not_the_data(life: Life) -> None:
    replies = {}
    for what, rows in BAD.items():
        life.write(*rows)
        life.work()
        replies[f"reply to {what}"] = life.lease()
    life.write(*GOOD)
    data = next(life.tasks.parent.rglob("*-train.jsonl"))
    data.write_text(f'{{"text": "{ROWS["bad row"]}\n')  # no JSON
    life.work()
    replies["reply to no JSON"] = life.lease()
    data.unlink()
    life.work()
    replies["reply to no file"] = life.lease()
    assert len(life.raised) == len(replies) == len(BAD) + 2
    assert all(b"ConfigError: the client's own logs say why" in reply for reply in replies.values())
    assert life.marks.found({**life.outside(), **replies}) == set()
    assert life.marks.found(life.own(), names=False) == set()
    assert life.marks.found(life.own()) != set()  # the place, in words that help


def test_what_a_library_raises_stays_here(
    life: Life, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def trip(*_: object, **__: object) -> None:
        raise ValueError(f"could not train on {SENTENCE!r} of {life.tasks}")

    monkeypatch.setattr("share_client.training.train_in_space", trip)
    life.write(*GOOD)
    reply = life.lease()
    told = capfd.readouterr()
    log = life.layout.session_log.read_text()
    assert "ValueError at test_canary.py, line " in log  # where it happened, for whoever looks into it
    assert ", in trip" in log
    assert life.marks.found({**life.outside(), "reply": reply}) == set()
    assert life.marks.found({**life.own(), "output": (told.out + told.err).encode()}, names=False) == set()


def _says_value(value: object, field: Field, where: str, before: Sequence[object]) -> Any:
    raise ConfigError(f"{where}: expected better data, got {value!r}")


def _head_of_ids(update: Update) -> bytes:
    ids = torch.arange(4002, 4012).float()  # the ids of the marked sentence
    return encode_update(replace(update, head={"weight": ids}))


def _leak(leak: str, life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write marked data, and plant a program that gives some of it away."""
    life.write(*GOOD, task=ROWS["text"] if leak == "task name" else "plain", share_head=leak == "head")
    if leak == "metric":
        monkeypatch.setattr(Classification, "metric", ROWS["label"])
    elif leak == "exception":
        monkeypatch.setattr(table_module, "_checked", _says_value)
    elif leak == "head":
        monkeypatch.setattr(session_module, "encode_update", _head_of_ids)


LEAKS = {
    "task name": ("text", "server store/journal.db-wal"),
    "metric": ("label", "wire /share_proto.v1.Hub/ReportEvaluation"),
    "exception": ("text", "log session.jsonl"),
    "head": ("token ids", "server store/blobs"),
}
"""Which mark is found where."""


@pytest.mark.parametrize("leak", LEAKS)
def test_planted_leaks_are_found(leak: str, life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, place = LEAKS[leak]
    _leak(leak, life, monkeypatch)
    life.work()
    found = life.marks.found({**life.outside(), **life.own()})
    assert any(one == mark and where.startswith(place) for one, where in found), found


def test_a_reply_that_tells_the_error_is_found(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: the reply says what went wrong, and so names the file."""
    life.write(*GOOD)
    next(life.tasks.parent.rglob("*-train.jsonl")).unlink()
    assert life.marks.found({"reply": life.lease()}) == set()
    told = lambda lease, error: LeaseReport(lease.lease_id, 0, True, str(error))  # noqa: E731
    monkeypatch.setattr("share_client.fleet.client_app._failed", told)
    assert life.marks.found({"reply": life.lease()}) >= {("file", "reply"), ("folder", "reply")}


def test_every_form_of_a_mark_is_found() -> None:
    marks = Marks({"text": _forms(ROWS["text"]), "ids": _number_forms([4001, 4002, 4003, 4004, 4005, 4006])}, {})
    text, ids = ROWS["text"].encode(), [4001, 4002, 4003, 4004, 4005, 4006]
    written = [
        b"a" + text + b"b",
        (text.decode() + "!").encode("utf-16"),
        base64.b64encode(b"1" + text + b"2"),
        base64.b64encode(b"12" + text),
        base64.urlsafe_b64encode(text + b"123"),
        b"1" + text.hex().encode(),
        *(torch.tensor([7, *ids, 7], dtype=kind).numpy().tobytes() for kind in (torch.int16, torch.int32, torch.int64)),
        torch.tensor(ids, dtype=torch.float32).numpy().tobytes(),
        json.dumps(ids).encode(),
    ]
    for data in written:
        assert marks.found({"here": data}), data
    assert marks.found({"here": b"nothing" * 99}) == set()
