# SPDX-License-Identifier: Apache-2.0
"""What a call is, on every engine: a method of a role, named, with typed fields and tensors; a future answers.

    answer = shard.call(ParameterServerShard.push, stamp, gradient)      # a Future[Applied]

Tensors are arguments only. A plain `torch.Tensor` argument is read by the callee, an `Out` argument is written by it;
both belong to the caller, who leaves them alone until the future is done. Everything else is a field: numbers,
strings, containers and msgspec Structs, checked against the method's annotations on arrival.
"""

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import msgspec
import torch

from distbelief.errors import Behind, CheckpointError, Fenced, NotReady, ProtocolError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_WRITTEN = "written by the callee"
Out = Annotated[torch.Tensor, _WRITTEN]
"""A tensor argument that the method fills; it is undefined until the future is done.

Over TCP it may lie where a tensor that the method reads lies: a method reads what it is given before it fills anything.
"""


RAISED_AS_IS = (Fenced, NotReady, Behind, CheckpointError, ProtocolError)
"""What a method may raise for its caller to catch; anything else arrives as RemoteError."""


def exported(method: Callable[P, T]) -> Callable[P, T]:
    """Mark a method that other roles may call. It runs alone, must not wait, and returns soon."""
    method.__exported__ = True  # type: ignore[attr-defined]
    return method


def rounded(method: Callable[P, T]) -> Callable[P, T]:
    """Mark an exported method whose float32 tensors may travel between hosts as bfloat16, if the job says so."""
    method.__rounded__ = True  # type: ignore[attr-defined]
    return method


class Future(Protocol[T_co]):
    """The answer to a call, or the outcome of background work."""

    def done(self) -> bool:
        """Whether `result` would return or raise at once. Cheap enough for once per mini-batch."""

    def wait(self, seconds: float) -> bool:
        """Wait for the answer, at most so long; the same as `done` afterwards."""

    def result(self) -> T_co:
        """Wait for the answer. Raises PeerLost, DeadlineExceeded, Fenced, RemoteError."""


class Promise(Future[T], Protocol[T]):
    """A future that its maker completes; an exported method may return it, and so answer later."""

    def keep(self, value: T) -> None:
        """Complete it, unless it is done already."""


class Remote(ABC, Generic[R]):
    """A reference to a role, wherever it lives. Calls from one caller to one role run in the order they were made."""

    def call(self, method: Callable[Concatenate[R, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start a call. Never raises for the peer's sake: what goes wrong is raised by the future."""
        signature = signature_of(method)
        fields, tensors = signature.split(args, kwargs)
        future: Future[T] = self.start(signature, fields, tensors)
        return future

    @abstractmethod
    def start(self, signature: "Signature", fields: bytes, tensors: list[torch.Tensor]) -> Future[Any]:
        """Send an encoded call; what an engine implements."""


@dataclass(frozen=True, eq=False)
class Signature:
    """How the arguments of one exported method are divided into fields and tensors."""

    name: str
    parameters: tuple[str, ...]
    tensor_modes: tuple[bool | None, ...]
    """Per parameter: None for a field, False for a tensor the callee reads, True for one it writes."""
    kinds: tuple[tuple[int, bool], ...]
    """Per tensor argument, in order: how many of its kind, read or written, come before it, and whether it is written
    by the callee."""
    rounded: bool
    """Whether its float32 tensors may travel as bfloat16."""
    fields_encoder: msgspec.msgpack.Encoder
    fields_decoder: msgspec.msgpack.Decoder[Any]
    answer_decoder: msgspec.msgpack.Decoder[Any]

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, list[torch.Tensor]]:
        """Encode the fields and collect the tensors of one call."""
        if kwargs or len(args) != len(self.parameters):
            args = self._in_order(args, kwargs)
        fields: list[Any] = []
        tensors: list[torch.Tensor] = []
        for value, mode in zip(args, self.tensor_modes, strict=True):
            (fields if mode is None else tensors).append(value)
        return self.fields_encoder.encode(fields), tensors

    def expect(self, tensors: int) -> None:
        """Raise ProtocolError unless a call has so many tensors."""
        if tensors != len(self.kinds):
            raise ProtocolError(f"{self.name} takes {len(self.kinds)} tensors, {tensors} came")

    def join(self, fields: bytes, tensors: list[torch.Tensor]) -> list[Any]:
        """The callee's argument list. Raises ProtocolError when the fields are not of the declared types."""
        try:
            values = iter(self.fields_decoder.decode(fields))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ProtocolError(f"arguments of {self.name}: {error}") from error
        self.expect(len(tensors))
        rest = iter(tensors)
        return [next(values) if mode is None else next(rest) for mode in self.tensor_modes]

    def _in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        if set(named) != set(self.parameters):
            raise TypeError(f"{self.name} takes {', '.join(self.parameters)}; given {', '.join(named)}")
        return tuple(named[name] for name in self.parameters)


@cache
def signature_of(method: Callable[..., Any]) -> Signature:
    """The signature of an exported method, from its annotations. Raises TypeError when it is not exported."""
    if not getattr(method, "__exported__", False):
        raise TypeError(f"{method.__qualname__} is not exported; decorate it with @exported")
    hints = typing.get_type_hints(method, include_extras=True)
    names = tuple(inspect.signature(method).parameters)[1:]
    modes: list[bool | None] = []
    for name in names:
        hint = hints[name]
        written = typing.get_origin(hint) is Annotated and _WRITTEN in typing.get_args(hint)[1:]
        modes.append(True if written else False if hint is torch.Tensor else None)
    field_types = [hints[name] for name, mode in zip(names, modes, strict=True) if mode is None]
    answer = hints.get("return", type(None))
    if typing.get_origin(answer) in (Future, Promise):
        answer = typing.get_args(answer)[0]
    outputs = tuple(mode for mode in modes if mode is not None)
    fields = typing.cast(Any, tuple)[tuple(field_types)] if field_types else tuple[()]
    return Signature(
        name=method.__name__,
        parameters=names,
        tensor_modes=tuple(modes),
        kinds=tuple((outputs[:position].count(written), written) for position, written in enumerate(outputs)),
        rounded=getattr(method, "__rounded__", False),
        fields_encoder=msgspec.msgpack.Encoder(),
        fields_decoder=msgspec.msgpack.Decoder(fields),
        answer_decoder=msgspec.msgpack.Decoder(answer),
    )


def exported_methods(role: type[Any]) -> dict[str, Callable[..., Any]]:
    """The methods of a role's class that may be called by name, and nothing else of it."""
    return {
        name: member
        for name, member in inspect.getmembers(role, inspect.isfunction)
        if getattr(member, "__exported__", False)
    }
