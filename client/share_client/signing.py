"""Signing what is submitted, under numbers that are never used twice.

``identity/sequence.json`` holds the last number that was used. A number is durable there before it is signed, and the
signature is durable beside its update before the first byte is sent: a crash in between loses a number, and nothing
else. Two updates under one number would be two statements of which the hub can only take one.

A directory that was restored from an older copy counts on from an old number. The hub refuses numbers that it knows, so
the count is moved ahead by twice as much each time until it is past all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from share_client.durable import to_json
from share_client.member import Credentials
from share_client.uploading import Submission
from share_core.durable import write_atomic
from share_core.errors import ConfigError
from share_core.identity import identity_of, public_key_pem, sign_update, statement_of


def sign_submission(submission: Submission, credentials: Credentials, sequence: int) -> Submission:
    """Return ``submission`` signed with the key of a certificate, as number ``sequence``."""
    numbered = replace(submission, sequence=sequence)
    statement = statement_of(numbered.header(), identity_of(credentials.certificate).member)
    signature = sign_update(credentials.key, statement)
    return replace(numbered, signer=_key_digest(credentials), signature=signature.hex())


class SubmissionSigner:
    """Signs under the next number of a client directory. One process at a time; the session's lock sees to it."""

    def __init__(
        self, path: Path, credentials: Callable[[], Credentials], step: Callable[[str], None] = lambda name: None
    ) -> None:
        """Count in ``path``.

        Args:
            path: where the last number lies.
            credentials: returns what the connection to the hub is made with now: the key that the hub checks with.
            step: called with the name of each durable step before it is taken; the seam where tests end the process.
        """
        self._path = path
        self._credentials = credentials
        self._step = step

    def has_signed(self, submission: Submission) -> bool:
        """Whether ``submission`` bears a signature of the key that is in use now."""
        return bool(submission.signature) and submission.signer == _key_digest(self._credentials())

    def sign(self, submission: Submission) -> Submission:
        """Return ``submission`` signed under a number that was never used.

        Raises:
            ConfigError: the file with the last number cannot be read.
        """
        return sign_submission(submission, self._credentials(), self.move(1))

    def move(self, by: int) -> int:
        """Make the last number larger by ``by`` and return it; it is durable."""
        number = self._last() + by
        self._step("write sequence")
        write_atomic(self._path, to_json({"last": number}))
        self._step("sequence done")
        return number

    def _last(self) -> int:
        try:
            last = json.loads(self._path.read_bytes())["last"]
            if type(last) is int and last >= 0:
                return last
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            last = error
        raise ConfigError(
            f"{self._path} does not hold the number of what was signed last ({last}): remove it; the numbers that were "
            "used are found again by asking the hub"
        )


def _key_digest(credentials: Credentials) -> str:
    """Return the name by which the hub remembers a key."""
    return hashlib.sha256(public_key_pem(credentials.key)).hexdigest()
