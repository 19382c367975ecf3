# SPDX-License-Identifier: Apache-2.0
"""Laws of what a job can choose for the links between hosts: bfloat16, TLS; and of a host that falls silent."""

import contextlib
import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import Town
from fault_proxy import FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distbelief.channel import door, frames, memory
from distbelief.channel.base import Out, exported, rounded
from distbelief.channel.codec import PIECE, Narrowed
from distbelief.channel.frames import TensorReference
from distbelief.channel.secure import Certificate, new_certificate
from distbelief.channel.wire import Wire
from distbelief.errors import AuthenticationError, ConfigurationError, DeadlineExceeded, PeerLost, ProtocolError
from tests.hosts import Hosts

BFLOAT16 = Wire(dtype="bfloat16")


class Clerk:
    """A role that gives back what it gets."""

    def __init__(self) -> None:
        self.seen = torch.empty(0)

    @exported
    @rounded
    def mirror(self, values: torch.Tensor, out: Out) -> None:
        self.seen = values.clone()
        out.copy_(values)

    @exported
    def mirror_exactly(self, values: torch.Tensor, out: Out) -> None:
        out.copy_(values)

    @exported
    @rounded
    def thirds(self, out: Out) -> None:
        out.copy_(torch.arange(len(out)) / 3)


@pytest.fixture
def town() -> Iterator[Town]:
    made = Town("tcp")
    yield made
    made.close()


def nearest_bfloat16(values: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Rounded to nearest, ties to even, in the arithmetic of the bits: the upper half, and what the lower carries."""
    bits = values.view(numpy.uint32).astype(numpy.uint64)
    carried = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return carried.astype(numpy.uint32).view(numpy.float32)


def travelled(values: torch.Tensor, cuts: Callable[[], int] = lambda: 1 << 30) -> torch.Tensor:
    """The numbers after they have been narrowed and widened, in steps of any size."""
    there, back = Narrowed(values, incoming=False), torch.empty_like(values)
    here = Narrowed(back, incoming=True)
    while len(there):
        source, target = there.piece(), here.piece()
        count = min(len(source), len(target), max(1, cuts()))
        target[:count] = source[:count]
        there.advance(count)
        here.advance(count)
    assert len(here) == 0
    return back


# numbers


@settings(deadline=None, max_examples=200, database=None)
@given(
    values=arrays.arrays(
        numpy.float32, st.integers(1, 50), elements=st.floats(width=32, allow_nan=False, allow_subnormal=True)
    )
)
def test_numbers_are_rounded_to_the_nearest_and_ties_to_even(values: numpy.ndarray[Any, Any]) -> None:
    got = travelled(torch.from_numpy(values)).numpy()
    assert numpy.array_equal(got, nearest_bfloat16(values))
    normal = numpy.isfinite(got) & (numpy.abs(values) >= numpy.finfo(numpy.float32).tiny)
    assert numpy.all(numpy.abs(got[normal] - values[normal]) <= 2.0**-8 * numpy.abs(values[normal]))


def test_a_tie_goes_to_the_even_neighbour() -> None:
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), -(1 + 3 * 2.0**-8)])
    assert travelled(ties).tolist() == [1.0, 1 + 2.0**-6, -1.0, -(1 + 2.0**-6)]


def test_what_is_no_number_stays_what_it_is() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    got = travelled(odd)
    assert got[0].isnan()
    assert got[1:].tolist() == odd[1:].tolist()
    assert torch.equal(got[1:].signbit(), odd[1:].signbit())


@settings(deadline=None, max_examples=30, database=None)
@given(length=st.sampled_from([1, 2, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5]), seed=st.integers(0, 1000))
def test_the_stream_may_be_cut_anywhere_even_inside_of_a_number(length: int, seed: int) -> None:
    random = numpy.random.default_rng(seed)
    values = torch.from_numpy(random.standard_normal(length, dtype="float32"))
    got = travelled(values, lambda: int(random.integers(1, 100_001)))
    assert torch.equal(got, values.bfloat16().float())


# calls


@pytest.mark.parametrize("length", [0, 1, 7, 70_001, 1_000_003])
def test_a_call_to_a_rounded_method_moves_half_the_bytes_both_ways(town: Town, length: int) -> None:
    clerk = Clerk()
    with closing(FaultProxy(town.serve(clerk))) as proxy:
        values, out = torch.randn(length), torch.zeros(length)
        for method, wire, number_bytes in (
            (Clerk.mirror, BFLOAT16, 2), (Clerk.mirror_exactly, BFLOAT16, 4), (Clerk.mirror, Wire(), 4)
        ):  # fmt: skip
            town.answer(town.peer(proxy.address, wire=wire).call(method, values, out))
            expected = values.bfloat16().float() if number_bytes == 2 else values
            assert torch.equal(out, expected)
            assert 0 <= len(proxy.heard[-1]) - number_bytes * length < 200
            if number_bytes == 2:
                assert torch.equal(clerk.seen, expected)


def test_all_callers_get_the_same_bits(town: Town) -> None:
    address = town.serve(Clerk())
    outs = [torch.zeros(100_001) for _ in range(3)]
    for out in outs:
        town.answer(town.peer(address, wire=BFLOAT16).call(Clerk.thirds, out))
    assert all(torch.equal(out, (torch.arange(100_001) / 3).bfloat16().float()) for out in outs)


@pytest.mark.parametrize("dtype", [dtype for dtype in frames.DTYPES.values() if dtype != torch.float32], ids=str)
def test_tensors_of_other_dtypes_travel_as_they_are(town: Town, dtype: torch.dtype) -> None:
    values, out = (torch.randn(1000) * 100).to(dtype), torch.zeros(1000, dtype=dtype)
    town.answer(town.peer(town.serve(Clerk()), wire=BFLOAT16).call(Clerk.mirror, values, out))
    assert torch.equal(out, values)


def test_nothing_is_rounded_where_memory_is_shared() -> None:
    near = Town("shared_memory")
    with closing(near):
        peer = near.peer(near.serve(Clerk()), wire=BFLOAT16)
        for make in (torch.empty, lambda n: memory.allocate(n, torch.float32)):
            values, out = make(1000).normal_(), torch.zeros(1000)
            near.answer(peer.call(Clerk.mirror, values, out))
            assert torch.equal(out, values)


@pytest.mark.parametrize(("dtype", "wire"), [("float64", "bfloat16"), ("float32", "float16"), ("int32", "bfloat16")])
def test_a_narrowing_that_is_none_of_ours_is_refused(dtype: str, wire: str) -> None:
    assert frames.body_bytes(TensorReference("float32", 10, wire="bfloat16")) == 20
    with pytest.raises(ProtocolError):
        frames.body_bytes(TensorReference(dtype, 10, wire=wire))


# TLS


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    pytest.importorskip("cryptography")
    return new_certificate()


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_calls_under_tls_are_the_same_calls_and_nothing_of_them_can_be_read(
    town: Town, certificate: Certificate, wire_dtype: Any
) -> None:
    wire = Wire(certificate=certificate, dtype=wire_dtype)
    with closing(FaultProxy(town.serve(Clerk(), wire=wire), piece_bytes=1009)) as proxy:
        peer = town.peer(proxy.address, wire=wire)
        for length in (0, 1, 4096, 300_001):
            values, out = torch.randn(length), torch.zeros(length)
            town.answer(peer.call(Clerk.mirror, values, out))
            assert torch.equal(out, values if wire_dtype == "float32" else values.bfloat16().float())
        assert b"mirror" not in proxy.heard[0]
        assert values.numpy().tobytes()[:64] not in proxy.heard[0]


def test_on_one_host_calls_share_memory_and_nothing_is_encrypted(certificate: Certificate) -> None:
    wire = Wire(certificate=certificate)
    with closing(Town("shared_memory")) as near:
        peer = near.peer(near.serve(Clerk(), wire=wire), wire=wire)
        values, out = (memory.allocate(1000, torch.float32) for _ in range(2))
        near.answer(peer.call(Clerk.mirror, values.fill_(1 / 3), out))
        assert torch.equal(out, values)


def test_many_calls_under_way_at_once_under_tls_all_arrive(town: Town, certificate: Certificate) -> None:
    wire = Wire(certificate=certificate)
    peer = town.peer(town.serve(Clerk(), wire=wire), wire=wire)
    values = [torch.full((100_000,), float(number)) for number in range(20)]
    outs = [torch.zeros(100_000) for _ in values]
    for future in [peer.call(Clerk.mirror, value, out) for value, out in zip(values, outs, strict=True)]:
        town.answer(future)
    assert all(torch.equal(value, out) for value, out in zip(values, outs, strict=True))


def test_under_tls_a_link_that_is_cut_is_a_lost_peer_and_the_next_call_connects_again(
    town: Town, certificate: Certificate
) -> None:
    wire = Wire(certificate=certificate)
    # In the handshake, in the proofs, in a body.
    with closing(FaultProxy(town.serve(Clerk(), wire=wire), [300, 3000, 200_000])) as proxy:
        peer = town.peer(proxy.address, wire=wire)
        values, out = torch.randn(100_000), torch.zeros(100_000)
        for _ in range(3):
            with pytest.raises((PeerLost, AuthenticationError)):
                town.answer(peer.call(Clerk.mirror, values, out))
        town.answer(peer.call(Clerk.mirror, values, out))
        assert torch.equal(out, values)


def test_who_does_not_hold_the_jobs_certificate_is_refused_on_either_side(town: Town, certificate: Certificate) -> None:
    ours = Wire(certificate=certificate)
    others = {"another certificate": Wire(certificate=new_certificate()), "none": Wire()}
    for other in others.values():
        with pytest.raises((AuthenticationError, PeerLost, DeadlineExceeded)):
            town.answer(town.peer(town.serve(Clerk(), wire=other), 1.0, wire=ours).call(Clerk.thirds, torch.ones(1)))
    address = town.serve(Clerk(), wire=ours)
    strict = town.endpoints[-1]
    with pytest.raises((AuthenticationError, PeerLost)):
        town.answer(town.peer(address, wire=others["another certificate"]).call(Clerk.thirds, torch.ones(1)))
    town.work(10)
    assert strict.refused == {door.NO_KEY: 1}
    with pytest.raises(DeadlineExceeded):  # it waits for a challenge that comes under TLS only
        town.answer(town.peer(address, 0.3).call(Clerk.thirds, torch.ones(1)))
    assert isinstance(address, tuple)
    with socket.create_connection(address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        town.until(lambda: strict.refused[door.NO_KEY] == 2)
    assert town.answer(town.peer(address, wire=ours).call(Clerk.thirds, torch.ones(1))) is None


@pytest.mark.parametrize("held", [False, True], ids=["no certificate", "an older TLS"])
def test_a_stranger_who_verifies_nobody_is_refused_without_a_certificate_and_with_an_older_tls(
    town: Town, certificate: Certificate, held: bool, tmp_path: Path
) -> None:
    address = town.serve(Clerk(), wire=Wire(certificate=certificate))
    assert isinstance(address, tuple)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if held:
        (tmp_path / "both.pem").write_bytes(certificate.private + certificate.public)
        context.load_cert_chain(tmp_path / "both.pem")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    heard: list[bytes] = []

    def come() -> None:
        with contextlib.suppress(OSError), context.wrap_socket(socket.create_connection(address, 5.0)) as link:
            heard.append(link.recv(100))

    coming = threading.Thread(target=come)
    coming.start()
    town.until(lambda: not coming.is_alive())
    coming.join()
    assert not b"".join(heard)
    assert town.endpoints[0].refused == {door.NO_KEY: 1}


@pytest.mark.parametrize("secure", [False, True], ids=["open", "tls"])
def test_a_stranger_who_has_hung_up_before_he_is_let_in_ends_nobody_but_himself(
    town: Town, certificate: Certificate, secure: bool
) -> None:
    wire = Wire(certificate=certificate) if secure else Wire()
    address = town.serve(Clerk(), wire=wire)
    assert isinstance(address, tuple)
    for _ in range(3):
        stranger = socket.create_connection(address)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()  # with a reset, which is there before anybody has looked
    town.work(10)
    assert not town.endpoints[0]._connections
    assert town.answer(town.peer(address, wire=wire).call(Clerk.thirds, torch.ones(1))) is None


def test_the_jobs_key_is_asked_for_under_tls_as_well(town: Town, certificate: Certificate) -> None:
    wire = Wire(certificate=certificate)
    address = town.serve(Clerk(), wire=wire)
    with pytest.raises(PeerLost):
        town.answer(town.peer(address, wire=wire, key=b"another").call(Clerk.thirds, torch.ones(1)))
    assert town.endpoints[0].refused == {door.NO_KEY: 1}


def test_a_certificate_shows_nobody_its_private_key(certificate: Certificate) -> None:
    assert b"PRIVATE KEY" in certificate.private
    assert "PRIVATE" not in repr(Wire(certificate=certificate))


def test_without_the_package_for_certificates_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigurationError, match="cryptography"):
        new_certificate()


# a host that falls silent

FAR = """
import socket, sys, torch
from tests.test_channel_wire import Clerk
from distbelief.channel.endpoint import Endpoint
endpoint = Endpoint(b"key", role=Clerk(), listeners=[socket.create_server((sys.argv[1], 9000))])
print(flush=True)
while True:
    endpoint.poll(60.0)
"""
NEAR = """
import json, sys, time, torch
from tests.test_channel_wire import Clerk
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.peer import Peer, at
from distbelief.errors import ChannelError
endpoint = Endpoint(b"key")
peer = Peer(endpoint, at((sys.argv[1], 9000)))
def call(length):
    started = time.monotonic()
    try:
        peer.call(Clerk.thirds, torch.ones(length)).result()
        said = "answered"
    except ChannelError as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([said, time.monotonic() - started]), flush=True)
for line in sys.stdin:
    call(int(line))
"""


@pytest.mark.slow
def test_calls_to_a_host_whose_link_is_cut_end_within_two_seconds_and_go_on_when_it_is_healed() -> None:
    if reason := Hosts.missing():
        pytest.skip(reason)
    with Hosts(2) as hosts:
        far = hosts.python(1, "-c", FAR, hosts.addresses[1], stdout=subprocess.PIPE, text=True)
        near = hosts.python(
            0, "-c", NEAR, hosts.addresses[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert far.stdout is not None
        assert near.stdin is not None
        assert near.stdout is not None
        far.stdout.readline()

        def call(length: int) -> tuple[str, float]:
            print(length, file=near.stdin, flush=True)
            said, seconds = json.loads(near.stdout.readline())  # type: ignore[union-attr]
            return said, seconds

        assert call(100)[0] == "answered"
        hosts.cut(1)
        said, seconds = call(100)
        assert said.startswith("PeerLost: the peer is out of reach: its host has been silent for 1.5 s")
        assert 1.4 < seconds < 2.2
        hosts.heal(1)
        assert call(100)[0] == "answered"
        # In the midst of an answer.
        hosts.shape(1, 100e6)
        print(5_000_000, file=near.stdin, flush=True)
        time.sleep(0.5)
        hosts.cut(1)
        said, seconds = json.loads(near.stdout.readline())
        assert said.startswith("PeerLost")
        assert seconds < 3.0
        hosts.heal(1)
        assert call(100)[0] == "answered"
