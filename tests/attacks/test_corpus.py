"""Every hostile file gets its own named error, every honest edge is read, and no guard of the reader is idle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import safetensors

from share_core import tensorfile, wire
from share_core.errors import HeaderError, PayloadError
from share_core.types import SiteSpec, SpaceSpec
from share_simulations.fuzz import hostile
from share_simulations.fuzz.planted import GUARDS, Guard, without

HERE = Path(__file__).parent
TABLE = HERE / "expected.json"
EXPECTED: dict[str, list[str]] = json.loads(TABLE.read_text())
SPEC = SpaceSpec(
    "sha256:attacks",
    "attacks",
    {name: SiteSpec(name, shape[0], shape[1], "0" * 64) for name, shape in hostile.SITES.items()},
    rank_limit=hostile.RANK_LIMIT,
)
LONGEST_SENTENCE = 600


def outcome(module: ModuleType, data: bytes) -> tuple[str, str]:
    """Return (class, sentence) of the refusal; empty if the file is accepted; whatever else happens by its name too."""
    try:
        module.examine_update(data, SPEC)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def as_expected(got: tuple[str, str], error: str, words: str) -> bool:
    return got[0] == error and words in got[1] and len(got[1]) < LONGEST_SENTENCE


FILES = {name: (HERE / "files" / f"{name}.safetensors").read_bytes() for name in EXPECTED}
FILES |= {case.name: case.data for case in hostile.large()}
EXPECTED |= {case.name: [case.error, case.words] for case in hostile.large()}


def surprises(module: ModuleType) -> Iterator[str]:
    """Yield what the corpus holds against a reader."""
    for name, (error, words) in EXPECTED.items():
        got = outcome(module, FILES[name])
        if not as_expected(got, error, words):
            yield (f"{name}: expected {error or 'acceptance'} ({words!r}), got {got[0] or 'acceptance'}: {got[1]}")


def test_the_files_are_what_the_script_makes() -> None:
    cases = {case.name: case for case in hostile.corpus()}
    assert {path.stem for path in (HERE / "files").iterdir()} == set(cases)
    assert {name: [case.error, case.words] for name, case in cases.items()} == json.loads(TABLE.read_text())
    different = [name for name, case in cases.items() if FILES[name] != case.data]
    assert not different, "run tests/attacks/make.py"
    assert sum(1 for error, _ in EXPECTED.values() if error) >= 150


def test_every_lie_gets_its_named_error_and_every_honest_edge_is_read() -> None:
    assert list(surprises(wire)) == []


def test_both_readers_say_the_same() -> None:
    for name, data in FILES.items():
        try:
            wire.decode_update(data, SPEC)
        except PayloadError as error:
            assert (type(error).__name__, str(error)) == outcome(wire, data), name
        else:
            assert outcome(wire, data) == ("", ""), name


def test_what_is_accepted_the_library_accepts() -> None:
    accepted = [name for name, (error, _) in EXPECTED.items() if not error]
    assert len(accepted) >= 15
    for name in accepted:
        known = safetensors.deserialize(FILES[name])  # type: ignore[no-untyped-call]
        file = tensorfile.read_tensors(FILES[name])
        assert {tensor for tensor, _ in known} == set(file.tensors)


def test_large_lies_get_theirs() -> None:
    for case in hostile.huge():
        assert as_expected(outcome(wire, case.data), case.error, case.words), (case.name, outcome(wire, case.data))


def crowd(count: int) -> bytes:
    """Return a file of ``count`` tensors of one value each."""
    entries = (b'"%x":{"dtype":"F16","shape":[1],"data_offsets":[%d,%d]}' % (n, 2 * n, 2 * n + 2) for n in range(count))
    return bytes(hostile.pack(b"{" + b",".join(entries) + b"}", bytes(2 * count)))


GUARD_OF_CROWDS = "number of tensors"


@pytest.mark.parametrize("name", sorted(set(GUARDS) - {GUARD_OF_CROWDS}))
def test_a_missing_guard_is_noticed(name: str) -> None:
    with without(GUARDS[name]) as modules:
        assert next(surprises(modules["share_core.wire"]), None)


def test_the_number_of_tensors_is_bounded_where_the_header_is_not() -> None:
    many = crowd(tensorfile.MAX_TENSORS + 1)
    with pytest.raises(HeaderError, match=f"{tensorfile.MAX_TENSORS + 1} tensors announced"):
        tensorfile.read_shapes(many)
    with without(GUARDS[GUARD_OF_CROWDS]) as modules:
        assert len(modules["share_core.tensorfile"].tensor_sizes(many)) == tensorfile.MAX_TENSORS + 1


def test_a_reader_made_anew_with_all_its_guards_is_as_good_and_the_real_one_is_back_afterwards() -> None:
    before = wire.examine_update
    with without(None) as modules:
        assert modules["share_core.wire"] is not wire
        assert list(surprises(modules["share_core.wire"])) == []
    assert wire.examine_update is before
    from share_core import wire as again

    assert again is wire


def test_a_guard_that_was_rewritten_is_told() -> None:
    with pytest.raises(Exception, match="does not fit it any more"), without(Guard("share_core.wire", "no such", "")):
        pass
