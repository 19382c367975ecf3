# SPDX-License-Identifier: Apache-2.0
"""Laws of frames: what is sent arrives, and what is no frame is refused before it can cost anything."""

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distbelief.channel import frames, staging
from distbelief.channel.authenticate import AcceptingSide, CallingSide
from distbelief.channel.connection import Connection
from distbelief.channel.frames import PREFIX, Answer, Attach, Call, Failure, Header, Kind, TensorReference
from distbelief.channel.staging import Staging
from distbelief.errors import PeerLost, ProtocolError

KEY = b"k" * 32
BODY_LIMIT = 1 << 20

numbers = st.integers(0, 2**63 - 1)
texts = st.text(max_size=30)
references = st.builds(TensorReference, st.sampled_from(sorted(frames.DTYPES)), numbers, numbers, numbers)
headers: st.SearchStrategy[Header] = st.one_of(
    st.builds(Call, numbers, texts, st.binary(max_size=100), st.lists(references, max_size=4)),
    st.builds(Answer, numbers, st.binary(max_size=100)),
    st.builds(Failure, numbers, texts, texts),
    st.builds(Attach, numbers),
)
laws = settings(deadline=None, max_examples=60, database=None)


def split(frame: bytes) -> tuple[bytes, bytes]:
    return frame[: PREFIX.size], frame[PREFIX.size :]


# one frame


@laws
@given(header=headers, body_bytes=st.integers(0, BODY_LIMIT))
def test_every_header_comes_back_as_it_was_sent(header: Header, body_bytes: int) -> None:
    prefix, text = split(frames.encode(header, body_bytes))
    kind, header_bytes, announced = frames.decode_prefix(prefix, BODY_LIMIT)
    assert (header_bytes, announced) == (len(text), body_bytes)
    assert frames.decode_header(kind, text) == header


@laws
@given(header=headers, data=st.data())
def test_a_truncated_header_is_refused(header: Header, data: st.DataObject) -> None:
    prefix, text = split(frames.encode(header))
    kind, _, _ = frames.decode_prefix(prefix, BODY_LIMIT)
    kept = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(ProtocolError, match="malformed"):
        frames.decode_header(kind, text[:kept])


@laws
@given(garbage=st.binary(min_size=PREFIX.size, max_size=PREFIX.size).filter(lambda raw: raw[:4] != frames.MAGIC))
def test_bytes_without_the_magic_are_refused(garbage: bytes) -> None:
    with pytest.raises(ProtocolError, match="where a frame should begin"):
        frames.decode_prefix(garbage, BODY_LIMIT)


@laws
@given(kind=st.integers(0, 255).filter(lambda kind: kind not in list(Kind)))
def test_an_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown kind {kind}"):
        frames.decode_prefix(PREFIX.pack(frames.MAGIC, kind, 0, 0), BODY_LIMIT)


@laws
@given(kind=st.sampled_from(list(Kind)), header_bytes=st.integers(0, 2**32 - 1), body_bytes=st.integers(0, 2**64 - 1))
def test_a_prefix_is_refused_exactly_when_it_passes_a_limit(kind: Kind, header_bytes: int, body_bytes: int) -> None:
    prefix = PREFIX.pack(frames.MAGIC, kind, header_bytes, body_bytes)
    if header_bytes <= frames.HEADER_LIMIT and body_bytes <= BODY_LIMIT:
        assert frames.decode_prefix(prefix, BODY_LIMIT) == (kind, header_bytes, body_bytes)
    else:
        with pytest.raises(ProtocolError, match="the limits are"):
            frames.decode_prefix(prefix, BODY_LIMIT)


def test_a_header_too_long_to_be_read_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="passes the limit"):
        frames.encode(Answer(1, b"0" * frames.HEADER_LIMIT))


@pytest.mark.parametrize("dtype", frames.DTYPES.values(), ids=frames.DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)], ids=str)
def test_the_bytes_of_a_tensor_are_its_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    memory = frames.bytes_of(tensor)
    assert len(memory) == tensor.nbytes
    memory[:] = bytes(len(memory))
    assert not tensor.any(), "writing to the bytes must write to the tensor"


# a stream of frames


class Wire:
    """A connection whose peer is the test: bytes go in as they come, headers and bodies come out."""

    def __init__(self) -> None:
        self.peer, own = socket.socketpair()
        self.delivered: list[tuple[Header, bytes]] = []
        self._body = bytearray()
        proof = CallingSide(KEY)
        side = AcceptingSide(KEY)
        reply, _ = proof.take(side.challenge)
        self.connection = Connection(
            own, side, destinations=self._destinations, deliver=self._deliver, permit=lambda: None,
            body_limit=BODY_LIMIT,
        )  # fmt: skip
        self.feed(reply)
        assert self.connection.proved

    def _destinations(self, connection: Connection, header: Header, body_bytes: int) -> list[memoryview]:
        self._body = bytearray(body_bytes)
        return [memoryview(self._body)[: body_bytes // 3], memoryview(self._body)[body_bytes // 3 :]]

    def _deliver(self, connection: Connection, header: Header) -> None:
        self.delivered.append((header, bytes(self._body)))

    def feed(self, data: bytes) -> None:
        self.peer.sendall(data)
        while select.select([self.connection.socket], [], [], 0.0)[0]:
            self.connection.receive()

    def close(self) -> None:
        self.connection.close()
        self.peer.close()


@pytest.fixture
def wires() -> Iterator[Callable[[], Wire]]:
    made: list[Wire] = []

    def make() -> Wire:
        made.append(Wire())
        return made[-1]

    yield make
    for wire in made:
        wire.close()


messages = st.lists(
    st.tuples(headers.filter(lambda header: not isinstance(header, Attach)), st.binary(max_size=2000)), max_size=5
)


@laws
@given(sent=messages, data=st.data())
def test_frames_arrive_whole_and_in_order_however_the_stream_is_cut(
    sent: list[tuple[Header, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(frames.encode(header, len(body)) + body for header, body in sent)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=30).map(sorted))
    with closing(Wire()) as wire:
        for start, stop in pairwise([0, *cuts, len(stream)]):
            wire.feed(stream[start:stop])
    assert wire.delivered == sent


@laws
@given(garbage=st.binary(min_size=PREFIX.size, max_size=400).filter(lambda raw: raw[:4] != frames.MAGIC))
def test_random_bytes_deliver_nothing(garbage: bytes) -> None:
    with closing(Wire()) as wire, pytest.raises(ProtocolError):
        wire.feed(garbage)
    assert wire.delivered == []


@laws
@given(kind=st.sampled_from([Kind.CALL, Kind.ANSWER, Kind.FAILURE]), text=st.binary(max_size=200))
@example(kind=Kind.CALL, text=b"\x93\x00\xa7\x00\x00\x00\x00\x00\x00\x80")  # a name that is not UTF-8
def test_a_random_header_is_delivered_only_if_it_is_a_message(kind: Kind, text: bytes) -> None:
    with closing(Wire()) as wire:
        try:
            wire.feed(PREFIX.pack(frames.MAGIC, kind, len(text), 0) + text)
        except ProtocolError:
            assert wire.delivered == []
        else:
            assert wire.delivered == [(frames.decode_header(kind, text), b"")]


def test_half_a_frame_is_waited_for_and_its_end_is_a_lost_peer(wires: Callable[[], Wire]) -> None:
    wire = wires()
    wire.feed(frames.encode(Answer(1, b"x"), 100) + bytes(99))
    assert wire.delivered == []
    wire.peer.close()
    with pytest.raises(PeerLost):
        wire.connection.receive()


def test_a_tensor_larger_than_the_limit_is_refused_before_memory_is_taken(
    wires: Callable[[], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, buffers = wires().connection, Staging(BODY_LIMIT, lambda _: True)
    buffers.begin(connection, 0)
    taken: list[int] = []
    new_memory = staging._buffer

    def watched(size_bytes: int) -> torch.Tensor:
        taken.append(size_bytes)
        return new_memory(size_bytes)

    monkeypatch.setattr(staging, "_buffer", watched)
    for length in (BODY_LIMIT // 4 + 1, 2**62, -1):
        with pytest.raises(ProtocolError):
            buffers.take(connection, 0, TensorReference("float32", length))
    assert taken == []
    assert buffers.take(connection, 0, TensorReference("float32", BODY_LIMIT // 4)).tensor.nbytes == BODY_LIMIT
    assert taken == [BODY_LIMIT]


def test_a_tensor_of_unknown_dtype_is_refused(wires: Callable[[], Wire]) -> None:
    connection, buffers = wires().connection, Staging(BODY_LIMIT, lambda _: True)
    buffers.begin(connection, 0)
    with pytest.raises(ProtocolError):
        buffers.take(connection, 0, TensorReference("object", 1))


def test_a_tensor_that_no_memory_can_hold_ends_the_connection_only() -> None:
    own, peer = socket.socketpair()
    with own, peer:
        connection = Connection(
            own, AcceptingSide(KEY), destinations=lambda *_: [], deliver=lambda *_: None, permit=lambda: None,
            body_limit=1 << 62,
        )  # fmt: skip
        buffers = Staging(1 << 62, lambda _: True)
        buffers.begin(connection, 0)
        with pytest.raises(ProtocolError, match="no memory"):
            buffers.take(connection, 0, TensorReference("uint8", 1 << 61))
