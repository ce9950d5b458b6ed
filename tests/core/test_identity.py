from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given, settings
from hypothesis import strategies as st

from share_core import identity as ids
from share_core.errors import CertificateError, ConfigError, TokenError
from share_core.identity import token as token_module

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
AUTHORITY, AUTHORITY_KEY = ids.make_authority("test authority", NOW)
ALICE = ids.Identity("trainer", "acme", "alice")


def _member(identity: ids.Identity = ALICE, days: float = 30) -> bytes:
    csr = ids.make_csr(ids.new_private_key_pem())
    return ids.sign_csr(AUTHORITY, AUTHORITY_KEY, csr, identity, NOW, days)


def _token(expires: datetime = NOW + timedelta(hours=1), key: bytes = b"k" * 32) -> str:
    return ids.token_encode(key, "hub.example:7444", "ab" * 32, ALICE, expires, "0f" * 16)


def test_certificate_names_the_identity_and_verifies_strictly() -> None:
    certificate = _member()
    assert ids.identity_of(certificate) == ALICE
    assert ids.identity_of(ids.certificate_to_der(certificate)) == ALICE
    store = Store([x509.load_pem_x509_certificate(AUTHORITY)])
    verifier = PolicyBuilder().store(store).time(NOW).build_client_verifier()
    assert verifier.verify(x509.load_pem_x509_certificate(certificate), [])


def test_another_authority_does_not_verify() -> None:
    stranger, _ = ids.make_authority("test authority", NOW)
    store = Store([x509.load_pem_x509_certificate(stranger)])
    verifier = PolicyBuilder().store(store).time(NOW).build_client_verifier()
    with pytest.raises(x509.verification.VerificationError):
        verifier.verify(x509.load_pem_x509_certificate(_member()), [])


def test_subject_and_extensions_of_the_request_are_ignored() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    wish = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("share://operator/server/root")])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name.from_rfc4514_string("CN=root,O=server"))
        .add_extension(wish, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    certificate = ids.sign_csr(AUTHORITY, AUTHORITY_KEY, request, ALICE, NOW, 1)
    assert ids.identity_of(certificate) == ALICE
    assert b"root" not in ids.certificate_to_der(certificate)


def test_request_without_proof_of_possession_is_refused() -> None:
    request = x509.load_pem_x509_csr(ids.make_csr(ids.new_private_key_pem()))
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = (
        b"-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.encodebytes(bytes(der))
        + b"-----END CERTIFICATE REQUEST-----\n"
    )
    with pytest.raises(CertificateError, match="proof of possession"):
        ids.sign_csr(AUTHORITY, AUTHORITY_KEY, forged, ALICE, NOW, 1)


@pytest.mark.parametrize("kind", ["rsa", "ed25519", "p384", "rubbish"])
def test_other_keys_are_refused(kind: str) -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    pem = serialization.Encoding.PEM
    requests: dict[str, Callable[[], bytes]] = {
        "rsa": lambda: builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256()).public_bytes(pem),
        "ed25519": lambda: builder.sign(ed25519.Ed25519PrivateKey.generate(), None).public_bytes(pem),
        "p384": lambda: builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()).public_bytes(pem),
        "rubbish": lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    }
    with pytest.raises(CertificateError):
        ids.sign_csr(AUTHORITY, AUTHORITY_KEY, requests[kind](), ALICE, NOW, 1)


def test_listener_certificate_cannot_call() -> None:
    csr = ids.make_csr(ids.new_private_key_pem())
    hub = ids.Identity("hub", "server", "hub")
    certificate = ids.sign_csr(AUTHORITY, AUTHORITY_KEY, csr, hub, NOW, 1, ["localhost", "127.0.0.1", "::1"])
    with pytest.raises(CertificateError, match="client authentication"):
        ids.identity_of(certificate)
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert [str(a) for a in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost"]


def test_authority_is_no_caller() -> None:
    with pytest.raises(CertificateError):
        ids.identity_of(AUTHORITY)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["share://trainer/acme/alice", "share://operator/server/root"],
        ["share://trainer/acme/alice", "spiffe://x/y"],
        ["spiffe://trainer/acme/alice"],
        ["share://trainer/acme"],
        ["share://trainer/acme/alice/"],
        ["share://trainer/acme/../x"],
        ["share://emperor/acme/alice"],
        ["share://trainer/Acme/alice"],
        ["SHARE://trainer/acme/alice"],
        ["share://trainer/acme/alice?x=1"],
    ],
)
def test_identity_needs_exactly_one_proper_name(uris: list[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    authority_key = serialization.load_pem_private_key(AUTHORITY_KEY, None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    names: list[x509.GeneralName] = [x509.DNSName("x.example")]
    names += [x509.UniformResourceIdentifier(uri) for uri in uris]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.load_pem_x509_certificate(AUTHORITY).subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    with pytest.raises(CertificateError):
        ids.identity_of(certificate.public_bytes(serialization.Encoding.PEM))


def test_validity_is_checked_against_the_given_clock() -> None:
    certificate = _member(days=2)
    ids.check_validity(certificate, NOW)
    with pytest.raises(CertificateError, match="expired"):
        ids.check_validity(certificate, NOW + timedelta(days=3))
    with pytest.raises(CertificateError, match="not valid before"):
        ids.check_validity(certificate, NOW - timedelta(hours=1))
    assert ids.not_after(certificate) == NOW + timedelta(days=2)


@pytest.mark.parametrize("data", [b"", b"-----BEGIN CERTIFICATE-----\nAA\n", b"\x30\x82"])
def test_unreadable_certificates_have_a_named_error(data: bytes) -> None:
    with pytest.raises(CertificateError):
        ids.identity_of(data)


def test_public_key_of_key_and_certificate_agree() -> None:
    key = ids.new_private_key_pem()
    certificate = ids.sign_csr(AUTHORITY, AUTHORITY_KEY, ids.make_csr(key), ALICE, NOW, 1)
    assert ids.public_key_pem(key) == ids.public_key_pem_of_certificate(certificate)


def test_token_says_what_was_put_in_and_fits_one_line() -> None:
    text = _token()
    assert "\n" not in text
    assert text.startswith(ids.TOKEN_PREFIX)
    token = ids.check_token(f"  {text}\n", b"k" * 32, NOW)
    assert token.identity == ALICE
    assert (token.address, token.ca_sha256) == ("hub.example:7444", "ab" * 32)


def test_token_expires() -> None:
    with pytest.raises(TokenError, match="expired"):
        ids.check_token(_token(expires=NOW - timedelta(seconds=2)), b"k" * 32, NOW)


def test_token_of_another_server_is_refused() -> None:
    with pytest.raises(TokenError, match="not made by this server"):
        ids.check_token(_token(key=b"x" * 32), b"k" * 32, NOW)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "operator"),
        ("organisation", "rival"),
        ("name", "bob"),
        ("address", "evil.example:1"),
        ("ca", "cd" * 32),
        ("expires", 4102444800),
        ("nonce", "1f" * 16),
    ],
)
def test_no_field_can_be_changed(field: str, value: object) -> None:
    body = _token()[len(ids.TOKEN_PREFIX) :]
    fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert fields[field] != value
    fields[field] = value
    forged = ids.TOKEN_PREFIX + base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")
    assert ids.token_decode(forged) is not None
    with pytest.raises(TokenError, match="not made by this server"):
        ids.check_token(forged, b"k" * 32, NOW)


@pytest.mark.parametrize(
    "text",
    ["", "fs1.", "fs2.AAAA", "fs1.!!!!", "fs1." + "A" * 3000, "fs1.e30", "fs1.W10", "fs1.MQ", "hello"],
)
def test_damaged_tokens_have_a_named_error(text: str) -> None:
    with pytest.raises(TokenError):
        ids.token_decode(text)


def _changed(**changes: object) -> str:
    body = _token()[len(ids.TOKEN_PREFIX) :]
    fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))) | changes
    return ids.TOKEN_PREFIX + base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "changes",
    [{"mac": "é" * 64}, {"mac": ""}, {"mac": "AB" * 32}, {"expires": -(10**300)}, {"expires": 10**12}, {"nonce": ""}],
)
def test_fields_that_no_token_has_are_damage(changes: dict[str, object]) -> None:
    with pytest.raises(TokenError, match="damaged"):
        ids.check_token(_changed(**changes), b"k" * 32, NOW)


@pytest.mark.parametrize("key", [b"", b"k" * 16, b"k" * 31, b"k" * 33])
def test_tokens_are_made_and_taken_under_256_bits_only(key: bytes) -> None:
    with pytest.raises(ConfigError, match="expected 32"):
        _token(key=key)
    with pytest.raises(ConfigError, match="expected 32"):
        ids.check_token(_token(), key, NOW)


def _compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a forged token is compared, whole, by the function that takes as long for every difference."""
    seen: list[tuple[str, str]] = []

    def compared(one: str, other: str) -> bool:
        seen.append((one, other))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compared)
    with pytest.raises(TokenError):
        ids.check_token(_changed(mac="0" * 64), b"k" * 32, NOW)
    return [told for _, told in seen] == ["0" * 64]


def test_the_mac_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _compared_in_constant_time(monkeypatch)


def test_a_comparison_that_stops_at_the_first_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(text: str, key: bytes, now: datetime) -> ids.JoinToken:
        token = ids.token_decode(text)
        if token.mac != token_module._mac(key, token):
            raise TokenError("forged")
        return token

    monkeypatch.setattr(ids, "check_token", careless)
    assert not _compared_in_constant_time(monkeypatch)


@settings(max_examples=20)
@given(days=st.floats(0.01, 400))
def test_a_certificate_is_due_when_half_of_its_life_is_over(days: float) -> None:
    error = ids.renewal_moment(_member(days=days)) - NOW - timedelta(days=days) / 2
    assert abs(error) <= timedelta(seconds=1)  # certificates know whole seconds only


def test_a_certificate_is_issued_again_over_the_same_key_and_name() -> None:
    certificate = _member()
    later = NOW + timedelta(days=20)
    again = ids.reissue(AUTHORITY, AUTHORITY_KEY, ids.certificate_to_der(certificate), later, 30)
    assert ids.identity_of(again) == ALICE
    assert ids.public_key_pem_of_certificate(again) == ids.public_key_pem_of_certificate(certificate)
    assert ids.not_after(again) == later + timedelta(days=30)
    serving = ids.reissue(AUTHORITY, AUTHORITY_KEY, certificate, later, 30, ["relay.example"])
    for none_of_a_caller in (serving, AUTHORITY):
        with pytest.raises(CertificateError):
            ids.reissue(AUTHORITY, AUTHORITY_KEY, none_of_a_caller, later, 30)
