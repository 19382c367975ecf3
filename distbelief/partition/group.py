# SPDX-License-Identifier: Apache-2.0
"""The partitions of one model replica, as one of them sees them.

A replica is a world of its own: its group is formed over a store that only its partitions know, and breaks as a whole.
Whoever finds it broken gets PeerLost or DeadlineExceeded, closes it, and forms another.
"""

import datetime
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import msgspec
import torch
import torch.distributed as dist

from distbelief.channel import mailbox
from distbelief.channel.mailbox import Mailbox
from distbelief.channel.spin import Spin
from distbelief.engine.listener import LOOPBACK
from distbelief.errors import ChannelError, DeadlineExceeded, PeerLost
from distbelief.partition.staging import StagingGroup, host_memory

DEFAULT_BACKEND, STAGING_BACKEND = "gloo_at_address", "staged_gloo"
"""What torch calls gloo of ours: its own listens where the name of the host leads, or an environment variable."""
TOLD_BYTES, LENGTH_BYTES = 512, 2
_CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where one partition computes, and what it has there for itself."""

    device: torch.device = _CPU
    own_device: bool = False
    """Whether no two partitions share a device, so that they can talk over nccl where those are accelerators."""
    own_core: bool = False
    """Whether no other process of the job computes on its core."""
    address: str = LOOPBACK
    """Where the others reach this host."""

    @property
    def direct(self) -> bool:
        """Whether parcels go from accelerator to accelerator."""
        return self.own_device and self.device.type == "cuda"


_HERE = Site()


@final
class Group:
    """What one partition says to the others. One partition alone is a group, too, which has nothing to say."""

    def __init__(
        self, store: Any, index: int, size: int, site: Site = _HERE, *, deadline_seconds: float = 60.0
    ) -> None:  # fmt: skip
        """Meet the others over `store`, a torch.distributed.Store kept from here on; one partition alone needs none.

        This takes at most `deadline_seconds`, and so does every later wait. Raises DeadlineExceeded when not all
        of them come, PeerLost when one goes at once.
        """
        self.index, self.size = index, size
        self.device = site.device
        self.elements_sent = self.elements_received = 0
        """What swaps have moved, all told."""
        self.thread: torch.Tensor | None = None
        """The scalar that runs through the exchanges of a mini-batch, see `exchange`."""
        self._store = store
        """nccl asks it when the first parcel goes, and does not keep what Python adds to a store alive."""
        self._direct = site.direct
        self._spin = Spin(site.own_core)
        self._backend: Any = None
        self._mailboxes: dict[int, Mailbox] = {}
        """By partition; none where they are on several hosts, or talk over nccl."""
        self._deadline_seconds = deadline_seconds
        self._closed = False
        if size > 1:
            assert store is not None, "several partitions meet over a store"
            limit = datetime.timedelta(seconds=deadline_seconds)
            self._backend = self._attempt(lambda: self._form(store, limit, site.address))
            if not self._direct:
                self._mailboxes = self._attempt(lambda: mailbox.meet(store, index, size, deadline_seconds))

    def swap(self, parcels: Mapping[int, torch.Tensor], arrivals: Mapping[int, torch.Tensor]) -> "Swap":
        """Start sending the contiguous `parcels` and filling the contiguous `arrivals`, by partition; then wait.

        All of them are left alone until `Swap.wait` has returned. The partitions make their swaps in one order.
        """
        self.elements_sent += sum(parcel.numel() for parcel in parcels.values())
        self.elements_received += sum(arrival.numel() for arrival in arrivals.values())
        if not parcels and not arrivals:
            return Swap(self, [], [])
        if self.device.type == "cpu" or self._direct:
            return Swap(self, self._start(parcels, arrivals), [])
        # gloo moves host memory: several partitions of one accelerator meet in the host's.
        landings = {sender: host_memory(tensor) for sender, tensor in arrivals.items()}
        staged = {to: parcel.to("cpu") for to, parcel in parcels.items()}
        return Swap(self, self._start(staged, landings), [(arrivals[sender], landings[sender]) for sender in arrivals])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's `values`, a vector of one length and type, in the same order of addition for all."""
        total = values.clone()
        if self._mailboxes:
            own = values.to("cpu")
            said = {other: torch.empty_like(own) for other in self._mailboxes}
            self._post(dict.fromkeys(said, own), said)
            said[self.index] = own
            total.copy_(torch.stack([said[index] for index in range(self.size)]).sum(0))
        elif self.size > 1:
            self._collective(total, lambda tensor: self._backend.allreduce([tensor]))
        return total

    @property
    def leads(self) -> bool:
        """Whether this partition speaks for the replica: the last one, on which the output comes out."""
        return self.index == self.size - 1

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """What `tensor` is where it `leads`; the others' tensors say its shape and type, and are overwritten."""
        root = self.size - 1
        if self._mailboxes:
            staged = tensor.to("cpu").contiguous()
            if self.leads:
                self._post(dict.fromkeys(self._mailboxes, staged), {})
            else:
                self._post({}, {root: staged})
                if staged is not tensor:
                    tensor.copy_(staged)
        elif self.size > 1:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = root, 0
            self._collective(tensor, lambda staged: self._backend.broadcast([staged], options))
        return tensor

    def tell(self, kind: type[T], value: T | None) -> T:
        """What `value` is where it `leads`: a msgspec value of this kind, of some ten numbers; the others have none."""
        if self.size == 1:
            assert value is not None
            return value
        line = bytearray(TOLD_BYTES)
        if self.leads:
            text = msgspec.msgpack.encode(value)
            line[: LENGTH_BYTES + len(text)] = len(text).to_bytes(LENGTH_BYTES) + text
        assert len(line) == TOLD_BYTES, f"{value} is too long to be told"
        said = bytes(self.share(torch.frombuffer(line, dtype=torch.uint8)).tolist())
        return msgspec.msgpack.decode(said[LENGTH_BYTES:][: int.from_bytes(said[:LENGTH_BYTES])], type=kind)

    def any(self, *flags: bool) -> list[bool]:
        """For each of `flags`, whether it is set on any partition."""
        if self.size == 1:
            return list(flags)
        return [count > 0 for count in self.sum(torch.tensor(flags, dtype=torch.float64)).tolist()]

    def close(self) -> None:
        """Leave. Who waits for this partition learns of it at once; closing twice is fine."""
        backend, self._backend, self.thread, self._closed = self._backend, None, None, True
        for box in self._mailboxes.values():
            box.close()
        if backend is not None:
            backend.abort() if self._direct else backend.shutdown()

    def _form(self, store: Any, limit: datetime.timedelta, address: str) -> Any:
        if self._direct:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            return dist.ProcessGroupNCCL(store, self.index, self.size, options)
        return _gloo(store, self.index, self.size, limit, address)

    def _start(self, parcels: Mapping[int, torch.Tensor], arrivals: Mapping[int, torch.Tensor]) -> Sequence[Any]:
        def start() -> Sequence[Any]:
            if self._mailboxes:
                for sender, tensor in arrivals.items():
                    self._mailboxes[sender].receive(tensor)
                for to, tensor in parcels.items():
                    self._mailboxes[to].send(tensor)
                mailboxes = [self._mailboxes[other] for other in {*parcels, *arrivals}]
                return [_Posted(mailboxes, self._deadline_seconds, self._spin)]
            if self._direct:  # nccl pairs sends with receives within one coalesced call
                self._backend._start_coalescing()
            works = [self._backend.recv([tensor], sender, 0) for sender, tensor in arrivals.items()]
            works += [self._backend.send([tensor], to, 0) for to, tensor in parcels.items()]
            return [self._backend._end_coalescing()] if self._direct else works

        works: Sequence[Any] = self._attempt(start)
        return works

    def _post(self, parcels: Mapping[int, torch.Tensor], arrivals: Mapping[int, torch.Tensor]) -> None:
        """Send and receive in this host's memory, and wait for it."""
        for work in self._start(parcels, arrivals):
            self._attempt(work.wait)

    def _collective(self, tensor: torch.Tensor, start: Callable[[torch.Tensor], Any]) -> None:
        staged = tensor.to(self.device if self._direct else "cpu")
        self._attempt(lambda: start(staged).wait())
        if staged is not tensor:
            tensor.copy_(staged)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Do it; the backend's errors become ours."""
        if self._closed:
            raise PeerLost(f"partition {self.index} of {self.size} has left its group")
        try:
            return action()
        except (RuntimeError, ChannelError) as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> ChannelError:
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        kind = DeadlineExceeded if late or isinstance(error, DeadlineExceeded) else PeerLost
        told = "did not answer in time" if kind is DeadlineExceeded else "was lost"
        return kind(f"a partition of this replica {told}, says partition {self.index} of {self.size}: {error}")


def form_default_group(store: Any, index: int, size: int, deadline_seconds: float, site: Site) -> None:
    """Make the partitions of a replica this process's default process group, over which torch's pipelining talks."""
    limit = datetime.timedelta(seconds=deadline_seconds)
    if site.direct:
        torch.cuda.set_device(site.device)
        dist.init_process_group("nccl", store=store, rank=index, world_size=size, timeout=limit)
        return

    form = functools.partial(_gloo, address=site.address)

    def staged(*given: Any) -> StagingGroup:
        return StagingGroup(form(*given), index, size)

    backend, make = (DEFAULT_BACKEND, form) if site.device.type == "cpu" else (STAGING_BACKEND, staged)
    if backend not in dist.Backend.backend_list:
        dist.Backend.register_backend(backend, make, devices=[site.device.type])
    dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=limit)


def _gloo(store: Any, index: int, size: int, limit: datetime.timedelta, address: str) -> Any:
    """Reached there and nowhere else."""
    gloo: Any = dist.ProcessGroupGloo  # its options are not in torch's type stubs
    given = gloo._Options()
    given._timeout = limit
    given._devices = [gloo.create_device(hostname=address)]
    return gloo(store, index, size, given)


@final
class _Posted:
    """Parcels in mailboxes, with the face of the backend's works."""

    def __init__(self, mailboxes: Sequence[Mailbox], seconds: float, spin: Spin) -> None:
        self._mailboxes, self._seconds, self._spin = mailboxes, seconds, spin

    def wait(self) -> None:
        mailbox.settle(self._mailboxes, self._seconds, self._spin)


@final
class Swap:
    """Parcels under way between partitions."""

    def __init__(self, group: Group, works: Sequence[Any], landed: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._group, self._works, self._landed = group, works, landed

    def wait(self) -> None:
        """Return when all has been sent and has arrived. Raises PeerLost, DeadlineExceeded."""
        for work in self._works:
            self._group._attempt(work.wait)
        for arrival, landing in self._landed:
            arrival.copy_(landing, non_blocking=True)
