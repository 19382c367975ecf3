# SPDX-License-Identifier: Apache-2.0
"""Where the role of this process answers the calls that have come, one at a time."""

import traceback
from collections.abc import Callable, Sequence
from typing import Any, final

import msgspec
import torch

from distbelief.channel import codec, frames
from distbelief.channel.base import RAISED_AS_IS, Future, exported_methods, signature_of
from distbelief.channel.codec import Part
from distbelief.channel.connection import Connection
from distbelief.channel.frames import Answer, Call, Failure
from distbelief.channel.futures import BackgroundWork, Kept
from distbelief.channel.loan import Lending
from distbelief.channel.staging import Buffer, Staging
from distbelief.errors import ProtocolError

FAILURE_CHARACTERS = 1 << 20
_AS_THEMSELVES = {kind.__name__ for kind in RAISED_AS_IS}
_LATER = (BackgroundWork, Kept)
_encode_value = msgspec.msgpack.Encoder().encode

Send = Callable[[Connection, bytes, Sequence[Part], bool], None]


@final
class Desk:
    """A role, its exported methods, and the answers it still owes.

    `send` takes a frame, its body, and whether it is wide. `body_limit` as in Staging.
    """

    def __init__(self, role: object, send: Send, body_limit: int) -> None:
        self._send = send
        self._staging = Staging(body_limit, self._is_answering)
        self._deferred: list[tuple[Connection, Call, list[Buffer], Future[Any]]] = []
        self.held_up: list[Connection] = []
        """Those that are to ask again where their body belongs, the first one first."""
        self.answering = False
        """Whether a method is running."""
        self.lending = Lending()
        self.seat(role)

    def seat(self, role: Any) -> None:
        """Let the exported methods of `role` answer from now on."""
        self._role = role
        self._methods = {name: (method, signature_of(method)) for name, method in exported_methods(type(role)).items()}

    def destinations(self, connection: Connection, call: Call, body_bytes: int) -> list[Part] | None:
        """Where the body of a call belongs; None where it is to wait for other bodies: then it is `held_up`.

        Raises ProtocolError when it is not as long as its tensors.
        """
        if not body_bytes and all(reference.block for reference in call.tensors):
            return []  # all of it is shared memory
        if self._staging.must_wait(connection, body_bytes, bool(self.held_up)):
            if connection not in self.held_up:  # news of its second stream may make it ask once more
                self.held_up.append(connection)
            return None
        self._staging.begin(connection, body_bytes)
        kinds = self._methods[call.method][1].kinds if call.method in self._methods else ()
        carried, carried_bytes = [], 0
        for reference, (place, written) in zip(call.tensors, kinds, strict=False):
            if not (written or reference.block):
                carried.append((place, reference))
                carried_bytes += frames.body_bytes(reference)
        frames.check_body(body_bytes, carried_bytes)
        parts: list[Part] = []
        for place, reference in carried:
            buffer = self._staging.take(connection, place, reference)
            parts.append(codec.incoming(buffer.tensor, reference) if reference.wire else buffer.memory)
        return parts

    def answer(self, connection: Connection, call: Call) -> None:
        """Answer one call, now or later."""
        try:
            if call.method not in self._methods:
                raise ProtocolError(f"{type(self._role).__name__} exports no method {call.method!r}")
            method, signature = self._methods[call.method]
            signature.expect(len(call.tensors))
            given = [
                Buffer(connection.view(reference))
                if reference.block
                else self._staging.take(connection, place, reference)
                for reference, (place, _) in zip(call.tensors, signature.kinds, strict=True)
            ]
            arguments = signature.join(call.fields, [buffer.tensor for buffer in given])
            if connection.shares_memory and any(reference.block for reference in call.tensors) and connection.hung_up():
                return  # the caller has given up, so the memory it shared is its own again
            self.lending.allow(self._sent_back(call, given) if call.wide else ())
            self.answering = True
            try:
                value = method(self._role, *arguments)
            finally:
                self.answering = False
                self.lending.close()
            if isinstance(value, _LATER):
                self.lending.fill()
                self._deferred.append((connection, call, given, value))
            else:
                self._say(connection, call, value, given, at_once=True)
        except Exception as error:
            self.lending.allow(())  # what was lent for an answer that is not given
            self._fail(connection, call, error)

    def answer_deferred(self) -> None:
        """Answer the calls whose work has ended meanwhile."""
        if not self._deferred:
            return
        waiting, self._deferred = self._deferred, []
        for connection, call, given, work in waiting:
            if not work.done():
                self._deferred.append((connection, call, given, work))
                continue
            try:
                self._say(connection, call, work.result(), given)
            except Exception as error:
                self._fail(connection, call, error)

    def forget(self, connection: Connection) -> None:
        """A connection has ended: nobody waits for its answers."""
        self._deferred = [item for item in self._deferred if item[0] is not connection]
        self.lending.forget(connection)
        self._staging.forget(connection)

    def _is_answering(self, connection: Connection) -> bool:
        """Whether a call of this connection is worked on, or its answer being sent."""
        return connection.reading or any(waiting is connection for waiting, *_ in self._deferred)

    def _sent_back(self, call: Call, given: list[Buffer]) -> list[torch.Tensor]:
        """Of the tensors of a call those that its answer carries as they are."""
        kinds = self._methods[call.method][1].kinds
        return [
            buffer.tensor
            for buffer, reference, (_, written) in zip(given, call.tensors, kinds, strict=True)
            if written and not (reference.block or reference.wire)
        ]

    def _say(
        self, connection: Connection, call: Call, value: Any, given: list[Buffer], *, at_once: bool = False
    ) -> None:  # fmt: skip
        body: list[Part] = []
        body_bytes, travels, borrowed = 0, False, True
        for buffer, reference, (_, written) in zip(
            given, call.tensors, self._methods[call.method][1].kinds, strict=True
        ):
            if reference.block:
                continue
            travels = True
            if written:
                part: Part | None = self.lending.instead_of(buffer.tensor)
                if part is None:
                    borrowed = False
                    part = codec.outgoing(buffer.tensor, reference) if reference.wire else buffer.memory
                body.append(part)
                body_bytes += len(part)
        frame = frames.encode(Answer(call.number, _encode_value(value), call.wide), body_bytes)
        if travels:
            self.lending.grant(connection)
            if at_once and borrowed:
                self._staging.release(connection)
        self._send(connection, frame, body, call.wide)

    def _fail(self, connection: Connection, call: Call, error: Exception) -> None:
        known = type(error).__name__ in _AS_THEMSELVES
        message = str(error) if known else "".join(traceback.format_exception(error))
        message = message[-FAILURE_CHARACTERS:].encode(errors="replace").decode()
        self._send(connection, frames.encode(Failure(call.number, type(error).__name__, message)), [], False)
