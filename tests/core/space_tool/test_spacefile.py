"""The space file: round trips, equal bytes for equal content, and one test per lie a file can tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from share_core.errors import (
    ConfigError,
    HeaderError,
    NonFiniteError,
    PayloadError,
    TensorNameError,
    TensorShapeError,
)
from share_core.ledger import TaskLedger
from share_core.space_tool.spacefile import (
    FilePolicy,
    SpaceFile,
    TaskSource,
    decode_space,
    encode_space,
    is_space,
    read_space,
    write_space,
)
from share_core.types import Core, SiteBasis, SiteSpec, Space

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def assert_same(first: SpaceFile, second: SpaceFile) -> None:
    """Everything but the rounding of the ledger to float32."""
    assert (first.backbone, dict(first.sites), first.policy) == (second.backbone, dict(second.sites), second.policy)
    assert list(first.sources.items()) == list(second.sources.items())
    assert first.space.version == second.space.version
    for site, basis in first.space.bases.items():
        assert torch.equal(basis.left, second.space.bases[site].left)
        assert torch.equal(basis.right, second.space.bases[site].right)
    assert list(first.space.cores) == list(second.space.cores)
    for task, cores in first.space.cores.items():
        assert set(cores) == set(second.space.cores[task])
        for site, core in cores.items():
            assert torch.equal(core.out, second.space.cores[task][site].out)
            assert torch.equal(core.in_, second.space.cores[task][site].in_)
        a, b = first.ledger[task], second.ledger[task]
        assert a.measured == b.measured
        assert b.norm == pytest.approx(a.norm, rel=1e-6)
        assert a.bound <= b.bound * (1 + 1e-6) + 1e-12
        assert b.bound <= a.bound * (1 + 1e-6) + 1e-12


def test_a_merged_space_round_trips(sample: SpaceFile) -> None:
    payload = encode_space(sample)
    again = decode_space(payload)
    assert_same(sample, again)
    assert encode_space(again) == payload, "reading and writing again changes nothing"
    assert all(
        a.bounds[s] <= b.bounds[s] for t, a in sample.ledger.items() for b in [again.ledger[t]] for s in b.bounds
    )


@st.composite
def files(draw: st.DrawFn) -> SpaceFile:
    """Spaces of any shape: shapes, ranks and a seed are drawn, never floats."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sites = {
        f"s{i}": SiteSpec(
            f"s{i}", draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.sampled_from(["", "a" * 64]))
        )
        for i in range(draw(st.integers(0, 3)))
    }
    bases = {
        name: SiteBasis(
            torch.randn(s.d_out, draw(st.integers(0, s.d_out)), generator=g),
            torch.randn(s.d_in, draw(st.integers(0, s.d_in)), generator=g),
        )
        for name, s in sites.items()
    }
    tasks = draw(st.lists(st.from_regex(r"[a-z0-9]{1,8}(/[a-z0-9]{1,8})?", fullmatch=True), unique=True, max_size=3))
    cores: dict[str, dict[str, Core]] = {task: {} for task in tasks}
    ledger, sources = {}, {}
    for task in tasks:
        own = draw(st.sets(st.sampled_from(sorted(sites)))) if sites else set()
        for name in sorted(own):
            rank = draw(st.integers(0, 3)) if bases[name].k_out and bases[name].k_in else 0
            if rank:
                shapes = (bases[name].k_out, rank), (bases[name].k_in, rank)
                cores[task][name] = Core(*(torch.randn(*shape, generator=g) for shape in shapes))
        norms = {name: 1.0 + float(torch.rand((), generator=g)) for name in sorted(own)}
        bounds = {name: float(torch.rand((), generator=g)) for name in norms}
        ledger[task] = TaskLedger(norms, bounds, draw(st.booleans()))
        export: dict[str, Any] = {
            "base_model": draw(st.sampled_from([None, "bert", "größe"])),
            "task_type": None,
            "fan_in_fan_out": False,
            "modules_to_save": [],
            "bias": "none",
            "sites": {name: [f"m.{name}", "linear", [sites[name].d_out, sites[name].d_in]] for name in sorted(own)},
        }
        sources[task] = TaskSource(draw(st.sampled_from(["/a", "/b/ä"])), "0" * 64, draw(st.integers(0, 2**40)), export)
    policy = FilePolicy(
        draw(st.none() | st.integers(1, 1 << 20)),
        draw(st.sampled_from([0.0, 0.05, 0.999])),
        draw(st.none() | st.integers(1, 64)),
        draw(st.dictionaries(st.sampled_from(["*.q", "b", "a*"]), st.integers(1, 99))),
    )
    return SpaceFile("bert", sites, Space(draw(st.integers(0, 2**53)), bases, cores), ledger, sources, policy)


@settings(max_examples=60, deadline=None)
@given(files())
def test_any_space_round_trips(file: SpaceFile) -> None:
    payload = encode_space(file)
    again = decode_space(payload)
    assert_same(file, again)
    assert encode_space(again) == payload
    assert list(again.policy.site_caps) == list(file.policy.site_caps)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_a_refusal_or_harmless(data: st.DataObject, sample: SpaceFile) -> None:
    payload = bytearray(encode_space(sample))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = decode_space(bytes(payload))
    except PayloadError as error:
        assert str(error)
    else:
        assert encode_space(file)


def altered(file: SpaceFile, change: Change) -> bytes:
    payload = encode_space(file)
    tensors = load(payload)
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["fedshare"])
    result = change(header, tensors)
    text = result if isinstance(result, str) else json.dumps(header)
    return bytes(save(tensors, {"fedshare": text}))


def put(*path: Any) -> Change:
    """Return a change that sets the header's value at ``path[:-1]`` to ``path[-1]``."""

    def change(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        place: Any = header
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return change


def take(*path: Any) -> Change:
    def change(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        place: Any = header
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def tensor(name: str, value: Callable[[Tensor], Tensor] | None) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        found = tensors.pop(name)
        if value is not None:
            tensors[name] = value(found.clone()).contiguous()

    return change


def first_entry(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x.view(-1)[0] = value
        return x

    return change


SITE = "layer.0.query"
EXPORT = ("exports", 0)

LIES: dict[str, tuple[type[PayloadError], str, Change]] = {
    "no header": (HeaderError, "share-space merge", lambda h, t: "{}"),
    "header no JSON": (HeaderError, "not JSON", lambda h, t: "{,}"),
    "header of nothing but brackets": (HeaderError, "nested too deeply", lambda h, t: "[" * 100_000),
    "header a list": (HeaderError, "expected a file of format", lambda h, t: "[]"),
    "header with NaN": (HeaderError, "NaN", put("policy", "budget", float("nan"))),
    "header with a key twice": (HeaderError, "twice", lambda h, t: json.dumps(h)[:-1] + ', "version": 1}'),
    "number of 5000 digits": (HeaderError, "not JSON", lambda h, t: json.dumps(h)[:-1] + f', "x": {"9" * 5000}}}'),
    "format of tomorrow": (HeaderError, "fedshare/space/2", put("format", "fedshare/space/2")),
    "snapshot": (HeaderError, "inspect it with --space", put("format", "fedshare/snapshot/1")),
    "unknown key": (HeaderError, "'extra' is unknown", put("extra", 1)),
    **{f"no {key}": (HeaderError, f"'{key}' is missing", take(key)) for key in
       ("backbone", "version", "policy", "sites", "tasks", "exports")},
    **{f"{key} a number": (HeaderError, key, put(key, 7)) for key in
       ("backbone", "policy", "sites", "tasks", "exports")},
    **{f"{key} null": (HeaderError, key, put(key, None)) for key in
       ("backbone", "version", "policy", "sites", "tasks", "exports")},
    "version negative": (HeaderError, "version", put("version", -1)),
    "version text": (HeaderError, "version", put("version", "3")),
    "version true": (HeaderError, "version", put("version", True)),
    "version huge": (HeaderError, "version", put("version", 1 << 80)),
    "backbone with control characters": (HeaderError, "printable", put("backbone", "\x1b[2J")),
    "backbone of a megabyte": (HeaderError, "at most 4096", put("backbone", "a" * 5000)),
    "policy of unknown keys": (HeaderError, "'window' is unknown", put("policy", "window", 3)),
    "policy without cap": (HeaderError, "'cap' is missing", take("policy", "cap")),
    "policy cap zero": (HeaderError, "policy cap", put("policy", "cap", 0)),
    "policy cap half": (HeaderError, "policy cap", put("policy", "cap", 1.5)),
    "policy cap absurd": (HeaderError, "policy cap", put("policy", "cap", 1 << 40)),
    "policy budget one": (HeaderError, "policy budget", put("policy", "budget", 1.0)),
    "policy budget negative": (HeaderError, "policy budget", put("policy", "budget", -0.1)),
    "policy budget text": (HeaderError, "policy budget", put("policy", "budget", "0")),
    "policy rank zero": (HeaderError, "policy rank", put("policy", "rank", 0)),
    "policy site_caps an object": (HeaderError, "policy site_caps", put("policy", "site_caps", {"a": 1})),
    "policy site cap of no number": (HeaderError, "policy site_caps", put("policy", "site_caps", [["a", None]])),
    "policy site cap of three": (HeaderError, "policy site_caps", put("policy", "site_caps", [["a", 1, 2]])),
    "site without a name": (HeaderError, "ASCII", put("sites", "", [3, 4, ""])),
    "site with control characters": (HeaderError, "printable", put("sites", "a\nb", [3, 4, ""])),
    "site in other letters": (HeaderError, "ASCII", put("sites", "größe", [3, 4, ""])),
    "site with a name of 600 letters": (HeaderError, "at most 512", put("sites", "a" * 600, [3, 4, ""])),
    "site of another shape": (PayloadError, SITE, put("sites", SITE, 0, 13)),
    "site of no shape": (HeaderError, SITE, put("sites", SITE, [])),
    "site of negative shape": (HeaderError, SITE, put("sites", SITE, 1, -10)),
    "site of shape zero": (HeaderError, SITE, put("sites", SITE, 1, 0)),
    "site of huge shape": (HeaderError, SITE, put("sites", SITE, 1, 1 << 62)),
    "site with half a fingerprint": (HeaderError, "hexadecimal", put("sites", SITE, 2, "ab")),
    "site gone": (PayloadError, SITE, take("sites", SITE)),
    "site without tensors": (PayloadError, "ranks", put("sites", "more", [3, 4, ""])),
    "task named twice": (HeaderError, "'one' is named twice", put("tasks", 1, "name", "one")),
    "task with an illegal name": (HeaderError, "not allowed", put("tasks", 0, "name", "../x")),
    "task with a name in markup": (HeaderError, "not allowed", put("tasks", 0, "name", "[red]")),
    "task of unknown keys": (HeaderError, "'x' is unknown", put("tasks", 0, "x", 1)),
    **{f"task without {key}": (HeaderError, f"'{key}' is missing", take("tasks", 0, key)) for key in
       ("name", "measured", "source", "sha256", "bytes", "export")},
    **{f"task {key} null": (HeaderError, key, put("tasks", 0, key, None)) for key in
       ("name", "measured", "source", "sha256", "bytes", "export")},
    "task a text": (HeaderError, "a task", put("tasks", 0, "one")),
    "task gone": (TensorShapeError, "'ranks'", take("tasks", 2)),
    "measured a number": (HeaderError, "measured", put("tasks", 0, "measured", 1)),
    "bytes negative": (HeaderError, "bytes", put("tasks", 0, "bytes", -1)),
    "export index too large": (HeaderError, "export of task 'one'", put("tasks", 0, "export", 2)),
    "export index negative": (HeaderError, "export of task 'one'", put("tasks", 0, "export", -1)),
    "export index of no export": (HeaderError, "export of task 'one'", put("exports", [])),
    "export no object": (HeaderError, "no object", put("exports", 0, 5)),
    "export without sites": (HeaderError, "sites", take(*EXPORT, "sites")),
    "export of an unknown kind": (HeaderError, "kind", put(*EXPORT, "sites", SITE, 1, "lstm")),
    "export of an unknown site": (HeaderError, "does not fit", put(*EXPORT, "sites", "x", ["m", "linear", [1, 1]])),
    "export of another shape": (HeaderError, "does not fit", put(*EXPORT, "sites", SITE, 2, [10, 12])),
    "export of a module with control characters": (HeaderError, "printable", put(*EXPORT, "sites", SITE, 0, "a\x07")),
    "unknown tensor": (TensorNameError, "'surprise'", lambda h, t: t.update(surprise=torch.ones(1))),
    "tensor of an unknown site": (TensorNameError, "'L/x'", lambda h, t: t.update({"L/x": torch.ones(1, 1)})),
    "tensor of an unknown part": (TensorNameError, f"'Q/{SITE}'", lambda h, t: t.update({f"Q/{SITE}": torch.ones(1)})),
    "ranks missing": (TensorNameError, "'ranks' is missing", tensor("ranks", None)),
    "norms missing": (TensorNameError, "'norms' is missing", tensor("norms", None)),
    "bounds missing": (TensorNameError, "'bounds' is missing", tensor("bounds", None)),
    "ranks of another shape": (TensorShapeError, "'ranks'", tensor("ranks", lambda x: x.T.flatten())),
    "ranks negative": (TensorShapeError, "'ranks'", tensor("ranks", first_entry(-1))),
    "ranks not whole": (TensorShapeError, "'ranks'", tensor("ranks", first_entry(1.5))),
    "ranks beyond counting": (TensorShapeError, "'ranks'", tensor("ranks", first_entry(1e30))),
    "ranks of too many columns": (TensorShapeError, "E_o/", tensor("ranks", first_entry(4))),
    "ranks of too few columns": (TensorShapeError, "E_o/", tensor("ranks", first_entry(0))),
    "ranks where nothing is stored": (TensorNameError, f"'E_o/{SITE}' is missing", tensor(f"E_o/{SITE}", None)),
    "ranks without directions": (
        TensorShapeError,
        "'ranks'",
        lambda h, t: [t.pop(f"{part}/{SITE}") for part in ("L", "R", "E_o", "E_i")],
    ),
    "norms negative": (PayloadError, "'norms'", tensor("norms", first_entry(-1.0))),
    "bounds negative": (PayloadError, "'bounds'", tensor("bounds", first_entry(-1e-9))),
    "norms NaN": (NonFiniteError, "'norms'", tensor("norms", first_entry(float("nan")))),
    "basis infinite": (NonFiniteError, f"'L/{SITE}'", tensor(f"L/{SITE}", first_entry(float("inf")))),
    "core NaN": (NonFiniteError, f"'E_i/{SITE}'", tensor(f"E_i/{SITE}", first_entry(float("nan")))),
    "basis of other rows": (TensorShapeError, f"'L/{SITE}': expected 12", tensor(f"L/{SITE}", lambda x: x[:-1])),
    "basis of one dimension": (TensorShapeError, f"'R/{SITE}'", tensor(f"R/{SITE}", lambda x: x[:, 0])),
    "basis of more columns than rows": (
        TensorShapeError,
        "at most 12 directions",
        tensor(f"L/{SITE}", lambda x: torch.cat([x, x, x, x], dim=1)),
    ),
    "basis of fewer columns than cores": (TensorShapeError, f"'E_o/{SITE}'", tensor(f"L/{SITE}", lambda x: x[:, 1:])),
    "basis missing": (TensorShapeError, "'ranks'", tensor(f"R/{SITE}", None)),
    "core of other rows": (TensorShapeError, f"'E_i/{SITE}'", tensor(f"E_i/{SITE}", lambda x: x[1:])),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(lie: str, sample: SpaceFile, tmp_path: Path) -> None:
    kind, sentence, change = LIES[lie]
    (tmp_path / "file").write_bytes(altered(sample, change))
    with pytest.raises(kind) as refused:
        read_space(tmp_path / "file")
    message = str(refused.value)
    assert sentence in message
    assert message.startswith(f"{tmp_path / 'file'}: ")
    assert len(message.splitlines()) == 1
    assert len(message) < 700


def test_the_lies_begin_with_a_true_file(sample: SpaceFile) -> None:
    assert_same(decode_space(altered(sample, lambda h, t: None)), decode_space(encode_space(sample)))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_file_cut_short_is_refused(length: int, sample: SpaceFile) -> None:
    with pytest.raises(HeaderError):
        decode_space(encode_space(sample)[:length])


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (b"\xff" * 64, "at most 1048576"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "cut short"),
        (b"PK\x03\x04" + bytes(100), "allowed"),
    ],
)
def test_a_header_that_cannot_be_is_refused(payload: bytes, sentence: str) -> None:
    with pytest.raises(HeaderError, match=sentence):
        decode_space(payload)


def test_tensors_in_half_precision_are_read(sample: SpaceFile) -> None:
    def halved(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.update({name: t.to(torch.bfloat16) for name, t in tensors.items() if "/" in name})

    assert decode_space(altered(sample, halved)).space.cores.keys() == sample.space.cores.keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"backbone": "a\nb"}, "printable"),
        ({"policy": FilePolicy(0, 0.0)}, "policy cap"),
        ({"policy": FilePolicy(4, float("nan"))}, "NaN"),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(
    change: dict[str, Any], sentence: str, sample: SpaceFile, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        write_space(tmp_path / "file", replace(sample, **change))
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float32_are_not_written(sample: SpaceFile) -> None:
    ledger = {task: replace(own, norms=dict.fromkeys(own.norms, 1e60)) for task, own in sample.ledger.items()}
    with pytest.raises(ConfigError, match="beyond float32"):
        encode_space(replace(sample, ledger=ledger))


def test_more_tasks_than_a_header_holds_are_not_written(sample: SpaceFile) -> None:
    tasks = [f"org/task-{i}" for i in range(4000)]
    many = replace(
        sample,
        space=replace(sample.space, cores={task: {} for task in tasks}),
        ledger=dict.fromkeys(tasks, TaskLedger({}, {}, True)),
        sources=dict.fromkeys(tasks, sample.sources["one"]),
    )
    with pytest.raises(ConfigError, match="split the adapters over several spaces"):
        encode_space(many)


@pytest.mark.parametrize("quotes", [1500, 1700, 1900])
def test_what_is_written_near_the_limit_can_be_read(quotes: int, sample: SpaceFile) -> None:
    tasks = [f"t{i}" for i in range(quotes)]
    many = replace(
        sample,
        space=replace(sample.space, cores={task: {} for task in tasks}),
        ledger=dict.fromkeys(tasks, TaskLedger({}, {}, True)),
        sources=dict.fromkeys(tasks, sample.sources["one"]),
    )
    try:
        payload = encode_space(many)
    except ConfigError:
        return
    assert len(decode_space(payload).sources) == quotes


def test_the_library_reads_the_file_too(sample: SpaceFile, tmp_path: Path) -> None:
    write_space(tmp_path / "file", sample)
    with safe_open(tmp_path / "file", "pt") as file:
        assert set(file.metadata()) == {"fedshare"}
        assert "ranks" in file.keys()  # noqa: SIM118


def test_what_may_be_replaced_by_a_space(sample: SpaceFile, tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert not is_space(path)
    path.write_bytes(b"")
    assert is_space(path)
    write_space(path, sample)
    assert is_space(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert is_space(path)
    path.write_text("my thesis")
    assert not is_space(path)
