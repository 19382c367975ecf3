# SPDX-License-Identifier: Apache-2.0
"""TLS 1.3 between hosts: one self-signed certificate a job, which both sides hold and both sides ask for.

The proof of the job's key (authenticate.py) is asked for all the same, inside of the encrypted connection.
"""

import datetime
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, final

from distbelief.errors import AuthenticationError, ConfigurationError, PeerLost

VALID_DAYS = 3650
_RECORD_BYTES = 1 << 18


@final
@dataclass(frozen=True)
class Certificate:
    """A job's certificate with its private key, in PEM."""

    public: bytes
    private: bytes = field(repr=False)


def new_certificate() -> Certificate:
    """A fresh certificate for one job. Raises ConfigurationError when the package for it is missing."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigurationError(
            "TLS needs the package cryptography, which is not installed", hint="pip install 'distbelief[ray]'"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "distbelief")])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))  # the hosts' clocks differ
        .not_valid_after(today + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Certificate(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )  # fmt: skip


@cache
def _context(certificate: Certificate, accepting: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepting else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # roles move between hosts; who holds the job's certificate is of the job
    context.verify_mode = ssl.CERT_REQUIRED
    if accepting:
        context.num_tickets = 0  # no session is resumed
    context.load_verify_locations(cadata=certificate.public.decode())
    descriptor = os.memfd_create("distbelief-certificate", os.MFD_CLOEXEC)  # the library takes the key from files only
    try:
        os.write(descriptor, certificate.private + certificate.public)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


@final
class SecureLink:
    """A connected TCP socket under TLS, with those methods of a socket that connections use.

    It takes the socket over; raises PeerLost when that is connected no more. It never waits: what would wait raises
    BlockingIOError, as a socket does. `shake` comes first, until it is over.
    """

    def __init__(self, link: socket.socket, certificate: Certificate, *, accepting: bool) -> None:
        context = _context(certificate, accepting)
        try:
            link.getpeername()  # of a socket that is connected no more, ssl would keep the descriptor for a while
            self._link = context.wrap_socket(link, server_side=accepting, do_handshake_on_connect=False)
        except OSError as error:
            raise PeerLost(f"the peer is gone: {error}") from error

    def shake(self) -> bool:
        """Go on with the handshake; whether it is over. Raises AuthenticationError, PeerLost."""
        try:
            self._link.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except (ssl.SSLEOFError, ConnectionError) as error:
            raise PeerLost(f"the peer is gone: {error}") from error
        except OSError as error:
            raise AuthenticationError(f"the other side does not hold the job's certificate: {error}") from error
        return True

    @property
    def pending(self) -> bool:
        """Whether something has been decrypted that the kernel does not know of any more."""
        return self._link.pending() > 0

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        """Send some bytes of the first part: as much as fits into one record, or as the socket takes."""
        return self.send(parts[0])

    def send(self, data: Any) -> int:
        """Send some bytes."""
        try:
            # What the library could not send must be offered to it again as it was, perhaps with more behind it.
            return self._link.send(memoryview(data)[:_RECORD_BYTES])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def recv(self, limit: int) -> bytes:
        """Take some bytes; none at the end."""
        try:
            return self._link.recv(limit)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def recv_into(self, buffer: memoryview) -> int:
        """Take some bytes into a buffer; 0 at the end."""
        try:
            return self._link.recv_into(buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def getsockopt(self, level: int, option: int, length: int) -> bytes:
        """As a socket's."""
        return self._link.getsockopt(level, option, length)

    def fileno(self) -> int:
        """As a socket's."""
        return self._link.fileno()

    def close(self) -> None:
        """As a socket's."""
        self._link.close()
