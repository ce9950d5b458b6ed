"""Telling Flower that our node is gone, in its place.

A SuperNode that was killed stays online for Flower until a minute without heartbeats has passed, and its key is
refused all that time. A signed deactivate call, the same that SuperNode makes when it ends in order, shortens that to
seconds.
"""

from __future__ import annotations

import base64
import ssl
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from share_client.member import ClientLayout
from share_core.errors import ConfigError

_DEADLINE = 10.0


def deactivate(layout: ClientLayout, port: int, authority: Path, node_id: int) -> int:
    """Deactivate our node through the forwarder on ``port``; return the HTTP status, 0 if nobody answered.

    200 means it was online; 401 that gateway or Flower does not know our key; other 4xx that it was offline already.
    """
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest

    context = ssl.create_default_context(cafile=str(authority))
    try:
        with httpx.Client(verify=context, trust_env=False, timeout=_DEADLINE) as client:
            answer = client.post(
                f"https://127.0.0.1:{port}/v1/fleet/deactivate-node",
                content=DeactivateNodeRequest(node_id=node_id).SerializeToString(),
                headers={
                    "content-type": "application/protobuf",
                    "accept": "application/protobuf",
                    **_signed_headers(layout),
                },
            )
    except httpx.TransportError:
        return 0
    return answer.status_code


def _signed_headers(layout: ClientLayout) -> dict[str, str]:
    """Return Flower's three headers of a node: public key, moment, signature of the moment."""
    key = load_ssh_private_key(layout.node_key.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{layout.node_key}: expected an EC key, got {type(key).__name__}; enrol again")
    moment = datetime.now(UTC).isoformat()
    signature = key.sign(moment.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": base64.b64encode(layout.node_public_key.read_bytes()).decode("ascii"),
        "flwr-timestamp": moment,
        "flwr-signature": base64.b64encode(signature).decode("ascii"),
    }
