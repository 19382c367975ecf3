# SPDX-License-Identifier: Apache-2.0
"""Trouble on a link, by script: a TCP proxy in a thread that delays, cuts anywhere, or swallows everything."""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from typing import final

_PIECE_BYTES = 1 << 16
_LINGER_NOT = b"\1\0\0\0\0\0\0\0"
"""For SO_LINGER: closing drops what has not been sent, and the other side gets a reset."""


@final
class FaultProxy:
    """Stands between callers and one TCP address, at an `address` of its own.

    Connection number i is cut when `cuts[i]` bytes have passed in it, both ways together; later ones are left alone.
    Each piece is passed on `delay_seconds` after it came, and is `piece_bytes` long at most.
    """

    def __init__(
        self,
        target: tuple[str, int],
        cuts: Iterable[int] = (),
        *,
        delay_seconds: float = 0.0,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        self._target, self._cuts = target, iter(cuts)
        self._delay_seconds, self._piece_bytes = delay_seconds, piece_bytes
        self.swallows = False
        """Whether what is said is taken and passed on to nobody."""
        self.heard: list[bytearray] = []
        """What the caller of each connection has said."""
        self.cut = 0
        """How many connections have been cut."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="distbelief-fault-proxy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and every connection."""
        self._closing = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(0.05):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd in self._selector.get_map():  # it may have been cut in this round
                    key.data.pass_on(key.fileobj)

    def _accept(self) -> None:
        caller, _ = self._listener.accept()
        heard = bytearray()
        self.heard.append(heard)
        pair = _Pair(self, caller, socket.create_connection(self._target), heard, next(self._cuts, None))
        for link in (pair.caller, pair.callee):
            self._selector.register(link, selectors.EVENT_READ, pair)

    def end(self, *links: socket.socket, reset: bool) -> None:
        """Close sockets: with a reset, or in peace."""
        self.cut += reset
        for link in links:
            self._selector.unregister(link)
            if reset:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            link.close()

    def pause(self) -> None:
        """Before a piece is passed on."""
        if self._delay_seconds:
            time.sleep(self._delay_seconds)

    @property
    def piece_bytes(self) -> int:
        """How much is taken at a time."""
        return self._piece_bytes


@final
class _Pair:
    """One connection through the proxy."""

    def __init__(
        self, proxy: FaultProxy, caller: socket.socket, callee: socket.socket, heard: bytearray, left: int | None
    ) -> None:
        self._proxy, self.caller, self.callee, self._heard, self._left = proxy, caller, callee, heard, left

    def pass_on(self, source: socket.socket) -> None:
        """Take a piece from one side to the other."""
        try:
            piece = source.recv(self._proxy.piece_bytes)
        except OSError:
            piece = b""
        if self._proxy.swallows and piece:
            return
        if source is self.caller:
            self._heard += piece
        whole = piece if self._left is None else piece[: self._left]
        with contextlib.suppress(OSError):
            self._proxy.pause()
            (self.callee if source is self.caller else self.caller).sendall(whole)
        if self._left is not None:
            self._left -= len(whole)
        if not piece or self._left == 0:
            self._proxy.end(self.caller, self.callee, reset=bool(piece))
