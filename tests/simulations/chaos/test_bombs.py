"""Bombs, each thrown once, without holding the clock of a busy machine against the hub; and hubs they go off in."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from share_core.errors import ConfigError
from share_server.local import LocalHub
from share_simulations.chaos import bare
from share_simulations.chaos.bombs import (
    BOMBS,
    MOST_MIB,
    MOST_MS,
    BombOptions,
    Throw,
    catch,
    compressed_zeros,
    problems_of,
    run_bombs,
)
from share_simulations.chaos.bombs_planted import BUGS
from share_simulations.chaos.load import toy_space
from share_simulations.chaos.show import Meter

ONCE = BombOptions(throws=1, warm_up=0, timed=False)


def test_every_bomb_is_refused_and_the_hub_serves_after_it() -> None:
    report = run_bombs(ONCE)
    assert report["problems"] == []
    assert report["ok"]
    assert report["bombs"] == report["refused"] == report["serving_after"] == len(BOMBS) >= 20


@pytest.mark.parametrize(
    ("bug", "sign"),
    [
        ("no_rank_limit", "got accepted"),
        ("falls_over", "does not serve"),
        ("unbounded_requests", f"at most {MOST_MIB:g} are allowed"),
    ],
)
def test_a_hub_it_goes_off_in_is_noticed(bug: str, sign: str) -> None:
    with Meter("test") as meter:
        problems = catch(ONCE, bug, meter)
    assert any(sign in problem for problem in problems), problems
    assert set(BUGS[bug].bombs) <= set(BOMBS)


def test_time_and_memory_count_only_where_they_are_asked_for() -> None:
    slow = Throw("TensorShapeError", ms=MOST_MS + 1, growth_mib=MOST_MIB + 1)
    assert not list(problems_of("shape by zero", slow, ONCE))
    told = list(problems_of("shape by zero", slow, BombOptions()))
    assert ["refused after 101 ms" in told[0], "grew by 17.0 MiB" in told[1]] == [True, True]
    fine = Throw("TensorShapeError", ms=MOST_MS, growth_mib=MOST_MIB)
    assert not list(problems_of("shape by zero", fine, BombOptions()))


def test_a_bomb_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no bomb nuclear"):
        run_bombs(BombOptions(only=("nuclear",)))


def test_what_is_compressed_is_20_mib_for_whoever_inflates_it() -> None:
    flag, length, data = compressed_zeros()[0], compressed_zeros()[1:5], compressed_zeros()[5:]
    assert (flag, int.from_bytes(length)) == (1, len(data))
    assert len(gzip.decompress(data)) == 20 * 2**20


@pytest.mark.parametrize(("inflates", "answer"), [(False, "UNIMPLEMENTED"), (True, "OK")])
def test_a_bare_call_is_one_that_a_hub_understands(inflates: bool, answer: str, tmp_path: Path) -> None:
    """Planted bug: a hub that inflates what it is sent takes the same small request."""
    script = tmp_path / "hub.py"
    script.write_text(
        "import sys\nfrom share_server.hub import options\n"
        f"algorithms = {7 if inflates else 1}\n"
        "for place, (key, _) in enumerate(options.HUB_OPTIONS):\n"
        "    if key == 'grpc.compression_enabled_algorithms_bitset':\n"
        "        options.HUB_OPTIONS[place] = (key, algorithms)\n"
        "from share_server.hub import __main__\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    server = LocalHub(tmp_path / "server", toy_space(), script=script)
    try:
        server.start()
        holder = server.enrol("acme/bare")
        authority, address = server.layout.ca_cert.read_bytes(), server.config.local_hub_address
        for compress, expected in ((False, "OK"), (True, answer)):
            message = bare.framed(b"", compress)
            found = bare.call(address, authority, holder, "/share_proto.v1.Hub/DescribeSpace", message, 20.0)
            assert found.status == expected
    finally:
        if server.running:
            server.kill()
