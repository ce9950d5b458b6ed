"""Adapters and spaces of different backbones are kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from share_core.errors import ConfigError, SpaceMismatchError
from share_core.fingerprint import fingerprint_weight
from share_core.peft.export import PeftSite
from share_core.space_tool.backbone import fingerprinted
from share_core.space_tool.spacefile import read_space
from share_core.types import SiteSpec


def test_adapters_of_two_backbones_are_refused_by_name(run: Any, adapter: Any, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "a", base="org/bert-tiny"), adapter(tmp_path / "b", 1, base="org/bert-base")
    answer = run("merge", first, second, "-o", tmp_path / "m")
    assert answer.code == 1
    assert "'org/bert-base'" in answer.err
    assert str(second) in answer.err
    assert not (tmp_path / "m").exists()
    third = adapter(tmp_path / "c", 1, base="elsewhere/Bert-Tiny/")
    assert run("merge", first, third, adapter(tmp_path / "d", 2, base=None), "-o", tmp_path / "m").code == 0


def test_adapters_of_two_sizes_are_refused_by_name(run: Any, adapter: Any, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "a", base=None), adapter(tmp_path / "b", 1, {"layer.1.out": (9, 14)}, base=None)
    answer = run("merge", first, second, "-o", tmp_path / "m")
    assert answer.code == 1
    assert all(word in answer.err for word in (str(second), "another backbone", "'layer.1.out'", "8 x 14", "9 x 14"))


def test_fingerprints_come_from_the_model(run: Any, three: list[Path], backbone: Any, tmp_path: Path) -> None:
    for place in (backbone(tmp_path / "model"), tmp_path / "model" / "model.safetensors"):
        assert run("merge", *three, "-o", tmp_path / "m", "--backbone", place).code == 0
        file = read_space(tmp_path / "m")
        assert file.verified
    found = run("verify", tmp_path / "m", "--json").result["findings"]
    assert "3 of 3 sites carry a fingerprint" in {row["checked"]: row["detail"] for row in found}["identity"]


def test_spaces_of_two_backbones_are_kept_apart_by_fingerprint(
    run: Any, three: list[Path], backbone: Any, tmp_path: Path
) -> None:
    path, other = tmp_path / "m", backbone(tmp_path / "other", 1)
    run("merge", *three[:2], "-o", path, "--backbone", backbone(tmp_path / "model"))
    whole = path.read_bytes()
    answer = run("add", path, three[2], "--backbone", other)
    assert answer.code == 1
    assert "another backbone" in answer.err
    assert "fingerprint" in answer.err
    assert path.read_bytes() == whole
    run("merge", *three[:2], "-o", tmp_path / "n", "--backbone", other)
    answer = run("diff", path, tmp_path / "n")
    assert (answer.code, "different backbones" in answer.err) == (1, True)
    assert run("add", path, three[2], "--backbone", tmp_path / "model").code == 0


def test_a_space_gains_its_fingerprints_later(
    run: Any, space: Path, adapter: Any, backbone: Any, tmp_path: Path
) -> None:
    assert not read_space(space).verified
    model = backbone(tmp_path / "model")
    assert run("add", space, adapter(tmp_path / "four", 4), "--backbone", model).code == 0
    assert read_space(space).verified
    more = adapter(tmp_path / "five", 5, {"layer.7.new": (5, 6)})
    answer = run("add", space, more)
    assert (answer.code, "give the model with --backbone" in answer.err) == (1, True)
    answer = run("add", space, more, "--backbone", model)
    assert (answer.code, "'layer.7.new.weight'" in answer.err) == (1, True)


def test_a_site_that_no_task_adapts_any_more_does_not_stop_a_backbone(
    run: Any, adapter: Any, backbone: Any, tmp_path: Path
) -> None:
    path, sites = tmp_path / "m", {"x": (5, 6), "y": (6, 5)}
    run("merge", adapter(tmp_path / "a", 1, {"x": (5, 6)}), adapter(tmp_path / "b", 2, {"y": (6, 5)}), "-o", path)
    run("remove", path, "a")
    more = adapter(tmp_path / "c", 3, {"y": (6, 5)})
    answer = run("add", path, more, "--backbone", backbone(tmp_path / "model", sites=sites))
    assert answer.code == 0, answer.err
    assert {name: bool(s.sha256) for name, s in read_space(path).sites.items()} == {"x": False, "y": True}


def test_a_wrong_backbone_ends_before_the_first_merge_is_computed(
    run: Any, three: list[Path], backbone: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678{}")
    small = backbone(
        tmp_path / "small", sites={"layer.0.query": (3, 3), "layer.0.value": (3, 3), "layer.1.out": (3, 3)}
    )
    for place, sentence in (
        (tmp_path / "nowhere", "holds no safetensors model"),
        (tmp_path / "empty", "holds no safetensors model"),
        (tmp_path / "damaged.safetensors", "cannot read"),
        (small, "made for another backbone"),
        (three[0], "expected one: it is another architecture"),
    ):
        answer = run("merge", *three, "-o", tmp_path / "m", "--backbone", place)
        assert (answer.code, sentence in answer.err) == (1, True), answer.err
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("kind", "shape", "turned"),
    [
        ("linear", (4, 6), False),
        ("conv1d_transposed", (6, 4), True),
        ("embedding", (6, 4), True),
        ("conv", (4, 3, 2), False),
        ("conv", (4, 3, 2, 1), False),
    ],
)
def test_weights_of_every_kind_are_read_as_the_matrix_that_is_changed(
    kind: str, shape: tuple[int, ...], turned: bool, tmp_path: Path
) -> None:
    weight = torch.randn(*shape)
    save_file({"m.x.weight": weight, "m.y.x.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    site = PeftSite("m.x", kind, shape)
    with pytest.raises(SpaceMismatchError, match="2 weights named"):
        fingerprinted(tmp_path, {"x": SiteSpec("x", 4, 6, "")}, {"x": site})
    found = fingerprinted(tmp_path, {"m.x": SiteSpec("m.x", 4, 6, "")}, {"m.x": site})
    matrix = weight.T if turned else weight.reshape(4, 6)
    assert found["m.x"].sha256 == fingerprint_weight("m.x", matrix)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_weight_that_is_no_matrix_is_another_backbone(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(shape)}, tmp_path / "a.safetensors")
    for kind in ("linear", "embedding"):
        with pytest.raises(SpaceMismatchError, match="another backbone"):
            fingerprinted(tmp_path, {"x": SiteSpec("x", 4, 6, "")}, {"x": PeftSite("x", kind, (4, 6))})


def test_a_model_file_that_is_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="cannot read"):
        fingerprinted(tmp_path / "model.bin", {"x": SiteSpec("x", 4, 6, "")}, {"x": PeftSite("x", "linear", (4, 6))})


def test_with_the_model_names_decide_nothing_and_the_space_can_be_rebuilt(
    run: Any, adapter: Any, backbone: Any, tmp_path: Path
) -> None:
    first, second = adapter(tmp_path / "a", base="org/bert-tiny"), adapter(tmp_path / "b", 1, base="/home/me/my-copy")
    path, model = tmp_path / "m", backbone(tmp_path / "model")
    assert run("merge", first, second, "-o", path).code == 1
    assert run("merge", first, second, "-o", path, "--backbone", model).code == 0
    assert run("rebuild", path, "--cap", "3").code == 0
    assert read_space(path).verified
    assert set(read_space(path).space.cores) == {"a", "b"}
    assert run("remove", path, "a", "--anew").code == 0
    assert run("add", path, first).code == 1
    assert run("add", path, first, "--backbone", model).code == 0
