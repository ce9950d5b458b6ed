"""Shared heads through a real hub: from PEFT adapters of two organisations into the PEFT library of a third member."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import share_client.contribute
from share_client.chain import ManifestChain, open_chain
from share_client.cli import app
from share_client.contribute import contribute, read_contributions
from share_client.heads import fetch_head
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials
from share_client.pull import HEAD_FILE, MARKER, PullOptions, pull, pulled_text
from share_core.errors import AccessError, DigestError, ManifestError
from share_core.peft.names import WRAPPER
from share_core.types import SiteUpdate, Update
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2
from share_server.local import submit_header, submit_messages

RUNNER = CliRunner()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Member = tuple[ClientLayout, HubLink, str]
SCHEMA = "5c" * 32


@pytest.fixture
def colleague(bert_hub: Any, member: Member, connect: Any, tmp_path: Path) -> tuple[ClientLayout, HubLink]:
    """Another machine of the member's organisation, which has contributed nothing."""
    layout = bert_hub.client(tmp_path / "colleague", f"{member[2]}/second")
    return layout, connect(layout)


@pytest.fixture
def put_in(member: Member, bert_directory: Path) -> Callable[..., int]:
    """Return a function that contributes an adapter of the member and returns the version that holds it."""

    def send(directory: Path, share_head: bool) -> int:
        wanted = read_contributions([directory], share_head=share_head)
        (sent,) = contribute(member[0], member[1], wanted, backbone=str(bert_directory), wait=True)
        assert sent.state == "merged"
        return sent.version

    return send


@pytest.fixture
def both(bert_hub: Any, member: Member, save_adapter: Any) -> tuple[str, str, dict[str, Tensor]]:
    """Let two organisations share a task; return its id, the other one, and the mean of their heads by hand."""
    _, link, ours = member
    theirs = f"zoo-{ours[:20].strip('-')}"
    task_id = f"{ours}/both"
    bases, found = [], []
    for seed, organisation in ((1, ours), (2, theirs)):
        base = link.describe().version if organisation == theirs else 0
        (read,) = read_contributions([save_adapter(f"from-{seed}", seed, head=True)], share_head=True)
        sites = {site: SiteUpdate(residual=factors) for site, factors in read.adapter.factors.items()}
        payload = encode_update(Update(base, sites, read.head))
        header = submit_header(bert_hub.spec, task_id, payload)
        header.schema_sha256 = SCHEMA
        header.sharing.organisations.append(theirs)
        with bert_hub.hub(bert_hub.enrol(f"{organisation}/sender")) as stub:
            sent = stub.Submit(submit_messages(header, payload), timeout=30.0).update_id
            record = stub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=sent)).update
            while record.state == hub_pb2.UPDATE_STATE_ACCEPTED:
                record = stub.GetUpdate(hub_pb2.GetUpdateRequest(update_id=sent)).update
        assert record.state == hub_pb2.UPDATE_STATE_MERGED
        bases.append(base)
        found.append(read.head)
    shares = [(record.version - base) ** -0.5 for base in bases]
    mean = {
        name: sum(share * one[name] for share, one in zip(shares, found, strict=True)) / sum(shares)
        for name in found[0]
    }
    return task_id, theirs, mean


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)


def inside(directory: Path) -> dict[str, Tensor]:
    """Return the head of a written adapter by name in the model."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return {key.removeprefix(WRAPPER): tensor for key, tensor in tensors.items() if "lora_" not in key}


def test_two_organisations_share_a_head_and_peft_loads_their_mean(
    both: tuple[str, str, dict[str, Tensor]],
    member: Member,
    save_adapter: Any,
    load_classifier: Any,
    tmp_path: Path,
) -> None:
    layout, link, ours = member
    task_id, theirs, mean = both
    like = save_adapter("like", 5, head=True)
    made = pull(layout, link, task_id, tmp_path / "out", PullOptions(like=like))
    assert (made.head, made.head_of, made.head_left_out) == ("shared", (ours, theirs), ())
    assert f"with the head shared by {ours}, {theirs} (classifier.bias, classifier.weight)" in pulled_text(made)
    assert equal(inside(tmp_path / "out"), mean)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "classifier" in config["modules_to_save"]
    loaded: Any = PeftModel.from_pretrained(load_classifier(), tmp_path / "out")
    used = loaded.base_model.model.classifier.modules_to_save["default"]
    assert torch.allclose(used.weight, mean["classifier.weight"], atol=1e-6)
    assert torch.allclose(used.bias, mean["classifier.bias"], atol=1e-6)
    bare = pull(layout, link, task_id, tmp_path / "bare", PullOptions(like=like, head=False))
    assert (bare.head, bare.head_of, inside(tmp_path / "bare")) == ("none", (), {})


def test_without_a_module_for_it_the_head_lies_beside_and_json_says_whose_it_is(
    both: tuple[str, str, dict[str, Tensor]], member: Member, tmp_path: Path
) -> None:
    task_id, theirs, mean = both
    arguments = ["pull", "--task", task_id, "--dir", str(member[0].root)]
    answer = RUNNER.invoke(app, [*arguments, "--out", str(tmp_path / "a"), "--json"])
    assert answer.exit_code == 0, answer.output
    made = json.loads(answer.stdout)
    assert (made["head"], made["head_of"]) == ("shared_beside", sorted([member[2], theirs]))
    assert json.loads((tmp_path / "a" / MARKER).read_text())["head_of"] == made["head_of"]
    assert equal(load_file(tmp_path / "a" / HEAD_FILE), mean)
    assert inside(tmp_path / "a") == {}
    human = RUNNER.invoke(app, [*arguments, "--out", str(tmp_path / "b")])
    assert f"the head shared by {member[2]}, {theirs} lies beside in {HEAD_FILE}" in human.stdout


def test_an_outsider_pulls_the_core_and_no_head(
    both: tuple[str, str, dict[str, Tensor]], bert_hub: Any, member: Member, connect: Any, tmp_path: Path
) -> None:
    outsider = bert_hub.client(tmp_path / "outsider", f"x{member[2][:20].strip('-')}/main")
    link = connect(outsider)
    made = pull(outsider, link, both[0], tmp_path / "out")
    assert (made.head, made.head_of) == ("none", ())
    assert not (tmp_path / "out" / HEAD_FILE).exists() and inside(tmp_path / "out") == {}
    with pytest.raises(AccessError):
        fetch_head(link, chain_of(outsider, link), both[0], made.version)


def chain_of(layout: ClientLayout, link: HubLink) -> ManifestChain:
    now = datetime.now(UTC)
    return open_chain(link.describe(), load_credentials(layout, now), None, now)


def leaves(put_in: Any, source: Path, colleague: tuple[ClientLayout, HubLink], out: Path) -> bool:
    """Contribute an adapter whose head is private; return whether a colleague's pull holds it."""
    put_in(source, share_head=False)
    made = pull(*colleague, source.name, out)
    return made.head != "none"


def test_a_private_head_never_leaves_and_a_shared_one_does(
    member: Member, put_in: Any, save_adapter: Any, colleague: tuple[ClientLayout, HubLink], tmp_path: Path
) -> None:
    assert not leaves(put_in, save_adapter("films", head=True), colleague, tmp_path / "private")
    put_in(tmp_path / "films", share_head=True)
    made = pull(*colleague, "films", tmp_path / "out")
    assert (made.head, made.head_of) == ("shared_beside", (member[2],))
    (read,) = read_contributions([tmp_path / "films"], share_head=True)
    assert equal(load_file(tmp_path / "out" / HEAD_FILE), dict(read.head))
    # Here it is the own one: with the frame it came with, PEFT loads it.
    assert pull(member[0], member[1], "films", tmp_path / "own").head == "own"


def test_planted_bug_a_private_head_that_is_sent_is_caught(
    put_in: Any,
    save_adapter: Any,
    colleague: tuple[ClientLayout, HubLink],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = share_client.contribute._read
    monkeypatch.setattr(share_client.contribute, "_read", lambda directory, task, share: honest(directory, task, True))
    assert leaves(put_in, save_adapter("films", head=True), colleague, tmp_path / "private")


def test_bytes_of_heads_are_counted_apart_both_ways(
    member: Member, put_in: Any, save_adapter: Any, colleague: tuple[ClientLayout, HubLink], tmp_path: Path
) -> None:
    put_in(save_adapter("films", head=True), share_head=True)
    pull(*colleague, "films", tmp_path / "out")
    status = colleague[1].hub.GetStatus(hub_pb2.GetStatusRequest())
    counted = {row.member.partition("/")[2]: row for row in status.traffic}
    size = 4 * sum(tensor.numel() for tensor in load_file(tmp_path / "out" / HEAD_FILE).values())
    assert (counted["main"].up.heads, counted["main"].down_heads) == (size, 0)
    assert (counted["second"].up.heads, counted["second"].down_heads > size) == (0, True)
    assert counted["second"].down_heads < size + 1000, "a header and nothing else"


@pytest.mark.parametrize("lie", ["signature", "version", "task", "size"])
def test_a_head_that_the_hub_has_not_signed_is_not_taken(
    lie: str, member: Member, put_in: Any, save_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, link, organisation = member
    version = put_in(save_adapter("films", head=True), share_head=True)
    put_in(save_adapter("trees", 3, head=True), share_head=True)
    chain = chain_of(layout, link)
    asked = (f"{organisation}/films", version)
    assert fetch_head(link, chain, *asked) is not None
    honest, stub = ManifestChain.check_head, link.hub.FetchHead

    def forged(self: ManifestChain, header: hub_pb2.HeadHeader, version: int) -> None:
        if lie == "signature":
            header.manifest.signature = bytes(64)
        honest(self, header, version)

    def other(request: hub_pb2.FetchHeadRequest, timeout: float) -> Any:
        if lie == "version":
            request.version += 1
        if lie == "task":
            request = hub_pb2.FetchHeadRequest(space_id=request.space_id, task_id=f"{organisation}/trees")
        return stub(request, timeout=timeout)

    monkeypatch.setattr(ManifestChain, "check_head", forged)
    monkeypatch.setattr(link.hub, "FetchHead", other)
    if lie == "size":
        monkeypatch.setattr("share_client.heads.MAX_HEAD_PAYLOAD_BYTES", 10)
    if lie == "task":
        asked = (asked[0], link.describe().version)
    with pytest.raises(DigestError if lie == "size" else ManifestError):
        fetch_head(link, chain, *asked)
