"""A sample of the corpus through a real hub: the same names arrive at the other end of the wire, and the hub serves."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
import torch

from share_core.fingerprint import describe_space
from share_server.local import LocalHub, submit_header, submit_messages
from share_server.operator import named_error
from share_simulations.fuzz import hostile

HERE = Path(__file__).parent
EXPECTED: dict[str, list[str]] = json.loads((HERE / "expected.json").read_text())
EVERY = 9


def test_lies_are_refused_by_name_over_the_wire(tmp_path: Path) -> None:
    weights = {name: torch.zeros(shape) for name, shape in hostile.SITES.items()}
    hub = LocalHub(tmp_path / "server", describe_space("attacks", weights, rank_limit=hostile.RANK_LIMIT))
    hub.start()
    lies = [name for name, (error, _) in EXPECTED.items() if error and name != "length-empty-file"]
    refused = 0
    with hub.hub(hub.enrol("acme/alice")) as stub:

        def send(payload: bytes) -> None:
            stub.Submit(submit_messages(submit_header(hub.spec, "acme/t", payload), payload), timeout=60)

        for name in lies[::EVERY]:
            with pytest.raises(grpc.RpcError) as caught:
                send((HERE / "files" / f"{name}.safetensors").read_bytes())
            error = named_error(caught.value, "hub")
            assert (type(error).__name__, EXPECTED[name][1] in str(error)) == (EXPECTED[name][0], True), (name, error)
            refused += 1
        assert refused >= 30
        header, data = hostile.honest({"B/v": [8, 3], "A/v": [3, 14]})
        header["__metadata__"]["fedshare"] = json.dumps({**hostile.INNER, "base_version": 0})
        send(hostile.pack(header, data))
    assert hub.stop() == 0
