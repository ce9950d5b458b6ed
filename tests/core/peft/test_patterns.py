"""Patterns match what PEFT says they match, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from share_core.peft.patterns import check_pattern, first_match

PARTS = ("layer", "layers", "0", "1", "12", "self", "query", "value", "q", "a", "aa", "b-b", "c_d")
ATOMS = (
    *PARTS,
    r"\.",
    ".",
    r"\d",
    r"\d+",
    r"\D",
    r"\w",
    r"\W",
    r"\s",
    "[0-5]",
    "[^0]",
    "[a-cq]",
    r"[\d.]",
    "^",
    "$",
    r"\b",
)
MODULES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(lambda parts: ".".join(parts)[-16:])
"""Short: Python's engine, which PEFT asks, takes exponential time for some of the patterns below."""
REGEXES = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(("*", "+", "?", "{2}", "{1,3}", "{1,}", "*?", "+?", "??"))).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)
LIKE_MODULES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(".".join)


def theirs(patterns: list[str], module: str) -> str | None:
    key = get_pattern_key(patterns, module)
    return key if key in patterns else None


@settings(max_examples=600, deadline=None)
@given(st.lists(st.one_of(LIKE_MODULES, REGEXES), min_size=1, max_size=4), MODULES)
@example(["query", "self.query"], "layer.0.self.query")
@example(["uery"], "layer.query")
@example([r"^layer\.0"], "layer.0")
@example(["^layer.0"], "x.layer.0")
@example([r"layer\.\d+\.query$"], "enc.layer.12.query")
@example(["layer.0|1"], "layer.1")
@example(["0.query"], "layer.10.query")
@example([""], "layer.")
def test_the_same_as_peft(patterns: list[str], module: str) -> None:
    # PEFT answers with the module's name for "no match", which is ambiguous when a pattern is that very name.
    assume(module not in patterns or any(re.match(rf"(.*\.)?({p})$", module) for p in patterns))
    assert first_match(patterns, module) == theirs(patterns, module)


@settings(max_examples=200, deadline=None)
@given(LIKE_MODULES, st.text("abq.0_", max_size=12))
def test_plain_names_match_like_expressions(pattern: str, module: str) -> None:
    """The short way for plain names gives what the automaton gives."""
    assert (first_match([pattern], module) is None) == (first_match([f"(?:{pattern})"], module) is None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|aa)+b", "(.*)*b", ".*" * 200 + "x", "((a?){30}){30}b", "(a*)*(a*)*(a*)*(a*)*(a*)*b", "(()*)*b"],
)
def test_catastrophic_patterns_take_no_time(pattern: str) -> None:
    begun = time.perf_counter()
    assert first_match([pattern], "a" * 500) is None
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "no regular expression"),
        ("a)|(b", "no regular expression"),
        ("a{3,1}", "no regular expression"),
        ("x" * 513, "at most 512"),
        ("(?i)query", "flags"),
        ("(?i:query)", "flags"),
        ("(?=a)a", "lookaround"),
        ("(?<!a)b", "lookaround"),
        (r"(a)\1", "lookaround, back references"),
        ("(?>a)b", "lookaround"),
        ("a*+b", "lookaround"),
        ("((a?){99}){99}b", "states"),
        ("(((){999}){999}){999}", "states"),
        ("a{0,4000000000}", "states"),
    ],
)
def test_patterns_that_are_refused(pattern: str, says: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=says):
        check_pattern(pattern)
    assert time.perf_counter() - begun < 5
