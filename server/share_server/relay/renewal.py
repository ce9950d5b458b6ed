"""New certificates for a relay before the old ones end. The hub gives them: upstream may be a relay, which cannot."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import grpc

from share_core.durable import PUBLIC, write_atomic
from share_core.errors import CertificateError
from share_core.identity import identity_of, public_key_pem, public_key_pem_of_certificate, renewal_moment
from share_proto.v1 import hub_pb2, hub_pb2_grpc
from share_server.operator import CHANNEL_OPTIONS, ask
from share_server.relay.home import RelayHome, RelayState


def renew_relay(home: RelayHome, state: RelayState, now: datetime) -> list[str]:
    """Replace the certificates of the directory if they are due at ``now``; return the names of the files written.

    Raises:
        FedshareError: the hub does not answer, or refuses. CertificateError: it certified something else.
    """
    if now < min(renewal_moment(path.read_bytes()) for path in (home.caller, home.serving)):
        return []
    key, caller = home.key.read_bytes(), home.caller.read_bytes()
    credentials = grpc.ssl_channel_credentials(home.authority.read_bytes(), key, caller)
    with grpc.secure_channel(state.hub_address, credentials, CHANNEL_OPTIONS) as channel:
        answer = ask(hub_pb2_grpc.HubStub(channel).Renew, hub_pb2.RenewRequest(), state.hub_address)
    if identity_of(answer.certificate_pem) != identity_of(caller):
        raise CertificateError("the hub certified another name than ours: nothing was kept")
    _replace(home.caller, answer.certificate_pem, key)
    if not answer.serving_certificate_pem:
        raise CertificateError(
            "the hub does not know under which names this relay serves, since it enrolled with an older release: "
            "enrol it again with a new token from 'share-server invite ... --role relay'"
        )
    _replace(home.serving, answer.serving_certificate_pem, key)
    return [home.caller.name, home.serving.name]


def _replace(path: Path, certificate: bytes, key: bytes) -> None:
    """Write one certificate; each goes with the key and with the other's older version, so a kill in between is fine.

    Raises:
        CertificateError: it is not for our key.
    """
    if public_key_pem_of_certificate(certificate) != public_key_pem(key):
        raise CertificateError("the hub certified another key than ours: nothing was kept")
    write_atomic(path, certificate, PUBLIC)
