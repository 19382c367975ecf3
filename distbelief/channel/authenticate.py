# SPDX-License-Identifier: Apache-2.0
"""Both sides of a connection prove knowledge of the job's key before anything is parsed.

    accepting -> calling    32 random bytes A
    calling   -> accepting  32 random bytes C, then HMAC-SHA256(key, "calling" A C)
    accepting -> calling    HMAC-SHA256(key, "accepting" C A)

Messages have fixed lengths, so a stranger can make us read 64 bytes and no more. The labels keep one side's proof from
being played back to it as the other's.
"""

import hmac
import secrets

from distbelief.errors import AuthenticationError

NONCE_BYTES = 32
PROOF_BYTES = 32


def new_key() -> bytes:
    """A fresh key for one job."""
    return secrets.token_bytes(32)


def _proof(key: bytes, label: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(key, label + first + second, "sha256")


class AcceptingSide:
    """The accepting side's share of the exchange, without I/O."""

    wanted_bytes = NONCE_BYTES + PROOF_BYTES

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.challenge = secrets.token_bytes(NONCE_BYTES)

    def take(self, message: bytes) -> tuple[bytes, bool]:
        """(what to send back, whether that is all). Raises AuthenticationError for a caller without the key."""
        nonce, proof = message[:NONCE_BYTES], message[NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(self._key, b"calling", self.challenge, nonce)):
            raise AuthenticationError("a caller did not prove knowledge of the job's key; it was refused")
        return _proof(self._key, b"accepting", nonce, self.challenge), True


class CallingSide:
    """The calling side's share of the exchange, without I/O."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self.challenge = b""
        """The other side's, when it has come."""
        self._expected = b""

    @property
    def wanted_bytes(self) -> int:
        """Length of the message that must come next."""
        return PROOF_BYTES if self._expected else NONCE_BYTES

    def take(self, message: bytes) -> tuple[bytes, bool]:
        """(what to send back, whether the exchange is over). Raises AuthenticationError for a peer without the key."""
        if not self._expected:
            self.challenge = message
            self._expected = _proof(self._key, b"accepting", self._nonce, message)
            return self._nonce + _proof(self._key, b"calling", message, self._nonce), False
        if not hmac.compare_digest(message, self._expected):
            raise AuthenticationError("the peer did not prove knowledge of the job's key; nothing was sent to it")
        return b"", True
