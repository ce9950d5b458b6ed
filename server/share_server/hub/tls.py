"""The listeners' certificate, changed without a restart.

gRPC asks for key and certificate at every handshake. What it gets is the newest pair on the disk that can be used; a
pair that cannot (torn, another key, not of our authority, not valid now) is refused once with a log line and an alarm,
and the old pair stays in force. Connections that are open keep what they were opened with.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from share_core.errors import CertificateError, ConfigError
from share_core.identity import check_validity, not_after, public_key_pem, public_key_pem_of_certificate
from share_server.hub import log

Stamp = tuple[tuple[int, int, int], ...]
"""Inode, size and time of change of each file: equal as long as nobody has replaced them. Empty: not there."""


@dataclass(frozen=True)
class Pair:
    """A listener's key and certificate, PEM."""

    key: bytes
    """Private key."""
    certificate: bytes
    """Certificate for it."""


class PairFile:
    """Key and certificate as two files that somebody may replace at any time. Safe to use from every thread."""

    def __init__(
        self,
        key: Path,
        certificate: Path,
        authority: bytes,
        alarm: Callable[[bool], None] = lambda on: None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the files; ``authority`` is the certificate, PEM, that must have issued what is in them.

        ``alarm`` is told True when new files cannot be used, and False when they can again.

        Raises:
            ConfigError, CertificateError: they cannot be used now.
        """
        self._key = key
        self._certificate = certificate
        self._authority = authority
        self._alarm = alarm
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._pair = self._read()

    @property
    def expires(self) -> datetime:
        """End of life of the certificate in force, UTC."""
        return not_after(self._pair.certificate)

    def current(self) -> Pair:
        """Return the pair in force, after a look at the files."""
        with self._lock:
            self._look()
            return self._pair

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp  # also when the files cannot be used: told once, not at every handshake
        try:
            self._pair = self._read()
        except (ConfigError, CertificateError) as error:
            self._alarm(True)
            log.warning("certificate not taken over", file=self._certificate.name, reason=str(error))
        else:
            self._alarm(False)
            log.info("certificate taken over", file=self._certificate.name, expires=f"{self.expires:%Y-%m-%dT%H:%MZ}")

    def _stamp(self) -> Stamp:
        try:
            found = [path.stat() for path in (self._key, self._certificate)]
        except OSError:
            return ()
        return tuple((entry.st_ino, entry.st_size, entry.st_mtime_ns) for entry in found)

    def _read(self) -> Pair:
        try:
            pair = Pair(self._key.read_bytes(), self._certificate.read_bytes())
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error
        if public_key_pem(pair.key) != public_key_pem_of_certificate(pair.certificate):
            raise CertificateError("the certificate is for another key than the one in the key file")
        try:
            issued = x509.load_pem_x509_certificate(pair.certificate)
            issued.verify_directly_issued_by(x509.load_pem_x509_certificate(self._authority))
        except (ValueError, TypeError, InvalidSignature) as error:
            raise CertificateError("the certificate is not one of this federation's authority") from error
        check_validity(pair.certificate, self._clock())
        return pair


def server_credentials(pair: PairFile, authority: bytes | None) -> grpc.ServerCredentials:
    """Return credentials that follow ``pair``; with ``authority`` (PEM) every caller must show one of its certificates.

    The authority itself does not change in the life of a process.
    """
    given = pair.current()
    lock = threading.Lock()

    def configuration(one: Pair) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(one.key, one.certificate)], authority)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Return a configuration if the pair has changed. Called by gRPC at each handshake, on its own threads."""
        nonlocal given
        now = pair.current()
        with lock:
            if now == given:
                return None
            given = now
        return configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        configuration(given),
        fetch,  # type: ignore[arg-type]  # None is allowed: nothing has changed
        require_client_authentication=authority is not None,
    )


async def keep_renewed(
    renew: Callable[[], list[str]], pair: PairFile, every_s: float, wanted: asyncio.Event | None = None
) -> None:
    """Call ``renew`` (which returns the names it made) every ``every_s`` seconds, and when ``wanted`` is set.

    It never ends by itself: a failure is logged and tried again, since the old certificate still has a third of its
    life when it becomes due.
    """
    wanted = wanted or asyncio.Event()
    while True:
        try:
            if made := await asyncio.to_thread(renew):
                log.info("certificates renewed", names=made)
            await asyncio.to_thread(pair.current)
        except Exception as error:
            log.failure("certificates not renewed", error)
        try:
            async with asyncio.timeout(every_s):
                await wanted.wait()
        except TimeoutError:
            continue
        wanted.clear()
