"""Existing adapters into a real hub: what leaves, what stays, what is refused, and that nothing is sent twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import share_client.contribute
from share_client.cli import app
from share_client.contribute import Outcome, contribute, outcome_text, read_contributions
from share_client.egress_check import look
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_client.records import Records
from share_client.session import SessionOptions, run_session
from share_client.session_lock import only_session
from share_core.errors import (
    AccessError,
    AdapterError,
    ConfigError,
    FedshareError,
    SignatureError,
    SpaceMismatchError,
    UnavailableError,
    UnsupportedAdapterError,
)
from share_core.identity import approve_adapter
from share_core.linalg import difference_norm, product_norm
from share_core.peft.reader import read_adapter
from share_core.space import task_adapter
from share_core.types import Adapter
from share_core.wire import decode_snapshot
from share_proto.v1 import hub_pb2

RUNNER = CliRunner()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Member = tuple[ClientLayout, HubLink, str]


def send(member: Member, *directories: Path, backbone: Path | None = None, **options: Any) -> list[Outcome]:
    wanted = read_contributions(directories, options.pop("task", None), options.pop("share_head", False))
    given = None if backbone is None else str(backbone)
    return contribute(member[0], member[1], wanted, backbone=given, **options)


def updates_of(link: HubLink) -> list[Any]:
    """Return the hub's records of the member's organisation."""
    return list(link.list_updates(0, 100).updates)


def distance(a: Adapter, b: Adapter) -> float:
    """Return the largest relative difference over the sites of ``a``."""
    return max(
        float(difference_norm(a[site].out, a[site].in_, b[site].out, b[site].in_))
        / float(product_norm(a[site].out, a[site].in_))
        for site in a
    )


def stored(link: HubLink, task_id: str) -> Adapter:
    spec = link.describe().spec
    return task_adapter(decode_snapshot(link.fetch_snapshot(spec.space_id)[1], spec), task_id)


def test_an_adapter_is_merged_as_it_is_and_once(member: Member, save_adapter: Any, bert_directory: Path) -> None:
    layout, link, organisation = member
    directory = save_adapter("Film Reviews")
    (sent,) = send(member, directory, backbone=bert_directory, wait=True)
    assert (sent.state, sent.task_id, sent.head, sent.new) == ("merged", f"{organisation}/film-reviews", "none", True)
    assert sent.version >= 1
    assert sent.relative_error < 1e-5
    assert distance(read_adapter(directory).factors, stored(link, sent.task_id)) < 1e-5
    (again,) = send(member, directory, backbone=bert_directory, wait=True)
    assert again == replace(sent, new=False)
    (update,) = updates_of(link)
    assert update.update_id == sent.update_id
    assert update.signer, "it is signed like everything that leaves"
    assert list(layout.outbox.glob("*")) == [layout.outbox / "refused"]
    found = look(layout, None, link)
    assert (found.problems, found.updates) == ([], 1)


def test_another_adapter_for_the_task_replaces_it_and_the_first_may_come_back(
    member: Member, save_adapter: Any, bert_directory: Path
) -> None:
    first, second = save_adapter("first", 1), save_adapter("second", 2)
    for directory in (first, second, first):
        (sent,) = send(member, directory, task="one", backbone=bert_directory, wait=True)
        assert (sent.state, sent.new) == ("merged", True)
        assert distance(read_adapter(directory).factors, stored(member[1], sent.task_id)) < 1e-4
    assert len(updates_of(member[1])) == 3


def test_several_at_once_are_named_by_their_directories(
    member: Member, save_adapter: Any, bert_directory: Path
) -> None:
    layout, link, organisation = member
    directories = [save_adapter(name, seed) for seed, name in enumerate(("a", "b", "c"))]
    arguments = ["contribute", *map(str, directories), "--dir", str(layout.root), "--backbone", str(bert_directory)]
    answer = RUNNER.invoke(app, [*arguments, "--wait", "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)["adapters"]
    assert [one["task_id"] for one in found] == [f"{organisation}/{name}" for name in "abc"]
    assert all(one["state"] == "merged" and one["version"] for one in found)
    text = RUNNER.invoke(app, arguments)
    assert text.exit_code == 0
    assert text.stdout.count("nothing was sent twice") == 3
    assert len(updates_of(link)) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_a_head_leaves_only_by_choice(shared: bool, member: Member, save_adapter: Any, bert_directory: Path) -> None:
    layout, link, _ = member
    directory = save_adapter("films", head=True)
    (sent,) = send(member, directory, backbone=bert_directory, wait=True, share_head=shared)
    assert (sent.state, sent.head) == ("merged", "shared" if shared else "private")
    (update,) = updates_of(link)
    own = load_file(directory / "adapter_model.safetensors")
    head = {key: tensor for key, tensor in own.items() if "lora_" not in key}
    assert update.bytes.heads == (sum(4 * tensor.numel() for tensor in head.values()) if shared else 0)
    record = Records(layout.tasks).get("films")
    kept = Records(layout.tasks).read_head("films", record.heads[-1])
    assert set(kept) == set(head)
    assert all(torch.equal(kept[key], head[key]) for key in head)


def test_the_check_of_what_leaves_would_catch_a_head(
    member: Member, save_adapter: Any, bert_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the head goes along without having been asked for."""
    real = share_client.contribute._read
    monkeypatch.setattr(share_client.contribute, "_read", lambda directory, task, share: real(directory, task, True))
    send(member, save_adapter("films", head=True), backbone=bert_directory, wait=True)
    assert updates_of(member[1])[0].bytes.heads > 0


def test_without_a_backbone_the_operator_vouches(member: Member, save_adapter: Any, bert_hub: Any) -> None:
    layout, link, _ = member
    directory, other = save_adapter("films"), save_adapter("other", 2)
    (wanted,) = read_contributions([directory])
    with pytest.raises(AccessError, match=f"share-server approve DIR {wanted.sha256}"):
        send(member, directory)
    key, spec = bert_hub.layout.signing_key.read_bytes(), link.describe().spec
    approval = approve_adapter(key, spec.space_id, wanted.sha256)
    elsewhere = approve_adapter(key, "sha256:" + "0" * 64, wanted.sha256)
    for path, text in ((other, approval), (directory, elsewhere), (directory, "fa1.AAAA"), (directory, "")):
        with pytest.raises(SignatureError, match="not the operator's"):
            send(member, path, approval=text)
    assert updates_of(link) == []
    arguments = ["contribute", str(directory), "--dir", str(layout.root), "--approval", approval, "--wait"]
    answer = RUNNER.invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    assert "merged in version" in answer.stdout


def test_the_operator_approves_by_command(bert_hub: Any, member: Member, save_adapter: Any) -> None:
    from share_server.cli import app as server

    (wanted,) = read_contributions([save_adapter("films")])
    answer = RUNNER.invoke(server, ["approve", str(bert_hub.layout.root), wanted.sha256])
    assert answer.exit_code == 0, answer.output
    (sent,) = contribute(member[0], member[1], [wanted], approval=answer.stdout.strip(), wait=True)
    assert sent.state == "merged"
    refused = RUNNER.invoke(server, ["approve", str(bert_hub.layout.root), "films"])
    assert (refused.exit_code, "64 hexadecimal digits" in refused.stderr) == (1, True)


def test_another_backbone_is_refused_by_its_fingerprints(
    member: Member, save_adapter: Any, load_bare: Any, tmp_path: Path
) -> None:
    other = load_bare()
    with torch.no_grad():
        other.encoder.layer[1].attention.self.value.weight[3, 4] += 0.1
    other.save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        SpaceMismatchError, match=r"layer.1.*value.*fingerprint [0-9a-f]{16}, this backbone [0-9a-f]{16}"
    ):
        send(member, save_adapter("films"), backbone=tmp_path / "tuned")
    assert updates_of(member[1]) == []


@pytest.fixture
def refused(member: Member, bert_directory: Path) -> Callable[[Path, type[Exception], str], None]:
    """Return a function (directory, error, words): contributing it raises that and leaves nothing behind."""

    def check(directory: Path, error: type[Exception], words: str, **options: Any) -> None:
        with pytest.raises(error, match=words):
            send(member, directory, backbone=bert_directory, **options)
        assert updates_of(member[1]) == []
        assert list(member[0].outbox.glob("[0-9a-f]*")) == []

    return check


def test_hostile_adapters_are_refused_before_anything_leaves(refused: Any, save_adapter: Any, tmp_path: Path) -> None:
    idle = save_adapter("idle")
    tensors = load_file(idle / "adapter_model.safetensors")
    zero = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}
    save_file(zero, idle / "adapter_model.safetensors")
    refused(idle, AdapterError, "all B are zero")

    pickled = save_adapter("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, UnsupportedAdapterError, "pickle")

    pointer = save_adapter("pointer")
    (pointer / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused(pointer, AdapterError, "git lfs pull")

    ada = save_adapter("ada")
    config = json.loads((ada / "adapter_config.json").read_text())
    (ada / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "ADALORA"}))
    refused(ada, UnsupportedAdapterError, "AdaLoRA")

    wrong = save_adapter("wrong")
    shapes = {key: torch.cat([value, value]) if "lora_B" in key else value for key, value in tensors.items()}
    save_file(shapes, wrong / "adapter_model.safetensors")
    refused(wrong, SpaceMismatchError, "has a weight of 16 x 16, the adapter was made for one of 32 x 16")

    refused(save_adapter("keys", target_modules=["key"]), SpaceMismatchError, "changes 2 modules that the space")
    refused(save_adapter("thick", r=9), AdapterError, "has rank 9, the space takes 8")
    refused(save_adapter("bare"), AdapterError, "no head to share", share_head=True)
    refused(tmp_path / "nowhere", AdapterError, "not a directory")


def test_the_corpus_of_damaged_files_is_refused(refused: Any, save_adapter: Any) -> None:
    """Every file of tests/attacks in the place of the tensors: an error of ours, and nothing leaves."""
    files = sorted((Path(__file__).parents[2] / "attacks" / "files").glob("*.safetensors"))
    directory = save_adapter("films")
    assert len(files) > 50
    for path in files[::5]:
        (directory / "adapter_model.safetensors").write_bytes(path.read_bytes())
        refused(directory, FedshareError, ".")


def test_two_of_one_name_and_one_name_for_two(save_adapter: Any, tmp_path: Path) -> None:
    first = save_adapter("films")
    copy = tmp_path / "elsewhere" / "films"
    copy.parent.mkdir()
    first.rename(copy)
    second = save_adapter("films")
    with pytest.raises(ConfigError, match="would both be task 'films'"):
        read_contributions([copy, second])
    with pytest.raises(ConfigError, match="--task names one task"):
        read_contributions([copy, second], "films")


def test_a_changed_scale_is_another_adapter(save_adapter: Any) -> None:
    """The same tensors mean something else under another lora_alpha."""
    directory = save_adapter("films")
    (before,) = read_contributions([directory])
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    (after,) = read_contributions([directory])
    assert before.content_hash != after.content_hash
    (once_more,) = read_contributions([directory])
    assert once_more.content_hash == after.content_hash


def test_who_never_trains_enrols_by_command(
    bert_hub: Any, save_adapter: Any, bert_directory: Path, tmp_path: Path
) -> None:
    directory = str(tmp_path / "giver")
    token = tmp_path / "giver.token"
    token.write_text(bert_hub.invite("giver/main"))
    answer = RUNNER.invoke(app, ["enrol", str(token), "--dir", directory])
    assert (answer.exit_code, answer.stderr) == (0, "enrolled as giver/main\n")
    given = ["contribute", str(save_adapter("films")), "--dir", directory, "--backbone", str(bert_directory), "--wait"]
    answer = RUNNER.invoke(app, given)
    assert answer.exit_code == 0, answer.output
    assert "giver/films: merged in version" in answer.stdout
    pulled = RUNNER.invoke(app, ["pull", "--task", "films", "--dir", directory, "--out", str(tmp_path / "out")])
    assert pulled.exit_code == 0, pulled.output


class _Killed(BaseException):
    """Ends a contribution like a kill: nothing of ours catches it."""


def test_the_next_session_finishes_what_was_put_in(
    member: Member, save_adapter: Any, bert_directory: Path, fake: Any
) -> None:
    layout, link, organisation = member

    def die(name: str) -> None:
        if name == "put done":
            raise _Killed

    with pytest.raises(_Killed):
        send(member, save_adapter("films"), backbone=bert_directory, step=die)
    assert updates_of(link) == []
    path = layout.root / "tasks.json"
    path.write_text("{}")
    counters = run_session(layout.root, path, trainer=fake.FakeTrainer(path), options=SessionOptions(linger_s=0.2))
    assert (counters.submitted, counters.merged) == (1, 1)
    (sent,) = send(member, layout.root.parent / "films", backbone=bert_directory, wait=True)
    assert (sent.state, sent.new, sent.task_id) == ("merged", False, f"{organisation}/films")
    assert len(updates_of(link)) == 1


def test_a_running_session_keeps_the_directory(
    member: Member, save_adapter: Any, bert_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share_client.contribute, "_LOCK_S", 0.1)
    with only_session(member[0], 0.1), pytest.raises(UnavailableError, match="another session works"):
        send(member, save_adapter("films"), backbone=bert_directory)
    assert updates_of(member[1]) == []


def test_a_refusal_is_told_and_may_be_tried_again(member: Member, save_adapter: Any, bert_directory: Path) -> None:
    """A refusal ends the wait with its reason, and the same command tries again: the person may have put it right."""
    _, _, organisation = member
    directory = save_adapter("films")

    def refuse(*arguments: Any) -> Any:
        raise AccessError("members may not submit to it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubLink, "submit_until_answered", refuse)
        (sent,) = send(member, directory, backbone=bert_directory, wait=True)
    assert (sent.state, sent.reason) == ("refused", "AccessError: members may not submit to it")
    assert "refused: AccessError: members may not submit to it" in outcome_text(sent)
    (sent,) = send(member, directory, backbone=bert_directory, wait=True)
    assert (sent.state, sent.task_id) == ("merged", f"{organisation}/films")


def test_an_update_that_the_operator_holds_ends_the_wait(
    member: Member, save_adapter: Any, bert_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = HubLink.get_update

    def held(link: HubLink, update_id: str) -> hub_pb2.UpdateRecord:
        record = real(link, update_id)
        record.state, record.reason = hub_pb2.UPDATE_STATE_QUARANTINED, "far from all others"
        return record

    directory = save_adapter("films")
    with monkeypatch.context() as patch:
        patch.setattr(HubLink, "get_update", held)
        (sent,) = send(member, directory, backbone=bert_directory, wait=True)
    assert sent.state == "set_aside"
    assert "run the same command again later" in outcome_text(sent)
    (later,) = send(member, directory, backbone=bert_directory, wait=True)
    assert (later.state, later.update_id, later.new) == ("merged", sent.update_id, False)
