# SPDX-License-Identifier: Apache-2.0
"""Bytes on a socket: a fixed prefix, a typed header, then the tensors that do not lie in shared memory.

    prefix  magic "DBf1" | kind u8 | 3 zero bytes | header length u32 | body length u64
    header  msgpack, at most 16 MiB: Call, Answer, Failure, Attach or Join
    body    the tensors in the order of the header, each contiguous, little-endian, float32 possibly as bfloat16; of
            those of a wide frame every other piece, the rest goes by the second stream

Lengths are checked against bounds before anything is allocated.
"""

import struct
from enum import IntEnum

import msgspec
import torch

from distbelief.errors import ProtocolError

MAGIC = b"DBf1"
PREFIX = struct.Struct("<4sB3xIQ")
HEADER_LIMIT = 16 << 20


class Kind(IntEnum):
    """What a frame is."""

    CALL = 1
    ANSWER = 2
    FAILURE = 3
    ATTACH = 4
    JOIN = 5


class TensorReference(msgspec.Struct, array_like=True, frozen=True):
    """One tensor argument: where it lies (block 0: in the body, or to be sent back in the answer's body)."""

    dtype: str
    length: int
    block: int = 0
    offset_bytes: int = 0
    wire: str = ""
    """The dtype in which it travels in a body, there and back, when that is another one: "bfloat16" for float32."""


class Call(msgspec.Struct, array_like=True, frozen=True):
    """Header of a call."""

    number: int
    method: str
    fields: bytes
    tensors: list[TensorReference] = []
    wide: bool = False
    """Whether its body, and that of its answer, uses the second stream."""


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """Header of an answer; its body holds the written tensors that are not in shared memory."""

    number: int
    value: bytes
    wide: bool = False


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """Header of an answer that is an exception."""

    number: int
    kind: str
    message: str


class Attach(msgspec.Struct, array_like=True, frozen=True):
    """Announces a shared-memory block; its descriptor travels with this frame."""

    block: int


class Join(msgspec.Struct, array_like=True, frozen=True):
    """The connection on which this comes is to be the second stream of another; its answer is the same."""

    identity: bytes


Header = Call | Answer | Failure | Attach | Join
_types = {Kind.CALL: Call, Kind.ANSWER: Answer, Kind.FAILURE: Failure, Kind.ATTACH: Attach, Kind.JOIN: Join}
_numbered = {int(kind): kind for kind in Kind}
_decoders = {kind: msgspec.msgpack.Decoder(header) for kind, header in _types.items()}
_kinds = {header: kind for kind, header in _types.items()}
_encoder = msgspec.msgpack.Encoder()

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
)}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(header: Header, body_bytes: int = 0) -> bytes:
    """Prefix and header of one frame, to be followed by `body_bytes` of tensors."""
    text = _encoder.encode(header)
    if len(text) > HEADER_LIMIT:
        raise ProtocolError(f"a header of {len(text)} bytes passes the limit of {HEADER_LIMIT}")
    return PREFIX.pack(MAGIC, _kinds[type(header)], len(text), body_bytes) + text


def decode_prefix(begun: bytes | bytearray | memoryview, body_limit: int) -> tuple[Kind, int, int]:
    """(kind, header length, body length) of a frame that begins so. Raises ProtocolError on anything out of bounds."""
    magic, kind, header_bytes, body_bytes = PREFIX.unpack_from(begun)
    if magic != MAGIC:
        raise ProtocolError(f"a peer sent {bytes(magic)!r} where a frame should begin")
    if kind not in _numbered:
        raise ProtocolError(f"a peer sent a frame of unknown kind {kind}")
    if header_bytes > HEADER_LIMIT or body_bytes > body_limit:
        raise ProtocolError(
            f"a peer announced a frame of {header_bytes} + {body_bytes} bytes; "
            f"the limits are {HEADER_LIMIT} + {body_limit}"
        )
    return _numbered[kind], header_bytes, body_bytes


def decode_header(kind: Kind, text: bytes | bytearray | memoryview) -> Header:
    """The typed header. Raises ProtocolError when it does not parse."""
    try:
        header: Header = _decoders[kind].decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"a peer sent a malformed {kind.name} header: {error}") from error
    return header


def size_bytes(reference: TensorReference) -> int:
    """How much memory a tensor takes. Raises ProtocolError for one that cannot be."""
    dtype = DTYPES.get(reference.dtype)
    if dtype is None or reference.length < 0:
        raise ProtocolError(f"a peer announced a tensor that cannot be: {reference}")
    return reference.length * dtype.itemsize


def body_bytes(reference: TensorReference) -> int:
    """How much of a body a tensor takes. Raises ProtocolError for one that cannot be."""
    memory_bytes = size_bytes(reference)
    if not reference.wire:
        return memory_bytes
    if (reference.dtype, reference.wire) != ("float32", "bfloat16"):
        raise ProtocolError(f"a peer announced a tensor that cannot be: {reference}")
    return memory_bytes // 2


def check_body(carried_bytes: int, named_bytes: int) -> None:
    """Raise ProtocolError unless a frame carries as many bytes as the tensors that its header names."""
    if carried_bytes != named_bytes:
        raise ProtocolError(f"a frame carries {carried_bytes} bytes of tensors, its header says {named_bytes}")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, writable, without a copy."""
    if not tensor.numel():
        return memoryview(bytearray())
    known_to_numpy = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    return known_to_numpy.numpy().data.cast("B")
