# SPDX-License-Identifier: Apache-2.0
"""All connections of one process, and the role that answers on them.

An endpoint does its work when its owner waits: `poll` takes what has arrived, lets the role answer, and completes
futures. So a role's methods and its own activity never run at the same time and need no locks. A role that only calls
and must go on computing while a slow link carries its tensors asks for `background`: then a thread polls.
"""

import contextlib
import functools
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, final

from distbelief.channel import codec, frames, links
from distbelief.channel.authenticate import AcceptingSide, CallingSide
from distbelief.channel.background import Background
from distbelief.channel.codec import Part
from distbelief.channel.connection import Connection
from distbelief.channel.desk import Desk
from distbelief.channel.door import Door
from distbelief.channel.frames import Answer, Call, Header, Join
from distbelief.channel.futures import PendingCall
from distbelief.channel.place import Address
from distbelief.channel.second_stream import WIDE_BYTES
from distbelief.channel.secure import SecureLink
from distbelief.channel.spin import Spin
from distbelief.channel.watch import READABLE, WRITABLE, Watch
from distbelief.channel.widening import Widening
from distbelief.channel.wire import Wire
from distbelief.errors import ChannelError, DeadlineExceeded, PeerLost, ProtocolError

P = ParamSpec("P")
LOOK_SECONDS = 0.25
"""How often the connections are looked at that time may end."""
HELD_UP_SECONDS = 0.002
"""How often it is asked whether a body may begin that waits for others."""


@final
class Endpoint:
    """The sockets of one process.

    `role` answers calls that arrive. `listeners` are bound already: a Unix socket, whose callers share memory with this
    process, and TCP, or one of them. `body_limit` bounds, in bytes, what one frame may make this process allocate;
    `wire` says how calls travel between hosts. `permit` is asked before any part of a frame goes out, by whichever
    thread sends it; it may end this process, whose time is over. `own_core` as in Spin.
    """

    def __init__(
        self, key: bytes, *, role: object = None, listeners: Sequence[socket.socket] = (), own_core: bool = False,
        body_limit: int = 1 << 40, wire: Wire | None = None, permit: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._key, self._body_limit, self._wire = key, body_limit, wire or Wire()
        self._permit = permit
        self.desk = Desk(role, self._speak, body_limit)
        self._watch: Watch[Connection | Callable[[], object]] = Watch()
        self._spin = Spin(own_core)
        self._connections: set[Connection] = set()
        self._pending: dict[tuple[Connection, int], PendingCall] = {}
        self._number = 0
        self.lock = threading.RLock()
        """Held by whoever uses the connections: the role's thread, and the one that polls."""
        self._background: Background | None = None
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        self.watch(self._wakee, self._hear_news)
        self._door = Door(self._admit, self._drop)
        self._connecting: dict[Connection, tuple[Address, float]] = {}
        """Where to, and until when."""
        self._distant: set[Connection] = set()
        """Connections over TCP, whose other end may fall silent."""
        self._silent: set[Connection] = set()
        """Those that were when they were last looked at."""
        self._look_again = 0.0
        self._errands: list[Callable[[], bool]] = []
        self._widening = Widening(self.wake, permit)
        self._listeners = tuple(listeners)
        for listener in self._listeners:
            listener.setblocking(False)
            self.watch(listener, functools.partial(self._door.accept, listener))

    @property
    def refused(self) -> Counter[str]:
        """How many connections were refused here, by what the callers did."""
        return self._door.refused

    def answer_with(self, role: Any) -> None:
        """Let the exported methods of `role` answer calls from now on."""
        self.desk.seat(role)

    def background(self) -> None:
        """Poll in a thread from now on, while nobody waits. Whoever polls lets the role answer, if there is one."""
        self._background = Background(self._watch, self.poll, self._patience, self.lock)

    def watch(self, source: socket.socket, callback: Callable[[], object]) -> None:
        """Call `callback` from `poll` whenever `source` is readable."""
        self._watch.over(source.fileno(), READABLE, callback)

    def unwatch(self, source: socket.socket) -> None:
        """Stop watching, before it is closed."""
        self._watch.end(source.fileno())

    def wake(self) -> None:
        """Make a waiting `poll` return; may be called from any thread."""
        with contextlib.suppress(OSError):  # it is awake already, or closed
            self._waker.send(b"w")

    def take_in(self, seconds: float, there: Callable[[], bool] = lambda: False) -> None:
        """Wait up to `seconds` for something to happen, and let it happen; no more once what is awaited is `there`."""
        if self.desk.answering:
            if seconds > 0:
                raise RuntimeError("an exported method must not wait for a future; let the activity wait")
            return  # a method that asks whether a future is done runs alone all the same
        if self._background is None or self._background.is_here:
            self.poll(seconds)
        elif seconds > 0:
            self._background.wait(seconds, there)

    def poll(self, seconds: float) -> bool:
        """One round: wait for sockets, receive, answer, send; whether there was anything."""
        patience = self._patience()
        ready = self._spin.wait(self._watch.ready, min(seconds, patience))
        with self.lock:
            for whom, events in ready:
                if isinstance(whom, Connection):
                    self._serve(whom, events)
                elif whom is not None:
                    whom()
            self.desk.answer_deferred()
            if self.desk.held_up:
                held_up, self.desk.held_up = self.desk.held_up, []
                self._go_on(held_up)
            if patience <= LOOK_SECONDS:
                self._look_after()
            if self._errands:
                self._run_errands()
        return bool(ready)

    def _patience(self) -> float:
        """For how many seconds a round may be put off."""
        if self.desk.held_up:
            return HELD_UP_SECONDS
        return LOOK_SECONDS if self._distant or self._door.strangers else math.inf

    def attend(self, errand: Callable[[], bool]) -> None:
        """Call `errand`, which must not wait, after each round from now on, until it says that it is over."""
        self._errands.append(errand)

    def _run_errands(self) -> None:
        # An errand may ask a future whether it is done, and so begin another round inside of this one.
        errands, self._errands = self._errands, []
        unfinished = [errand for errand in errands if not errand()]
        self._errands += unfinished

    # calling

    def connect(self, address: Address) -> Connection:
        """A connection that may still have to be made; calls on it wait until both sides have proved themselves.

        Never waits. Raises PeerLost when it cannot even begin; what fails later is raised by the calls' futures.
        """
        connection = self._adopt(links.dial(address), CallingSide(self._key))
        if not connection.shares_memory:
            connection.connecting = True
            self._connecting[connection] = address, time.monotonic() + self._wire.connect_seconds
            self._widening.may_widen(connection, address)
            self._watch_for(connection, WRITABLE)
        return connection

    def start(self, connection: Connection, pending: PendingCall, fields: bytes) -> None:
        """Send a call on a connection that is not closed; its future is done when it is answered or too late."""
        signature, tensors = pending.signature, pending.tensors
        with self.lock:
            self._number += 1
            narrow = signature.rounded and self._wire.dtype == "bfloat16"
            references, body, awaited, body_bytes, travelling_bytes = [], [], [], 0, 0
            for tensor, (_, written) in zip(tensors, signature.kinds, strict=True):
                reference = connection.reference(tensor, narrow)
                references.append(reference)
                if not reference.block:
                    length = tensor.nbytes // 2 if reference.wire else tensor.nbytes
                    travelling_bytes += length
                    if written:
                        awaited.append((tensor, reference))
                    else:
                        body_bytes += length
                        body.append(codec.outgoing(tensor, reference))
            pending.connection = connection
            self._pending[connection, self._number] = pending
            wide = travelling_bytes >= WIDE_BYTES
            if wide and connection.second is None:
                wide = False
                self._widen(connection)
            frame = frames.encode(Call(self._number, signature.name, fields, references, wide), body_bytes)
            self._speak(connection, frame, body, wide)
            # While the other side works, so that its answer need not wait for this.
            if not pending.settled:
                pending.parts = [codec.incoming(tensor, reference) for tensor, reference in awaited]

    def give_up(self, pending: PendingCall, reason: str) -> None:
        """End a call whose deadline has passed. Its connection is closed: a late answer must not write our memory."""
        with self.lock:
            if pending.settled:
                return  # the answer came while this was on its way
            self._pending = {key: other for key, other in self._pending.items() if other is not pending}
            if pending.connection in self._connections:
                self._drop(pending.connection, PeerLost("the connection was closed after a missed deadline"))
            pending.settle(error=DeadlineExceeded(reason))

    def end(self, connection: Connection, reason: str) -> None:
        """End a connection; calls that wait on it are lost."""
        with self.lock:
            self._drop(connection, PeerLost(reason))

    # sockets

    def _admit(self, link: socket.socket) -> Connection:
        connection = self._adopt(link, AcceptingSide(self._key))
        connection.connecting = self._wire.certificate is not None and not connection.shares_memory
        self._guarded(connection, self._greet, connection)
        return connection

    def _greet(self, connection: Connection) -> None:
        if connection.connecting:
            assert isinstance(connection.socket, socket.socket)
            assert self._wire.certificate is not None
            connection.socket = SecureLink(connection.socket, self._wire.certificate, accepting=True)
        else:
            connection.flush()

    def _adopt(self, link: socket.socket, side: AcceptingSide | CallingSide) -> Connection:
        links.tune(link)
        connection = Connection(
            link, side, destinations=self._destinations, deliver=self._deliver, permit=self._permit,
            body_limit=self._body_limit,
        )  # fmt: skip
        with self.lock:
            self._connections.add(connection)
            if not connection.shares_memory:
                self._distant.add(connection)
            self._watch_for(connection, READABLE)
        return connection

    def _watch_for(self, connection: Connection, wanted: int) -> None:
        if wanted == connection.watched:
            return
        if wanted:
            self._watch.over(connection.descriptor, wanted, connection)
        else:
            self._watch.end(connection.descriptor)
        connection.watched = wanted

    def _serve(self, connection: Connection, events: int) -> None:
        if connection not in self._connections:
            return
        if connection.connecting:
            self._guarded(connection, self._go_on_connecting, connection)
            return
        if events & ~READABLE:
            self._guarded(connection, connection.flush)
        if events & ~WRITABLE and connection in self._connections:
            self._guarded(connection, connection.receive)

    def _go_on_connecting(self, connection: Connection) -> None:
        link = connection.socket
        if connection in self._connecting:
            assert isinstance(link, socket.socket)
            address, _ = self._connecting.pop(connection)
            if reason := links.failure(link):
                raise links.unreachable(address, reason)
            if self._wire.certificate is not None:
                connection.socket = link = SecureLink(link, self._wire.certificate, accepting=False)
            self._watch_for(connection, READABLE)
        if isinstance(link, SecureLink) and not link.shake():
            return
        connection.connecting = False
        connection.flush()

    def _look_after(self) -> None:
        """End what time ends: connections that are not made in time, silent hosts, strangers."""
        now = time.monotonic()
        if now < self._look_again:
            return
        self._look_again = now + LOOK_SECONDS
        for connection, (address, until) in list(self._connecting.items()):
            if now > until:
                reason = f"nothing was heard within {self._wire.connect_seconds:g} s"
                self._drop(connection, links.unreachable(address, reason))
        silent = {
            connection for connection in self._distant - self._connecting.keys()
            if links.is_silent(connection.socket, self._wire.silence_seconds)
        }  # fmt: skip
        # After this machine itself stood still, the answer to a question of before may be only just arriving.
        for connection in silent & self._silent:
            reason = f"its host has been silent for {self._wire.silence_seconds:g} s"
            self._drop(connection, PeerLost(f"the peer is out of reach: {reason}"))
        self._silent = silent
        self._door.sweep(now)

    def _guarded(self, connection: Connection, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Do I/O on one connection; what goes wrong ends that connection and nothing else."""
        try:
            action(*args, **kwargs)
        except ChannelError as error:
            self._door.count(connection, error)
            self._drop(connection, error)
            return
        if connection in self._connections and not connection.connecting:
            self._watch_for(connection, connection.awaited)

    def _speak(self, connection: Connection, frame: bytes, body: Sequence[Part], wide: bool = False) -> None:
        self._guarded(connection, connection.send, frame, body, wide=wide)

    def _drop(self, connection: Connection, error: ChannelError) -> None:
        if connection not in self._connections:
            return
        self._release(connection)
        connection.close()
        for key in [key for key in self._pending if key[0] is connection]:
            self._pending.pop(key).settle(error=error)

    def _release(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._distant.discard(connection)
        self._connecting.pop(connection, None)
        for second in self._widening.forget(connection):
            self._drop(second, PeerLost("the connection whose second stream this was to be has ended"))
        self._door.forget(connection)
        self.desk.forget(connection)
        self._watch_for(connection, 0)

    def _widen(self, connection: Connection) -> None:
        if asked := self._widening.ask(connection, self.connect):
            self._speak(*asked, [])

    def _join(self, second: Connection, join: Join) -> None:
        if any(connection is second for connection, _ in self._pending):
            raise ProtocolError("a peer offered a connection as a second stream on which it owes answers")
        first = self._widening.first_of(second, join, self._connections)
        if not self._widening.asked_for(second):
            second.send(frames.encode(join), [])
        self._widening.widen(first, second.give_away())
        self._release(second)

    def _hear_news(self) -> None:
        self._wakee.recv(4096)
        self._go_on(self._widening.news())

    def _go_on(self, connections: Iterable[Connection]) -> None:
        for connection in connections:
            if connection in self._connections:
                self._guarded(connection, connection.go_on)

    # frames

    def _destinations(self, connection: Connection, header: Header, body_bytes: int) -> Sequence[Part] | None:
        """Where the body of a frame belongs, None for not yet. Raises ProtocolError when its length is another one."""
        if isinstance(header, Call):
            return self.desk.destinations(connection, header, body_bytes)
        parts: Sequence[Part] = []
        if isinstance(header, Answer) and (pending := self._pending.get((connection, header.number))):
            parts = pending.parts
        frames.check_body(body_bytes, sum(map(len, parts)))
        return parts

    def _deliver(self, connection: Connection, header: Header) -> None:
        if isinstance(header, Call):
            self.desk.answer(connection, header)
            return
        if isinstance(header, Join):
            self._join(connection, header)
            return
        assert not isinstance(header, frames.Attach)
        if (pending := self._pending.pop((connection, header.number), None)) is not None:
            pending.take(header)

    def close(self) -> None:
        """Close every socket; pending calls fail with PeerLost."""
        if self._background is not None:
            self._background.end(self.wake)
        with self.lock:
            for connection in list(self._connections):
                self._drop(connection, PeerLost("this side closed the connection"))
            self._watch.close()
            self._widening.close()
            for own in (self._waker, self._wakee, *self._listeners):
                own.close()
