# SPDX-License-Identifier: Apache-2.0
"""Laws of calls between endpoints, on shared memory and over TCP: strangers, mistakes, deadlines, order, background."""

import contextlib
import gc
import os
import resource
import secrets
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import Town

from distbelief.channel import frames, memory
from distbelief.channel.authenticate import AcceptingSide, CallingSide
from distbelief.channel.base import Future, Out, exported, signature_of
from distbelief.channel.connection import Connection
from distbelief.channel.door import STRANGERS
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.frames import Answer, Call
from distbelief.channel.futures import BackgroundWork, Kept, PendingCall
from distbelief.channel.peer import Peer, at
from distbelief.channel.place import Address
from distbelief.errors import (
    AuthenticationError,
    CheckpointError,
    DeadlineExceeded,
    Fenced,
    NotReady,
    PeerLost,
    ProtocolError,
    RemoteError,
)

AS_THEMSELVES = {kind.__name__: kind for kind in (Fenced, NotReady, CheckpointError, ProtocolError)}


class Clerk:
    """A role that answers, refuses and makes mistakes."""

    def __init__(self) -> None:
        self.notes: list[int] = []
        self.meanwhile: Callable[[], Any] = lambda: None
        self.endpoint: Endpoint | None = None

    @exported
    def note(self, number: int) -> list[int]:
        self.notes.append(number)
        return self.notes

    @exported
    def greet(self, name: str, times: int = 1) -> str:
        return f"hello {name}" * times

    @exported
    def divide(self, number: int) -> float:
        return number / 0

    @exported
    def refuse(self, kind: str) -> None:
        raise AS_THEMSELVES[kind]("these are the reasons")

    @exported
    def rant(self, length: int) -> None:
        raise ValueError("\udcff" * length)

    @exported
    def promise_a_number(self) -> int:
        return "a word"  # type: ignore[return-value]

    @exported
    def hand_out(self) -> Any:
        return self

    @exported
    def wait(self) -> Any:
        return self.meanwhile()

    @exported
    def fill(self, value: float, out: Out) -> int:
        out.fill_(value)
        return len(out)

    @exported
    def total(self, values: torch.Tensor) -> float:
        return float(values.sum())

    @exported
    def total_later(self, values: torch.Tensor) -> Future[float]:
        assert self.endpoint is not None

        def work() -> float:
            self.meanwhile()
            return float(values.sum())

        def begin(run: Callable[[], None]) -> None:
            threading.Thread(target=run, name="distbelief-background", daemon=True).start()

        return BackgroundWork(work, self.endpoint, begin)

    def secret(self) -> str:
        return "not for callers"

    def _private(self) -> str:
        return "not for callers either"


@pytest.fixture
def clerk() -> Clerk:
    return Clerk()


@pytest.fixture
def address(town: Town, clerk: Clerk) -> Address:
    """Where the clerk answers."""
    found = town.serve(clerk)
    clerk.endpoint = town.endpoints[-1]
    return found


@pytest.fixture
def peer(town: Town, address: Address) -> Peer[Clerk]:
    """Somebody who may call the clerk."""
    return town.peer(address)


@pytest.fixture
def stranger(address: Address) -> Iterator[Callable[[], socket.socket]]:
    """Plain sockets connected to the clerk, by somebody who need not know the key."""
    made: list[socket.socket] = []

    def connect() -> socket.socket:
        link = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
        link.connect(address)
        link.settimeout(5.0)
        made.append(link)
        return link

    yield connect
    for link in made:
        link.close()


def is_refused(town: Town, link: socket.socket) -> bool:
    """Whether the clerk closes the connection, saying nothing but its challenge."""
    town.work(5)
    said = b""
    try:
        while chunk := link.recv(4096):
            said += chunk
    except ConnectionResetError:
        pass
    return len(said) <= AcceptingSide(town.key).wanted_bytes // 2


# strangers


@pytest.mark.parametrize("length", [64, 65, 5000])
def test_random_bytes_are_refused_and_others_are_served(
    town: Town, clerk: Clerk, peer: Peer[Clerk], stranger: Callable[[], socket.socket], length: int
) -> None:
    link = stranger()
    link.sendall(secrets.token_bytes(length))
    assert is_refused(town, link)
    assert town.answer(peer.call(Clerk.note, 1)) == [1]


def test_a_caller_who_says_half_of_something_holds_nobody_up(
    town: Town, clerk: Clerk, peer: Peer[Clerk], stranger: Callable[[], socket.socket]
) -> None:
    for half in (b"", b"x", secrets.token_bytes(63)):
        stranger().sendall(half)
    knowing = proved(town, stranger())
    knowing.sendall(frames.encode(Call(1, "note", b""), 0)[:-1])
    assert town.answer(peer.call(Clerk.note, 1)) == [1]


def proved(town: Town, link: socket.socket) -> socket.socket:
    """A plain socket after the exchange of proofs."""
    side = CallingSide(town.key)
    town.work(10)
    link.sendall(side.take(link.recv(32))[0])
    town.work(3)
    assert side.take(link.recv(32)) == (b"", True)
    return link


def test_a_flood_of_strangers_takes_no_more_than_its_share_and_others_are_served(
    town: Town, clerk: Clerk, peer: Peer[Clerk], stranger: Callable[[], socket.socket]
) -> None:
    assert town.answer(peer.call(Clerk.note, 1)) == [1]
    links = [stranger() for _ in range(STRANGERS + 50)]
    town.work(STRANGERS + 60)
    for link in links[:50]:
        assert is_refused(town, link)
    assert town.answer(peer.call(Clerk.note, 2)) == [1, 2]
    assert town.answer(town.peer(peer.locate().result()).call(Clerk.note, 3)) == [1, 2, 3]


@contextlib.contextmanager
def descriptors_to_spare(count: int) -> Iterator[None]:
    """This process can open so many files and no more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    fillers = [os.open(os.devnull, os.O_RDONLY)]
    while fillers[-1] < highest:
        fillers.append(os.dup(fillers[0]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 1 + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in fillers:
            os.close(descriptor)


def test_strangers_cannot_use_up_the_descriptors_of_a_role(
    town: Town, clerk: Clerk, address: Address, stranger: Callable[[], socket.socket]
) -> None:
    for _ in range(100):
        stranger()
    peer = town.peer(address)
    future = peer.call(Clerk.note, 1)
    with descriptors_to_spare(4):
        assert town.answer(future) == [1]


def test_a_caller_for_whom_a_role_has_no_descriptor_waits_until_there_is_one(town: Town, clerk: Clerk) -> None:
    future = town.peer(town.serve(clerk)).call(Clerk.note, 1)
    with descriptors_to_spare(0):
        town.work(3)
        assert not future.done()
    assert town.answer(future) == [1]


def test_nothing_is_parsed_before_the_caller_has_proved_himself(
    town: Town, clerk: Clerk, peer: Peer[Clerk], stranger: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = signature_of(Clerk.note)
    parsed: list[Any] = []
    decode = frames.decode_header

    def watched(*given: Any) -> Any:
        parsed.append(given)
        return decode(*given)

    monkeypatch.setattr(frames, "decode_header", watched)
    link = stranger()
    link.sendall(frames.encode(Call(1, "note", signature.split((1,), {})[0])) * 5)
    assert is_refused(town, link)
    assert (parsed, clerk.notes) == ([], [])
    town.answer(peer.call(Clerk.note, 1))
    assert len(parsed) == 2, "the call and its answer are parsed"


@pytest.mark.parametrize("town", ["shared_memory"], indirect=True)
def test_descriptors_of_a_stranger_are_not_taken(town: Town, stranger: Callable[[], socket.socket]) -> None:
    link = stranger()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with open("/dev/null") as file:
        for _ in range(20):
            socket.send_fds(link, [b"x"], [file.fileno()] * 4)
            town.work()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1, "only the accepted connection is new"


# keys


def test_a_caller_with_another_key_is_refused_and_others_are_served(
    town: Town, clerk: Clerk, peer: Peer[Clerk]
) -> None:
    liar = town.peer(peer.locate().result(), key=b"another key, which is no secret.")
    with pytest.raises(PeerLost):
        town.answer(liar.call(Clerk.note, 1))
    assert town.answer(peer.call(Clerk.note, 2)) == [2]


@pytest.mark.parametrize("say", [secrets.token_bytes, bytes, lambda length: None], ids=["noise", "zeros", "an echo"])
def test_a_caller_sends_nothing_to_a_server_that_does_not_know_the_key(
    town: Town, say: Callable[[int], bytes | None]
) -> None:
    with town.listen() as listener:
        future = town.peer(town.address(listener)).call(Clerk.note, 1)
        link, _ = listener.accept()
        with link:
            link.sendall(secrets.token_bytes(32))
            town.work(3)
            heard = link.recv(4096)
            assert len(heard) == 64, "a nonce and a proof, and nothing of the call"
            link.sendall(say(32) or heard[32:])
            with pytest.raises(AuthenticationError):
                town.answer(future)
            assert link.recv(4096) == b""


def test_a_man_who_plays_a_proof_back_is_refused(
    town: Town, clerk: Clerk, stranger: Callable[[], socket.socket]
) -> None:
    first, second = stranger(), stranger()
    side = CallingSide(town.key)
    town.work(3)
    proof, _ = side.take(first.recv(32))
    second.sendall(proof)
    assert is_refused(town, second)
    first.sendall(proof)
    town.work(3)
    assert side.take(first.recv(32)) == (b"", True), "the proof is good where it belongs"


# mistakes


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (Clerk.note, ("one",)),
        (Clerk.note, (1.5,)),
        (Clerk.note, (None,)),
        (Clerk.greet, (1, 1)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_call_with_wrong_types_is_a_protocol_error_of_the_caller(
    town: Town, peer: Peer[Clerk], method: Any, arguments: tuple[Any, ...]
) -> None:
    signature = signature_of(method)
    fields = signature.fields_encoder.encode(arguments)
    with pytest.raises(ProtocolError):
        town.answer(peer.start(signature, fields, []))
    assert town.answer(peer.call(Clerk.greet, "you", 1)) == "hello you"


def test_an_answer_of_the_wrong_type_is_a_protocol_error(town: Town, peer: Peer[Clerk]) -> None:
    with pytest.raises(ProtocolError, match="promise_a_number"):
        town.answer(peer.call(Clerk.promise_a_number))


def test_a_call_with_another_number_of_tensors_is_a_protocol_error_of_the_caller(town: Town, peer: Peer[Any]) -> None:
    class Another:
        @exported
        def total(self, one: torch.Tensor, two: torch.Tensor) -> float: ...

    with pytest.raises(ProtocolError, match="total takes 1 tensors, 2 came"):
        town.answer(peer.call(Another.total, torch.zeros(3), torch.zeros(0)))
    assert town.answer(peer.call(Clerk.note, 1)) == [1]


def test_an_answer_that_is_no_text_is_a_protocol_error_and_not_the_end_of_the_caller(peer: Peer[Clerk]) -> None:
    pending = PendingCall(peer.endpoint, signature_of(Clerk.greet), [], 5.0)
    pending.take(Answer(1, b"\xa2\xff\xfe"))
    with pytest.raises(ProtocolError, match="answer to greet"):
        pending.result()


def test_a_call_that_is_answered_holds_none_of_its_tensors_any_more(town: Town, peer: Peer[Clerk]) -> None:
    values, out = torch.ones(10), torch.zeros(10)
    answers = [peer.call(Clerk.total, values), peer.call(Clerk.fill, 1.0, out)]
    assert [town.answer(answer) for answer in answers] == [10.0, 10]
    held = [weakref.ref(values), weakref.ref(out)]
    del values, out
    gc.collect()
    assert [each() for each in held] == [None, None]


@pytest.mark.parametrize("name", ["__init__", "__reduce__", "__class__", "secret", "_private", "notes", "", "note\0"])
def test_what_is_not_exported_cannot_be_called(town: Town, peer: Peer[Clerk], name: str) -> None:
    forged = replace(signature_of(Clerk.hand_out), name=name)
    with pytest.raises(ProtocolError, match="exports no method"):
        town.answer(peer.start(forged, forged.fields_encoder.encode(()), []))


def test_a_call_to_a_method_that_is_not_exported_is_not_even_made(peer: Peer[Clerk]) -> None:
    with pytest.raises(TypeError, match="secret is not exported"):
        peer.call(Clerk.secret)


def test_a_method_that_raises_gives_its_traceback_to_the_caller(town: Town, peer: Peer[Clerk]) -> None:
    with pytest.raises(RemoteError, match=r"(?s)in divide.*return number / 0.*ZeroDivisionError"):
        town.answer(peer.call(Clerk.divide, 1))
    with pytest.raises(RemoteError, match=r"ValueError: \?+"):
        town.answer(peer.call(Clerk.rant, 5))
    with pytest.raises(RemoteError):
        town.answer(peer.call(Clerk.rant, frames.HEADER_LIMIT + 1))
    assert town.answer(peer.call(Clerk.note, 1)) == [1]


@pytest.mark.parametrize("kind", AS_THEMSELVES)
def test_an_error_that_callers_act_on_comes_back_as_itself(town: Town, peer: Peer[Clerk], kind: str) -> None:
    with pytest.raises(AS_THEMSELVES[kind], match=r"^these are the reasons$"):
        town.answer(peer.call(Clerk.refuse, kind))


def test_an_answer_that_cannot_travel_is_the_callers_error_and_others_are_served(town: Town, peer: Peer[Clerk]) -> None:
    with pytest.raises(RemoteError, match="TypeError"):
        town.answer(peer.call(Clerk.hand_out))
    assert town.answer(peer.call(Clerk.note, 1)) == [1]


def test_a_method_that_waits_is_an_error(town: Town, clerk: Clerk, peer: Peer[Clerk]) -> None:
    assert clerk.endpoint is not None
    other: Peer[Clerk] = Peer(clerk.endpoint, at(town.serve(Clerk())))
    clerk.meanwhile = lambda: other.call(Clerk.note, 1).result()
    with pytest.raises(RemoteError, match="must not wait for a future"):
        town.answer(peer.call(Clerk.wait))


def test_a_method_that_asks_whether_a_call_is_done_still_runs_alone(
    town: Town, clerk: Clerk, peer: Peer[Clerk]
) -> None:
    assert clerk.endpoint is not None
    other: Peer[Clerk] = Peer(clerk.endpoint, at(town.serve(Clerk())))
    second = town.peer(peer.locate().result())
    town.answer(second.call(Clerk.note, 0))
    seen: list[list[int]] = []

    def ask() -> None:
        future = second.call(Clerk.note, 1)
        for _ in range(10):
            other.call(Clerk.note, 7).done()
        seen.append(list(clerk.notes))
        assert not future.done()

    clerk.meanwhile = ask
    town.answer(peer.call(Clerk.wait))
    assert seen == [[0]], "another call was answered inside of a method"


# order, deadlines, losses


def test_calls_of_one_caller_run_in_the_order_they_were_made(town: Town, clerk: Clerk, peer: Peer[Clerk]) -> None:
    values = torch.zeros(100_000)
    futures: list[Any] = []
    for number in range(200):
        futures.append(peer.call(Clerk.total, values) if number % 10 == 3 else peer.call(Clerk.note, number))
    for future in futures:
        town.answer(future)
    assert clerk.notes == [number for number in range(200) if number % 10 != 3]


@pytest.mark.parametrize("deadline_seconds", [0.05, 0.3])
def test_a_call_to_a_silent_peer_ends_at_its_deadline(town: Town, address: Address, deadline_seconds: float) -> None:
    future = town.peer(address, deadline_seconds).call(Clerk.note, 1)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="note was not answered within"):
        future.result()
    assert deadline_seconds - 0.02 <= time.monotonic() - started < deadline_seconds + 0.5


def test_who_would_wait_longer_waits_until_the_deadline(town: Town, address: Address) -> None:
    future, started = town.peer(address, 0.2).call(Clerk.note, 1), time.monotonic()  # nobody lets the clerk work
    assert future.wait(20.0)
    assert time.monotonic() - started < 2.0
    with pytest.raises(DeadlineExceeded):
        future.result()


def test_who_gives_up_a_call_whose_answer_has_just_come_loses_no_other_call(town: Town, peer: Peer[Clerk]) -> None:
    answered = peer.call(Clerk.note, 1)
    town.answer(answered)
    other = peer.call(Clerk.note, 2)
    assert isinstance(answered, PendingCall)
    peer.endpoint.give_up(answered, "its deadline has passed")  # as another thread may that asked a moment before
    assert answered.result() == [1]
    assert town.answer(other) == [1, 2]


def test_a_late_answer_writes_nothing_into_the_callers_memory(town: Town, clerk: Clerk, address: Address) -> None:
    caller = town.peer(address, 0.1)
    town.answer(caller.call(Clerk.note, 1))
    outs = [memory.allocate(1000, torch.float32), torch.zeros(1000)]
    for out in outs:
        with pytest.raises(DeadlineExceeded):
            caller.call(Clerk.fill, 7.0, out).result()
    town.work(20)
    assert not any(out.any() for out in outs)
    assert town.answer(caller.call(Clerk.fill, 8.0, outs[0])) == 1000, "the next call makes a new connection"
    assert outs[0].eq(8.0).all()


def test_a_peer_that_goes_away_in_the_middle_of_a_call_is_lost_at_once(town: Town, clerk: Clerk) -> None:
    listener = town.listen()
    server = town.endpoint(clerk, listener)
    caller = town.peer(town.address(listener))
    town.answer(caller.call(Clerk.note, 1))
    future = caller.call(Clerk.note, 2)
    server.close()
    town.endpoints.remove(server)
    started = time.monotonic()
    with pytest.raises(PeerLost):
        future.result()
    with pytest.raises(PeerLost, match="nothing answers at"):
        caller.call(Clerk.note, 3).result()
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("numbers", [0, 3, 5])
def test_a_call_whose_body_is_not_as_long_as_its_tensors_is_not_answered(
    town: Town, clerk: Clerk, peer: Peer[Clerk], numbers: int
) -> None:
    town.answer(peer.call(Clerk.note, 1))
    clerk.meanwhile = lambda: clerk.note(2)
    own, serving = (next(iter(endpoint._connections)) for endpoint in reversed(town.endpoints))
    for method, tensors in (("wait", []), ("total", [frames.TensorReference("float32", 4)])):
        call = frames.Call(7, method, msgspec.msgpack.encode([]), tensors)
        body = bytes(4 * numbers if tensors else 0)
        own.send(frames.encode(call, len(body)), [memoryview(body)])
    town.work(5)
    assert serving.closed
    assert clerk.notes == [1, 2]


@pytest.mark.parametrize("numbers", [0, 3, 5])
def test_an_answer_whose_body_is_not_as_long_as_its_tensors_is_none(
    town: Town, peer: Peer[Clerk], numbers: int
) -> None:
    town.answer(peer.call(Clerk.note, 1))
    serving = next(iter(town.endpoints[0]._connections))
    out = torch.zeros(4)
    future = peer.call(Clerk.fill, 1.0, out)
    body = bytes(4 * numbers)
    serving.send(frames.encode(frames.Answer(2, msgspec.msgpack.encode(4)), len(body)), [memoryview(body)])
    with pytest.raises(ProtocolError, match=f"carries {4 * numbers} bytes of tensors, its header says 16"):
        town.answer(future)
    assert out.tolist() == [0.0] * 4


# beside the role


def test_what_lies_behind_on_a_connection_that_has_ended_is_not_answered(
    town: Town, clerk: Clerk, peer: Peer[Clerk]
) -> None:
    town.answer(peer.call(Clerk.note, 1))
    serving = town.endpoints[0]

    def end() -> None:
        for connection in list(serving._connections):
            serving.end(connection, "it is over")

    clerk.meanwhile = end
    peer.call(Clerk.wait)
    behind = peer.call(Clerk.note, 2)
    with pytest.raises(PeerLost):
        town.answer(behind)
    assert clerk.notes == [1]


def test_background_work_answers_later_while_others_are_served(town: Town, clerk: Clerk, peer: Peer[Clerk]) -> None:
    gate = threading.Event()
    clerk.meanwhile = lambda: gate.wait(20.0)
    later = peer.call(Clerk.total_later, torch.ones(1000))
    other = town.peer(peer.locate().result())
    assert town.answer(other.call(Clerk.note, 1)) == [1]
    assert town.answer(peer.call(Clerk.total, torch.full((1000,), 2.0))) == 2000.0
    assert not later.done()
    gate.set()
    assert town.answer(later) == 1000.0, "the work reads its own call's tensor, not the next one's"


def test_background_work_that_raises_and_a_caller_that_does_not_wait_for_it_harm_nobody(
    town: Town, clerk: Clerk, peer: Peer[Clerk]
) -> None:
    clerk.meanwhile = lambda: 1 / 0
    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        town.answer(peer.call(Clerk.total_later, torch.ones(10)))
    gate = threading.Event()
    clerk.meanwhile = lambda: gate.wait(20.0)
    impatient = town.peer(peer.locate().result())
    future = impatient.call(Clerk.total_later, torch.ones(10))
    town.work(10)
    town.endpoints.remove(impatient.endpoint)
    impatient.endpoint.close()
    with pytest.raises(PeerLost):
        future.result()
    gate.set()
    town.work(10)
    assert town.answer(peer.call(Clerk.note, 1)) == [1]


def test_who_waits_is_woken_by_what_another_thread_keeps_or_has_done() -> None:
    with closing(Endpoint(Town.key)) as endpoint:
        kept: Kept[int] = Kept(endpoint)
        works = [lambda: kept.keep(1), lambda: BackgroundWork(int, endpoint, lambda run: run())]
        for work in works:
            timer = threading.Timer(0.05, work)
            started = time.monotonic()
            timer.start()
            endpoint.poll(5.0)
            assert 0.04 < time.monotonic() - started < 2.0
            timer.join()


def test_who_waits_for_a_promise_waits_as_long_as_asked() -> None:
    with closing(Endpoint(Town.key)) as endpoint:
        started = time.monotonic()
        assert not Kept(endpoint).wait(0.1)
        assert 0.1 <= time.monotonic() - started < 0.5


def test_who_waits_hears_of_background_work_that_ends_its_thread() -> None:
    with closing(Endpoint(Town.key)) as endpoint:
        work = BackgroundWork(
            lambda: sys.exit("enough"), endpoint, lambda run: threading.Thread(target=run).start()
        )  # fmt: skip
        assert work.wait(5.0)
        with pytest.raises(SystemExit, match="enough"):
            work.result()


def test_a_background_endpoint_sends_and_receives_while_its_owner_computes(town: Town, clerk: Clerk) -> None:
    address = town.serve(clerk)
    caller = Endpoint(town.key)
    caller.background()
    try:
        peer: Peer[Clerk] = Peer(caller, at(address))
        sent, received = torch.ones(4 << 20), torch.zeros(4 << 20)
        total, filled = peer.call(Clerk.total, sent), peer.call(Clerk.fill, 3.0, received)
        # Only the server is let work here: the caller's thread must do the rest by itself.
        town.until(lambda: bool(received[-1] == 3.0))
        town.until(lambda: not caller._pending)
        assert (total.result(), filled.result()) == (float(4 << 20), 4 << 20)
        assert received.eq(3.0).all()
    finally:
        caller.close()


def test_an_answer_that_comes_while_its_caller_is_about_to_wait_is_not_waited_for(
    town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, held = Endpoint(town.key), threading.Event()
    caller.background()

    def answer() -> None:
        with caller.lock:  # as the thread that polls, which takes in a large body
            held.set()
            time.sleep(0.1)
            future.settle(7)  # type: ignore[attr-defined]

    def poll(seconds: float) -> None:
        assert threading.current_thread() is not threading.main_thread(), "it waits though the answer is there"

    try:
        future = Peer[Clerk](caller, at(town.serve(clerk))).call(Clerk.note, 1)
        assert caller._background is not None
        monkeypatch.setattr(caller._background, "_poll", poll)
        answering = threading.Thread(target=answer)
        answering.start()
        held.wait()
        assert future.wait(10.0)
        answering.join()
        assert future.result() == 7
    finally:
        caller.close()


def test_a_call_that_fails_at_once_keeps_nothing_of_its_callers_memory(
    town: Town, peer: Peer[Clerk], monkeypatch: pytest.MonkeyPatch
) -> None:
    town.answer(peer.call(Clerk.note, 1))

    def send(*_: object, **__: object) -> None:
        raise PeerLost("the peer is gone")

    monkeypatch.setattr(Connection, "send", send)
    future = peer.call(Clerk.fill, 3.0, torch.zeros(3))
    assert isinstance(future, PendingCall)
    assert future.settled
    assert not future.tensors
    assert not future.parts


def test_who_asks_whether_an_answer_is_there_does_not_wait_for_what_is_being_received(town: Town, clerk: Clerk) -> None:
    caller, held, asked = Endpoint(town.key), threading.Event(), threading.Event()
    caller.background()
    in_time = []

    def receive() -> None:
        with caller.lock:  # as the thread that polls, which takes in a large body
            held.set()
            in_time.append(asked.wait(2.0))

    try:
        future = Peer[Clerk](caller, at(town.serve(clerk))).call(Clerk.note, 1)
        receiving = threading.Thread(target=receive)
        receiving.start()
        held.wait()
        assert not future.done()
        asked.set()
        receiving.join()
        assert in_time == [True]
    finally:
        caller.close()


def test_an_errand_is_done_until_it_is_over_and_may_give_another_or_have_a_round_done_meanwhile() -> None:
    done: list[str] = []
    with closing(Endpoint(Town.key)) as endpoint:

        def again() -> bool:
            done.append("again")
            return done.count("again") == 3

        def once() -> bool:
            done.append("once")
            endpoint.attend(again)
            endpoint.poll(0.0)
            return True

        endpoint.attend(once)
        for _ in range(5):
            endpoint.poll(0.0)
    assert done == ["once", "again", "again", "again"]


def test_an_endpoint_that_is_not_closed_is_seen_by_the_leak_check(
    town: Town, clerk: Clerk, leaks: Callable[[], list[str]]
) -> None:
    assert leaks() == []
    town.serve(clerk)
    background = town.endpoint()
    background.background()
    found = " ".join(leaks())
    assert "socket:[" in found
    assert "thread distbelief-channel" in found
    assert ("socket @distbelief-test" in found) == (town.transport != "tcp")
