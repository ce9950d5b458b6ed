"""Pulled adapters in the real PEFT library: the same outputs as the space's own change of the weights."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertModel
from typer.testing import CliRunner

import share_client.pull
from share_client.cli import app
from share_client.contribute import contribute, read_contributions
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_client.pull import HEAD_FILE, MARKER, Pulled, PullOptions, pull, pulled_text
from share_client.serving import hot_swap
from share_core.durable import flush_directory
from share_core.errors import AdapterError, ConfigError, FedshareError, ManifestError, UnknownTaskError
from share_core.linalg import balanced
from share_core.peft.names import site_of
from share_core.peft.reader import read_adapter
from share_core.space import task_adapter
from share_core.types import Adapter, SpaceSpec
from share_core.wire import decode_snapshot

RUNNER = CliRunner()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Member = tuple[ClientLayout, HubLink, str]
Features = Callable[[nn.Module], Tensor]


@pytest.fixture
def put_in(member: Member, bert_directory: Path) -> Callable[[Path], int]:
    """Return a function that contributes an adapter of the member and returns the version that holds it."""

    def send(directory: Path) -> int:
        layout, link, _ = member
        wanted = read_contributions([directory])
        (sent,) = contribute(layout, link, wanted, backbone=str(bert_directory), wait=True)
        assert sent.state == "merged"
        return sent.version

    return send


def stored(link: HubLink, task_id: str, version: int = 0) -> Adapter:
    """Return what a version of the space says, in float64."""
    spec = link.describe().spec
    space = decode_snapshot(link.fetch_snapshot(spec.space_id, version)[1], spec)
    return task_adapter(space, task_id, torch.float64)


def changed(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Return a model with dW added to its weights: the outputs that every other way must give."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if site_of(path) in adapter and isinstance(module, nn.Linear):
                factors = adapter[site_of(path)]
                module.weight += (factors.out @ factors.in_.T).to(module.weight)
    return model


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) < 1e-5


@pytest.fixture
def films(member: Member, save_adapter: Any, put_in: Any) -> Adapter:
    """A contributed task without a head, as the space holds it."""
    put_in(save_adapter("films"))
    return stored(member[1], f"{member[2]}/films")


def test_peft_loads_it_and_computes_what_the_space_says(
    films: Adapter, member: Member, load_bare: Any, features: Features, tmp_path: Path
) -> None:
    layout, link, organisation = member
    made = pull(layout, link, "films", tmp_path / "out")
    assert (made.task_id, made.form, made.rank, made.cut, made.head) == (
        f"{organisation}/films",
        "adapter",
        3,
        0,
        "none",
    )
    expected = features(changed(load_bare(), films))
    loaded = PeftModel.from_pretrained(load_bare(), tmp_path / "out")
    assert close(features(loaded), expected)
    assert not close(features(load_bare()), expected), "the task changes something"
    document = json.loads((tmp_path / "out" / MARKER).read_text())
    assert (document["task_id"], document["version"]) == (made.task_id, made.version)


def test_the_check_of_outputs_catches_a_wrong_scale(
    films: Adapter, member: Member, load_bare: Any, features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the factors are written in another version's coordinates, here simply twice as large."""
    monkeypatch.setattr(share_client.pull, "balanced", lambda u, s, v: balanced(u, 2 * s, v))
    pull(member[0], member[1], "films", tmp_path / "out")
    loaded = PeftModel.from_pretrained(load_bare(), tmp_path / "out")
    assert not close(features(loaded), features(changed(load_bare(), films)))


def test_a_pulled_adapter_swaps_into_a_running_model(
    films: Adapter, member: Member, save_adapter: Any, load_bare: Any, features: Features, tmp_path: Path
) -> None:
    pull(member[0], member[1], "films", tmp_path / "out")
    running = PeftModel.from_pretrained(load_bare(), save_adapter("other", 7)).eval()
    before = features(running)
    assert not hot_swap(running, "default", read_adapter(tmp_path / "out").factors), "in place"
    assert close(features(running), features(changed(load_bare(), films)))
    assert not close(features(running), before)


def test_the_own_head_is_inside_and_peft_uses_it(
    member: Member, save_adapter: Any, put_in: Any, load_classifier: Any, features: Features, tmp_path: Path
) -> None:
    layout, link, _ = member
    source = save_adapter("films", head=True)
    put_in(source)
    made = pull(layout, link, "films", tmp_path / "out")
    assert made.head == "own"
    assert any("classifier" in name for name in made.head_tensors)
    original = features(PeftModel.from_pretrained(load_classifier(), source))
    assert close(features(PeftModel.from_pretrained(load_classifier(), tmp_path / "out")), original)
    bare = pull(layout, link, "films", tmp_path / "bare", PullOptions(head=False))
    assert bare.head == "none"
    assert not any("classifier" in key for key in load_file(tmp_path / "bare" / "adapter_model.safetensors"))


def loads_whole(model: nn.Module, directory: Path) -> nn.Module:
    """Load an adapter by PEFT, which tells of LoRA tensors that it looked for in vain only by a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        loaded: nn.Module = PeftModel.from_pretrained(model, directory)
        return loaded


def test_with_the_backbone_an_own_classifier_is_still_one(
    member: Member,
    save_adapter: Any,
    put_in: Any,
    load_classifier: Any,
    bert_directory: Path,
    features: Any,
    tmp_path: Path,
) -> None:
    source = save_adapter("films", head=True)
    put_in(source)
    made = pull(member[0], member[1], "films", tmp_path / "out", PullOptions(backbone=str(bert_directory)))
    assert made.head == "own"
    original = features(PeftModel.from_pretrained(load_classifier(), source))
    assert close(features(loads_whole(load_classifier(), tmp_path / "out")), original)
    assert not close(features(load_classifier()), original)


def test_like_another_model_the_own_head_is_inside_only_where_it_has_one(
    member: Member, save_adapter: Any, put_in: Any, load_bare: Any, load_classifier: Any, features: Any, tmp_path: Path
) -> None:
    layout, link, organisation = member
    source = save_adapter("films", head=True)
    put_in(source)
    bare = pull(layout, link, "films", tmp_path / "bare", PullOptions(like=save_adapter("like")))
    assert bare.head == "beside"
    assert "head.safetensors, PEFT does not load it" in pulled_text(bare)
    assert all("lora_" in key for key in load_file(tmp_path / "bare" / "adapter_model.safetensors"))
    assert any("classifier" in key for key in load_file(tmp_path / "bare" / HEAD_FILE))
    expected = features(changed(load_bare(), stored(link, f"{organisation}/films")))
    assert close(features(loads_whole(load_bare(), tmp_path / "bare")), expected)
    like = save_adapter("classifies", 5, head=True)
    assert pull(layout, link, "films", tmp_path / "whole", PullOptions(like=like)).head == "own"
    original = features(PeftModel.from_pretrained(load_classifier(), source))
    assert close(features(loads_whole(load_classifier(), tmp_path / "whole")), original)


def test_own_biases_come_back_and_are_not_put_into_another_model(
    member: Member, save_adapter: Any, put_in: Any, load_bare: Any, features: Any, tmp_path: Path
) -> None:
    source = save_adapter("films", bias="lora_only")
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {key: tensor + 1 if key.endswith(".bias") else tensor for key, tensor in tensors.items()}
    save_file(tensors, source / "adapter_model.safetensors")
    put_in(source)
    assert pull(member[0], member[1], "films", tmp_path / "out").head == "own"
    original = features(PeftModel.from_pretrained(load_bare(), source))
    assert close(features(PeftModel.from_pretrained(load_bare(), tmp_path / "out")), original)
    made = pull(member[0], member[1], "films", tmp_path / "other", PullOptions(like=save_adapter("like")))
    assert made.head == "beside"


def test_a_site_that_the_own_adapter_lacks_is_named_as_its_others(
    bert_spec: SpaceSpec, bert_directory: Path, save_adapter: Any
) -> None:
    own = read_adapter(save_adapter("films", head=True, target_modules=["query"])).export
    for options in (PullOptions(), PullOptions(backbone=str(bert_directory))):
        frame = share_client.pull._frame(bert_spec, options, own, set(bert_spec.sites))
        assert {name: site.module for name, site in frame.sites.items()} == {n: f"bert.{n}" for n in bert_spec.sites}


def test_another_member_pulls_it_without_the_head(
    member: Member, bert_hub: Any, save_adapter: Any, put_in: Any, connect: Any, tmp_path: Path
) -> None:
    put_in(save_adapter("films", head=True))
    guest = bert_hub.client(tmp_path / "guest", f"guest-{member[2][:20].strip('-')}/main")
    made = pull(guest, connect(guest), f"{member[2]}/films", tmp_path / "out")
    assert (made.head, made.head_tensors) == ("none", ())
    assert all("lora_" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    with pytest.raises(UnknownTaskError, match="has no task"):
        pull(guest, connect(guest), "films", tmp_path / "own")


def test_merged_weights_are_a_model_directory(
    films: Adapter, member: Member, bert_directory: Path, load_bare: Any, features: Features, tmp_path: Path
) -> None:
    made = pull(member[0], member[1], "films", tmp_path / "out", PullOptions(merged_into=bert_directory))
    assert made.form == "model"
    merged = BertModel.from_pretrained(tmp_path / "out").train(False)
    assert close(features(merged), features(changed(load_bare(), films)))
    assert not close(features(load_bare()), features(merged)), "only the copy has changed"
    own, kept = load_file(bert_directory / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(own) == set(kept)
    assert sum(not torch.equal(own[key], kept[key]) for key in own) == len(films)


def test_names_of_another_model_class_come_from_an_adapter_of_it(
    films: Adapter, member: Member, save_adapter: Any, load_classifier: Any, features: Features, tmp_path: Path
) -> None:
    like = save_adapter("like", 5, head=True)
    pull(member[0], member[1], "films", tmp_path / "out", PullOptions(like=like))
    loaded = PeftModel.from_pretrained(load_classifier(), tmp_path / "out")
    assert close(features(loaded), features(changed(load_classifier(), films)))
    with pytest.raises(AdapterError, match="no module for 2 sites"):
        half = save_adapter("half", 5, target_modules=["query"])
        pull(member[0], member[1], "films", tmp_path / "no", PullOptions(like=half))
    assert not (tmp_path / "no").exists()


def test_an_older_version_is_what_it_was(member: Member, save_adapter: Any, put_in: Any, tmp_path: Path) -> None:
    layout, link, _ = member
    directory = save_adapter("films")
    first = put_in(directory)
    before = read_adapter(directory).factors
    save_adapter("films", 9)
    second = put_in(directory)
    assert second > first
    for version, expected in ((first, before), (0, read_adapter(directory).factors)):
        pull(layout, link, "films", tmp_path / f"v{version}", PullOptions(version=version))
        found = read_adapter(tmp_path / f"v{version}").factors
        for site, factors in expected.items():
            assert torch.allclose(found[site].out @ found[site].in_.T, factors.out @ factors.in_.T, atol=1e-4)
    with pytest.raises(FedshareError):
        pull(layout, link, "films", tmp_path / "later", PullOptions(version=10_000))


def test_a_smaller_rank_is_the_nearest_one_and_what_it_cuts_is_told(
    films: Adapter, member: Member, tmp_path: Path
) -> None:
    made = pull(member[0], member[1], "films", tmp_path / "out", PullOptions(rank=1))
    found = read_adapter(tmp_path / "out")
    assert {factors.rank for factors in found.factors.values()} == {1}
    squares = [0.0, 0.0]
    for site, factors in films.items():
        dense = factors.out @ factors.in_.T
        best = torch.linalg.svdvals(dense)
        mine = found.factors[site]
        left = float((dense - mine.out.double() @ mine.in_.double().T).norm())
        assert left == pytest.approx(float(best[1:].norm()), rel=1e-4)
        squares = [squares[0] + left**2, squares[1] + float(dense.norm()) ** 2]
    assert made.cut == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert made.cut > 0.01


def test_what_was_not_written_here_is_never_replaced(films: Adapter, member: Member, tmp_path: Path) -> None:
    layout, link, _ = member
    out = tmp_path / "out"
    out.mkdir()
    pull(layout, link, "films", out)  # an empty directory is as good as none
    with pytest.raises(ConfigError, match="is there already"):
        pull(layout, link, "films", out)
    pull(layout, link, "films", out, PullOptions(rank=1, force=True))
    assert read_adapter(out).config.r == 1
    (out / MARKER).unlink()
    with pytest.raises(ConfigError, match="it is not replaced"):
        pull(layout, link, "films", out, PullOptions(force=True))
    assert read_adapter(out).config.r == 1


def test_a_failure_leaves_the_old_directory_and_nothing_else(
    films: Adapter, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, link, _ = member
    out = tmp_path / "there" / "out"
    pull(layout, link, "films", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(share_client.pull, "flush_directory", full)
    with pytest.raises(FedshareError, match="No space left on device"):
        pull(layout, link, "films", out, PullOptions(rank=1, force=True))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(out.parent.iterdir()) == [out]


@pytest.fixture
def pull_failing_at(
    films: Adapter, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Return a function that pulls over an older directory, fails at the end, and looks for the older one."""

    def check(step: str) -> None:
        layout, link, _ = member
        out = tmp_path / "there" / "out"
        pull(layout, link, "films", out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        rename, flush = Path.rename, flush_directory

        def fail_once(path: Path) -> None:
            if path in (out, out.parent):
                monkeypatch.setattr(Path, "rename", rename)
                monkeypatch.setattr(share_client.pull, "flush_directory", flush)
                raise OSError(5, "Input/output error")

        def failing_rename(path: Path, target: Path) -> Path:
            if step == "rename":
                fail_once(target)
            return rename(path, target)

        def failing_flush(path: Path) -> None:
            if step == "flush":
                fail_once(path)
            flush(path)

        monkeypatch.setattr(Path, "rename", failing_rename)
        monkeypatch.setattr(share_client.pull, "flush_directory", failing_flush)
        with pytest.raises(FedshareError, match=r"Input/output error.*nothing was changed"):
            pull(layout, link, "films", out, PullOptions(rank=1, force=True))
        left = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
        assert left == before, "the older directory is not back"
        assert list(out.parent.iterdir()) == [out]

    return check


@pytest.mark.parametrize("step", ["rename", "flush"])
def test_where_the_new_directory_cannot_take_its_place_the_old_one_is_back(
    step: str, pull_failing_at: Callable[[str], None]
) -> None:
    pull_failing_at(step)


@pytest.mark.parametrize("step", ["rename", "flush"])
def test_an_old_directory_that_is_removed_first_is_missed(
    step: str, pull_failing_at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_first(staged: Path, out: Path) -> None:
        out.parent.mkdir(exist_ok=True)
        if out.exists():
            shutil.rmtree(out)
        staged.rename(out)
        vars(share_client.pull)["flush_directory"](out.parent)

    monkeypatch.setattr(share_client.pull, "_move", remove_first)
    with pytest.raises(AssertionError, match="the older directory is not back"):
        pull_failing_at(step)


def test_a_version_that_the_hub_has_not_signed_is_not_written(
    films: Adapter, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from share_client.chain import ManifestChain

    layout, link, _ = member

    def forged(chain: ManifestChain, header: Any) -> str:
        header.manifest.signature = bytes(64)
        return real(chain, header)

    real = ManifestChain.check_snapshot
    monkeypatch.setattr(ManifestChain, "check_snapshot", forged)
    with pytest.raises(ManifestError):
        pull(layout, link, "films", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_whether_a_head_is_inside(films: Adapter, member: Member, tmp_path: Path) -> None:
    arguments = ["pull", "--task", "films", "--dir", str(member[0].root)]
    answer = RUNNER.invoke(app, [*arguments, "--out", str(tmp_path / "a")])
    assert answer.exit_code == 0, answer.output
    assert "no head inside" in answer.stdout
    made = json.loads(RUNNER.invoke(app, [*arguments, "--out", str(tmp_path / "b"), "--json"]).stdout)
    assert set(made) == set(Pulled.__dataclass_fields__)
    assert RUNNER.invoke(app, [*arguments, "--out", str(tmp_path / "b")]).exit_code == 1
