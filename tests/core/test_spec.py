"""Fingerprints and space.toml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from share_core.errors import ConfigError, SpaceMismatchError, TensorShapeError
from share_core.fingerprint import check_backbone, describe_space, fingerprint_weight
from share_core.names import check_name, check_update_id, split_task_id
from share_core.spec_file import builtin_spec, builtin_specs, find_spec, read_spec, spec_from_toml, spec_to_toml

WEIGHTS = {"b.value": torch.arange(12.0).reshape(3, 4), "a.query": torch.ones(2, 5)}


def test_fingerprint_is_the_documented_bytes() -> None:
    """Recomputed here from the docstring alone."""
    import hashlib
    import struct

    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
    bits = b"".join(struct.pack("<f", v)[2:] for v in weight.flatten().tolist())
    expected = hashlib.sha256(b"fedshare/site/1\0a.b\0" + struct.pack("<QQ", 3, 2) + bits).hexdigest()
    assert fingerprint_weight("a.b", weight) == expected


def test_fingerprint_ignores_the_loading_dtype_and_layout_but_not_the_values() -> None:
    weight = torch.randn(6, 5).bfloat16()
    same = fingerprint_weight("s", weight)
    assert fingerprint_weight("s", weight.float()) == same
    assert fingerprint_weight("s", weight.double().T.contiguous().T) == same
    assert fingerprint_weight("t", weight) != same
    assert fingerprint_weight("s", weight.T) != same
    changed = weight.clone()
    changed[0, 0] += 1
    assert fingerprint_weight("s", changed) != same
    with pytest.raises(TensorShapeError, match="matrix"):
        fingerprint_weight("s", torch.ones(3))


def test_space_toml_round_trip(tmp_path: Path) -> None:
    spec = describe_space("test model", WEIGHTS, k_max=16, tau=0.1, rank_limit=8)
    path = tmp_path / "space.toml"
    path.write_text(spec_to_toml(spec))
    assert read_spec(path) == spec
    assert describe_space("other name", dict(reversed(WEIGHTS.items()))).space_id == spec.space_id


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {"a.query": w["a.query"]}, "no site 'b.value'"),
        (lambda w: {**w, "b.value": torch.ones(3, 5)}, "the space has 3 x 4, this backbone 3 x 5"),
        (lambda w: {**w, "b.value": w["b.value"] + 1}, "probably an adapter was merged"),
        (lambda w: {name: weight + 1 for name, weight in w.items()}, "probably another revision"),
    ],
)
def test_wrong_backbone_is_refused_with_the_likely_cause(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], words: str
) -> None:
    spec = describe_space("test model", WEIGHTS)
    check_backbone(spec, WEIGHTS)
    with pytest.raises(SpaceMismatchError, match=words):
        check_backbone(spec, change(WEIGHTS))


def edited(old: str, new: str) -> str:
    text = spec_to_toml(describe_space("m", WEIGHTS))
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("][", "not a TOML file"),
        ("", r"table \[space\]"),
        (edited("k_max = 64", 'k_max = "64"'), "k_max: expected int, got '64'"),
        (edited("k_max = 64", "k_max = true"), "k_max: expected int"),
        (edited("k_max = 64", "k_max = 0"), "1 <= k_max"),
        (edited("tau = 0.05", "tau = 1.5"), "tau < 1"),
        (edited("[2, 5]", "[2, 0]"), "expected { shape"),
        (edited('"a.query"', '"a/query"'), "site name"),
        (edited("[sites]", "[other]"), r"table \[sites\]"),
    ],
)
def test_broken_space_toml_is_refused_by_key(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_from_toml(text, "space.toml")


def test_an_edited_shape_refuses_the_backbone() -> None:
    """The shape is in the id only through the fingerprint, so the file reads; no backbone fits it."""
    spec = spec_from_toml(edited("[2, 5]", "[2, 6]"), "space.toml")
    with pytest.raises(SpaceMismatchError, match=r"a\.query"):
        check_backbone(spec, WEIGHTS)


def test_edited_fingerprint_no_longer_matches_the_id() -> None:
    text = spec_to_toml(describe_space("m", WEIGHTS))
    digest = fingerprint_weight("a.query", WEIGHTS["a.query"])
    with pytest.raises(ConfigError, match="the file was edited"):
        spec_from_toml(text.replace(digest, "0" * 64), "space.toml")


def test_builtin_spaces_are_readable_and_unknown_ones_are_named() -> None:
    for name in builtin_specs():
        assert builtin_spec(name).backbone == name
    with pytest.raises(ConfigError, match="no built-in space 'nope'"):
        builtin_spec("nope")
    with pytest.raises(ConfigError, match=r"cannot read missing\.toml"):
        find_spec("missing.toml")
    assert find_spec("digits-vit") == builtin_spec("digits-vit")
    with pytest.raises(ConfigError, match="cannot read"):
        read_spec(Path("/nonexistent/space.toml"))


@pytest.mark.parametrize("name", ["", "A", "a b", "é", "-a", "a-", ".", "a/b", "a" * 65, "a\0", "\uff41"])
def test_names_outside_the_alphabet_are_refused(name: str) -> None:
    from share_core.errors import TaskNameError

    with pytest.raises(TaskNameError):
        check_name(name)
    with pytest.raises(TaskNameError):
        split_task_id(f"org/{name}")


def test_names_inside_the_alphabet_pass() -> None:
    from share_core.errors import UpdateIdError

    assert split_task_id("st.mary-hospital/chest_xray.2") == ("st.mary-hospital", "chest_xray.2")
    assert check_update_id("0" * 32) == "0" * 32
    for bad in ("0" * 31, "0" * 33, "A" * 32, "g" * 32):
        with pytest.raises(UpdateIdError):
            check_update_id(bad)
