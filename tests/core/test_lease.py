"""A lease and its report survive the road as scalars, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from share_core.errors import RequestError
from share_core.lease import Lease, LeaseReport, lease_from_record, report_from_record

LEASE = Lease("0" * 32, 2**64 - 1, "sha256:ab", "localhost:7443", 1_800_000_000_000, 3)
REPORT = LeaseReport("0" * 32, 2, True, "nothing left")


def test_round_trip() -> None:
    assert lease_from_record(LEASE.to_record()) == LEASE
    assert report_from_record(REPORT.to_record()) == REPORT


@pytest.mark.parametrize("name", sorted(LEASE.to_record()))
@pytest.mark.parametrize("value", [None, b"bytes", 1.5, -1])
def test_each_scalar_is_checked(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        lease_from_record({**LEASE.to_record(), name: value})


@pytest.mark.parametrize("name", ["node_id", "deadline_unix_ms", "max_updates"])
def test_empty_text_is_no_number(name: str) -> None:
    with pytest.raises(RequestError, match=name):
        lease_from_record({**LEASE.to_record(), name: ""})


@pytest.mark.parametrize("name", sorted(REPORT.to_record()))
def test_each_scalar_of_a_report_is_checked(name: str) -> None:
    with pytest.raises(RequestError, match=name):
        report_from_record({key: value for key, value in REPORT.to_record().items() if key != name})
