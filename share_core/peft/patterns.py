"""Matching module names against the regular expressions of somebody else's config, without backtracking.

PEFT reads the keys of ``rank_pattern`` and ``alpha_pattern`` as ``re.match(rf"(.*\\.)?({pattern})$", module)`` and
takes the first that matches (``peft.utils.other.get_pattern_key``). Python's engine needs exponential time for
expressions such as ``(a+)+b``. Here the parsed expression becomes an automaton whose states are followed all at once
(Thompson, 1968): time is the number of states times the length of the name, and the answer is the same.

Supported is what describes a regular language: characters, classes, groups, alternatives, repeats and anchors.
Lookaround, back references, inline flags and atomic groups are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN = 512
"""Longest accepted pattern, in characters."""
MAX_STATES = 4096
"""Most states of one automaton; ``x{n}`` needs n."""
_SINGLE = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)


def check_pattern(pattern: str) -> None:
    """Accept a pattern that can be matched here.

    Raises:
        ValueError: saying what is wrong with it.
    """
    _compiled(pattern)


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """Return the first pattern that PEFT would say matches a module's dotted name, or None.

    Raises:
        ValueError: if a pattern is none that :func:`check_pattern` accepts.
    """
    return next((pattern for pattern in patterns if _compiled(pattern).matches(module)), None)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> _Plain | _Automaton:
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, at most {MAX_PATTERN} are allowed")
    try:
        nodes = _parser.parse(pattern)
        if nodes.state.flags & ~re.UNICODE.value:
            raise ValueError("it sets flags, which PEFT does not accept inside a pattern")
        return _plain(list(nodes)) or _automaton(nodes)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    except (RecursionError, OverflowError):
        raise ValueError("its groups are nested too deeply or its counts are too large") from None


@dataclass(frozen=True)
class _Plain:
    """A pattern of characters alone, as most are: compared from the end."""

    characters: tuple[str | None, ...]
    """None for any one."""
    anchored: bool
    """Whether it began with ``^``."""

    def matches(self, module: str) -> bool:
        begin = len(module) - len(self.characters)
        if begin < 0 or (begin > 0 and (self.anchored or module[begin - 1] != ".")):
            return False
        return all(p is None or p == c for p, c in zip(self.characters, module[begin:], strict=True))


def _plain(nodes: list[Any]) -> _Plain | None:
    anchored = bool(nodes) and nodes[0] == (op.AT, op.AT_BEGINNING)
    rest = nodes[1:] if anchored else nodes
    if any(kind not in (op.LITERAL, op.ANY) for kind, _ in rest):
        return None
    return _Plain(tuple(None if kind is op.ANY else chr(argument) for kind, argument in rest), anchored)


@dataclass
class _State:
    node: Any
    """A single character or an anchor as ``re`` parsed it; None: passes on without reading."""
    following: list[int]


def _automaton(nodes: Any) -> _Automaton:
    literals = [chr(argument) if kind is op.LITERAL else "\n" for kind, argument in nodes]
    automaton = _Automaton("".join(literals).rpartition("\n")[2])
    automaton.start = automaton.sequence(nodes, automaton.add(None, []))
    return automaton


@dataclass
class _Automaton:
    tail: str
    """Characters that every match ends with: most names are ruled out by them."""
    states: list[_State] = field(default_factory=list)
    """State 0 is the end."""
    start: int = 0
    sequences: int = 0
    """How many were added: bounds repeats of nothing, such as ``(){9}``, which need no state."""

    def matches(self, module: str) -> bool:
        """Return whether the expression matches a dotted suffix of a name without line breaks."""
        if not module.endswith(self.tail):
            return False
        current: set[int] = set()
        for position in range(len(module) + 1):
            if position == 0 or module[position - 1] == ".":
                current.add(self.start)
            current = self._closed(current, module, position)
            if position < len(module):
                current = {
                    after
                    for index in current
                    if (node := self.states[index].node) is not None
                    and node[0] is not op.AT
                    and _accepts(node[0], node[1], module[position])
                    for after in self.states[index].following
                }
        return 0 in current

    def _closed(self, states: set[int], text: str, position: int) -> set[int]:
        """Return the states with all that can be reached from them without reading a character."""
        seen, waiting = set(states), list(states)
        while waiting:
            state = self.states[waiting.pop()]
            if state.node is None or (state.node[0] is op.AT and _holds(state.node[1], text, position)):
                fresh = [after for after in state.following if after not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
        return seen

    def add(self, node: Any, following: list[int]) -> int:
        """Add a state and return its number."""
        if len(self.states) >= MAX_STATES:
            raise ValueError(f"its repeats need more than {MAX_STATES} states")
        self.states.append(_State(node, following))
        return len(self.states) - 1

    def sequence(self, nodes: Any, target: int) -> int:
        """Add nodes that end in ``target``; return where they begin."""
        self.sequences += 1
        if self.sequences > MAX_STATES:
            raise ValueError(f"its repeats need more than {MAX_STATES} states")
        for kind, argument in reversed(list(nodes)):
            if kind in _SINGLE or kind is op.AT:
                target = self.add((kind, argument), [target])
            elif kind is op.BRANCH:
                target = self.add(None, [self.sequence(branch, target) for branch in argument[1]])
            elif kind is op.SUBPATTERN and not argument[1] and not argument[2]:
                target = self.sequence(argument[3], target)
            elif kind in _REPEATS:
                target = self._repeat(argument, target)
            else:
                raise ValueError("it uses lookaround, back references or flags: write the module names out")
        return target

    def _repeat(self, argument: tuple[int, int, Any], target: int) -> int:
        low, high, body = argument
        if high == op.MAXREPEAT:
            loop = self.add(None, [target])
            self.states[loop].following.append(self.sequence(body, loop))
            entry = loop
        else:
            entry = target
            for _ in range(high - low):
                entry = self.add(None, [self.sequence(body, entry), target])
        for _ in range(low):
            entry = self.sequence(body, entry)
        return entry


def _holds(anchor: Any, text: str, position: int) -> bool:
    if anchor in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return position == 0
    if anchor in (op.AT_END, op.AT_END_STRING):
        return position == len(text)
    before = position > 0 and _is_word(text[position - 1])
    behind = position < len(text) and _is_word(text[position])
    return (before != behind) == (anchor is op.AT_BOUNDARY)


def _accepts(kind: Any, argument: Any, character: str) -> bool:
    if kind is op.ANY:
        return character != "\n"
    if kind is op.IN:
        negated = argument[0][0] is op.NEGATE
        return bool(negated != any(_in_class(k, a, character) for k, a in argument[negated:]))
    return bool((ord(character) == argument) == (kind is op.LITERAL))


def _in_class(kind: Any, argument: Any, character: str) -> bool:
    if kind is op.LITERAL:
        return ord(character) == int(argument)
    if kind is op.RANGE:
        return bool(argument[0] <= ord(character) <= argument[1])
    name = str(argument).removeprefix("CATEGORY_")
    test = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}[name.removeprefix("NOT_")]
    return name.startswith("NOT_") != test(character)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
