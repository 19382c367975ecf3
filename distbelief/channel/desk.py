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
from distbelief.channel.loan import Lending, Loan
from distbelief.channel.staging import Staging
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
        self._deferred: list[tuple[Connection, Call, list[torch.Tensor], Future[Any]]] = []
        self.held_up: list[Connection] = []
        """Those that are to ask again where their body belongs, the first one first."""
        self.answering = False
        """Whether a method is running."""
        self.lending = Lending()
        self.seat(role)

    def seat(self, role: Any) -> None:
        """Let the exported methods of `role` answer from now on."""
        self._role, self._methods = role, exported_methods(type(role))

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
        method = self._methods.get(call.method)
        signature = signature_of(method) if method else None
        kinds = zip(signature.places, signature.outputs, strict=True) if signature else ()
        carried = [
            (place, reference)
            for reference, (place, written) in zip(call.tensors, kinds, strict=False)
            if not reference.block and not written
        ]
        frames.check_body(body_bytes, sum(frames.body_bytes(reference) for _, reference in carried))
        return [
            codec.incoming(self._staging.take(connection, place, reference), reference) for place, reference in carried
        ]

    def answer(self, connection: Connection, call: Call) -> None:
        """Answer one call, now or later."""
        try:
            method = self._methods.get(call.method)
            if method is None:
                raise ProtocolError(f"{type(self._role).__name__} exports no method {call.method!r}")
            signature = signature_of(method)
            signature.expect(len(call.tensors))
            tensors = [
                connection.view(reference) if reference.block else self._staging.take(connection, place, reference)
                for reference, place in zip(call.tensors, signature.places, strict=True)
            ]
            arguments = signature.join(call.fields, tensors)
            if any(reference.block for reference in call.tensors) and connection.hung_up():
                return  # the caller has given up, so the memory it shared is its own again
            self.lending.allow(self._sent_back(call, tensors) if call.wide else ())
            self.answering = True
            try:
                value = method(self._role, *arguments)
            finally:
                self.answering = False
                self.lending.close()
            if isinstance(value, _LATER):
                self.lending.fill()
                self._deferred.append((connection, call, tensors, value))
            else:
                self._say(connection, call, value, tensors, at_once=True)
        except Exception as error:
            self.lending.allow(())  # what was lent for an answer that is not given
            self._fail(connection, call, error)

    def answer_deferred(self) -> None:
        """Answer the calls whose work has ended meanwhile."""
        if not self._deferred:
            return
        waiting, self._deferred = self._deferred, []
        for connection, call, tensors, work in waiting:
            if not work.done():
                self._deferred.append((connection, call, tensors, work))
                continue
            try:
                self._say(connection, call, work.result(), tensors)
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

    def _sent_back(self, call: Call, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of the tensors of a call those that its answer carries as they are."""
        outputs = signature_of(self._methods[call.method]).outputs
        return [
            tensor
            for tensor, reference, written in zip(tensors, call.tensors, outputs, strict=True)
            if written and not (reference.block or reference.wire)
        ]

    def _say(
        self, connection: Connection, call: Call, value: Any, tensors: list[torch.Tensor], *, at_once: bool = False
    ) -> None:  # fmt: skip
        answer = Answer(call.number, _encode_value(value), call.wide)
        if all(reference.block for reference in call.tensors):
            self._send(connection, frames.encode(answer), (), call.wide)
            return
        outputs = signature_of(self._methods[call.method]).outputs
        body = [
            self.lending.instead_of(tensor) or codec.outgoing(tensor, reference)
            for tensor, reference, written in zip(tensors, call.tensors, outputs, strict=True)
            if written and not reference.block
        ]
        frame = frames.encode(answer, sum(map(len, body)))
        self.lending.grant(connection)
        if at_once and all(isinstance(part, Loan) for part in body):
            self._staging.release(connection)
        self._send(connection, frame, body, call.wide)

    def _fail(self, connection: Connection, call: Call, error: Exception) -> None:
        known = type(error).__name__ in _AS_THEMSELVES
        message = str(error) if known else "".join(traceback.format_exception(error))
        message = message[-FAILURE_CHARACTERS:].encode(errors="replace").decode()
        self._send(connection, frames.encode(Failure(call.number, type(error).__name__, message)), [], False)
