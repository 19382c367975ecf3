# SPDX-License-Identifier: Apache-2.0
"""A second stream to the same peer, for half of each large body.

One stream keeps one core of a host busy: its kernel copies in the thread that sends. Every other piece of a large body
goes by a second connection instead, which a thread of its own serves. That one carries bodies alone, whose place and
length both ends know from the frames on the first, in the order of these frames.
"""

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import torch

from distbelief.channel import links
from distbelief.channel.codec import Part, cut
from distbelief.channel.secure import SecureLink

WIDE_BYTES = 16 << 20
"""A call whose bodies, there and back, are so long or longer uses a second stream."""
PIECE_BYTES = 1 << 20
"""Pieces of a body go by the first stream and by the second in turn; a multiple of what any number takes."""


def deal(body: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """What of a body goes by the first stream, and what by the second."""
    own: list[Part] = []
    beside: list[Part] = []
    for part in body:
        for number, start in enumerate(range(0, len(part), PIECE_BYTES)):
            (beside if number % 2 else own).append(cut(part, start, min(start + PIECE_BYTES, len(part))))
    return own, beside


@final
class SecondStream:
    """The second socket of a connection, which is connected and proved. It takes the socket over.

    `notice` is called, by the thread that serves it, when all that was to be received is there, and when it has broken.
    `permit` as an Endpoint's.
    """

    def __init__(
        self, link: socket.socket | SecureLink, wake: Callable[[], None], notice: Callable[[], None],
        permit: Callable[[], None],
    ) -> None:  # fmt: skip
        self.link, self._wake, self._notice, self._permit = link, wake, notice, permit
        self.error: BaseException | None = None
        """Why it broke."""
        self._outbox: deque[Part] = deque()
        self._inbox: deque[Part] = deque()
        self._lock = threading.Lock()
        """Held while the socket, and memory for it, is used."""
        self._low_water_bytes = 1

    def send(self, parts: Sequence[Part]) -> None:
        """Send this after what is being sent. Its memory must stay untouched until it is answered."""
        if parts:
            self._outbox.extend(parts)
            self._wake()

    def receive(self, parts: Sequence[Part]) -> None:
        """Receive this after what is being received."""
        if parts:
            self._inbox.extend(parts)
            self._wake()

    @property
    def sending(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._outbox)

    @property
    def receiving(self) -> bool:
        """Whether something is still to be received."""
        return bool(self._inbox)

    @property
    def over(self) -> bool:
        """Whether it has ended or broken."""
        return self.error is not None or self.link.fileno() < 0

    def carry(self) -> int:
        """Send and receive what can be now; what to poll the socket for. For the thread that serves it."""
        try:
            while True:
                with self._lock:
                    if self.over:
                        return 0
                    sent, received = self._send_once(), self._receive_once()
                if not (sent or received):
                    break
            with self._lock:
                if self._inbox and not self.over and isinstance(self.link, socket.socket):
                    awaited = sum(map(len, self._inbox))
                    self._low_water_bytes = links.wake_for(self.link, awaited, self._low_water_bytes)
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            self.error = error
            self._notice()
            return 0
        return (select.POLLIN if self._inbox else 0) | (select.POLLOUT if self._outbox else 0)

    def _send_once(self) -> bool:
        if not self._outbox:
            return False
        self._permit()
        try:
            return links.send_some(self.link, self._outbox) > 0
        except BlockingIOError:
            return False

    def _receive_once(self) -> bool:
        if not self._inbox:
            return False
        try:
            if not links.receive_some(self.link, self._inbox):
                raise ConnectionError("it closed the connection")
        except BlockingIOError:
            return False
        if not self._inbox:
            self._notice()
        return True

    def close(self) -> None:
        """End it; no memory is read or written for it any more when this returns."""
        with self._lock:
            self.link.close()
        self._wake()


@final
class StreamThread:
    """The thread of a process that serves all of its second streams, as long as there are any.

    `permit` as an Endpoint's.
    """

    def __init__(self, permit: Callable[[], None]) -> None:
        self._permit = permit
        self._streams: list[SecondStream] = []
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        """Held to look at these two."""
        self._waker, self._wakee = socket.socketpair()
        for end in (self._waker, self._wakee):
            end.setblocking(False)

    def serve(self, link: socket.socket | SecureLink, notice: Callable[[], None]) -> SecondStream:
        """Serve one more socket from now on; see SecondStream."""
        stream = SecondStream(link, self._wake, notice, self._permit)
        with self._lock:
            self._streams.append(stream)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="distbelief-streams", daemon=True)
                self._thread.start()
        return stream

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is awake already, or has ended
            self._waker.send(b"w")

    def _run(self) -> None:
        torch.set_num_threads(1)
        while streams := self._living():
            watch = select.poll()
            watch.register(self._wakee, select.POLLIN)
            for stream in streams:
                wanted = stream.carry()
                if wanted:
                    with contextlib.suppress(ValueError):  # it has just been closed
                        watch.register(stream.link, wanted)
            watch.poll()
            with contextlib.suppress(BlockingIOError):
                self._wakee.recv(4096)

    def _living(self) -> list[SecondStream]:
        with self._lock:
            self._streams = [stream for stream in self._streams if not stream.over]
            if not self._streams:
                self._thread = None
            return self._streams

    def close(self) -> None:
        """Return when the thread has ended, which it does when its streams have been closed."""
        thread = self._thread
        if thread is not None:
            thread.join()
        self._waker.close()
        self._wakee.close()
