# SPDX-License-Identifier: Apache-2.0
"""Exchange: states that cross a boundary between partitions, forward and back (paper, section 3).

    send[j] = have[me] ∩ need[j]     receive[i] = have[i] ∩ need[me]     backward: the same, roles exchanged, adding

Every partition owns a box of a layer's units and needs a box of them: the receptive field of what it owns next. The
intersections travel, so a state crosses to a partition once however many edges cross. A need may reach outside the
layer, which is padding. The backward pass is the adjoint of the forward pass.

The exchanges of a mini-batch hang on one thread, a scalar that each of them takes and passes on. So every partition
runs the backward pass of every exchange it took part in, in the reverse order, even where it owns nothing upstream or
downstream: peers wait for each other, and messages of one pair match by their order.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch.autograd.function import FunctionCtx

from distbelief.errors import ConfigurationError
from distbelief.partition.box import Box, count, inside, intersect, sizes
from distbelief.partition.group import Group

Boxes = Sequence[Box | None]


def routes(have: Boxes, need: Boxes) -> dict[tuple[int, int], Box]:
    """What travels, by (sender, receiver); (i, i) is what i takes from its own.

    Owned boxes are disjoint, or everybody has everything; who has all it needs within the layer receives nothing.
    """
    found: dict[tuple[int, int], Box] = {}
    for receiver, wanted in enumerate(need):
        parts = {sender: part for sender, own in enumerate(have) if (part := intersect(own, wanted)) is not None}
        own = parts.get(receiver)
        if own is not None and all(intersect(part, own) == part for part in parts.values()):
            parts = {receiver: own}
        found |= {(sender, receiver): part for sender, part in parts.items()}
    return found


def traffic(have: Boxes, need: Boxes) -> int:
    """Elements per example that cross a boundary, forward."""
    return sum(count(box) for (sender, receiver), box in routes(have, need).items() if sender != receiver)


@final
class Exchange:
    """Brings every partition of `group` the box it needs of a value of which it owns another."""

    def __init__(
        self, have: Boxes, need: Boxes, group: Group, *, dtype: torch.dtype = torch.float32, fill: float = 0.0,
        batched: bool = True,
    ) -> None:  # fmt: skip
        """`fill` is the padding. Without `batched` the value has no batch in front, as a parameter has none."""
        self.group, self.dtype, self.fill, self.batched = group, dtype, fill, batched
        self.mine, self.wanted = have[group.index], need[group.index]
        crossing, me = routes(have, need), group.index
        self.own = crossing.pop((me, me), None)
        self.send = {receiver: box for (sender, receiver), box in crossing.items() if sender == me}
        self.receive = {sender: box for (sender, receiver), box in crossing.items() if receiver == me}

    def __call__(self, x: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """What this partition needs, of what all own: shape (batch, *sizes(need)); None where it needs nothing.

        `x` is what it owns, None for nothing. The answer may be a view of `x`. Raises PeerLost, DeadlineExceeded.
        """
        if x is not None and x.dtype != self.dtype:  # the others have made room for the planned one
            raise ConfigurationError(
                f"states of {x.dtype} are to cross between partitions; {self.dtype} was planned",
                hint="convert the model before it is planned, and use no autocast around a model cut by units",
            )
        if not self.batched:
            x, batch = None if x is None else x.unsqueeze(0), 1
        if not self.send and not self.receive:
            out = self._at_home(x)
        elif not (self.dtype.is_floating_point or self.dtype.is_complex) or not torch.is_grad_enabled():
            out = self._move(x, batch, forward=True)
        else:
            if self.group.thread is None:
                self.group.thread = torch.zeros((), device=self.group.device, requires_grad=True)
            out, self.group.thread = _Move.apply(x, self.group.thread, self, batch)  # type: ignore[no-untyped-call]
        if self.wanted is None or out is None:
            return None
        return out if self.batched else out.squeeze(0)

    def _at_home(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Nobody sends: a view of `x`, with padding around it where the need reaches outside."""
        if self.wanted is None:
            return None
        assert x is not None and self.mine is not None and self.own is not None  # noqa: PT018
        view = x[(slice(None), *inside(self.own, self.mine))]
        if self.own == self.wanted:
            return view
        around = [
            margin
            for (low, high), (start, stop) in zip(reversed(self.own), reversed(self.wanted), strict=True)
            for margin in (low - start, stop - high)
        ]
        return torch.nn.functional.pad(view, around, value=self.fill)

    def _move(self, x: torch.Tensor | None, batch: int, *, forward: bool) -> torch.Tensor:
        """Send boxes of `x`, gather others in a new tensor. Backward, `x` is the gradient of what was gathered."""
        source, target = (self.mine, self.wanted) if forward else (self.wanted, self.mine)
        send, receive = (self.send, self.receive) if forward else (self.receive, self.send)
        device = self.group.device
        parcels: dict[int, torch.Tensor] = {}
        packed: dict[Box, torch.Tensor] = {}
        for to, box in send.items():
            if box not in packed:
                assert x is not None
                assert source is not None
                part = x[(slice(None), *inside(box, source))]
                packed[box] = part.resolve_conj().resolve_neg().contiguous()
            parcels[to] = packed[box]
        arrivals = {
            sender: torch.empty((batch, *sizes(box)), dtype=self.dtype, device=device)
            for sender, box in receive.items()
        }
        swap = self.group.swap(parcels, arrivals)
        if target is None:
            swap.wait()
            return torch.empty(0, dtype=self.dtype, device=device)
        # Own part: while the parcels travel. Forward arrivals are disjoint; backward, several may want one unit.
        shape = (batch, *sizes(target))
        covered = count(self.own) + (sum(count(box) for box in receive.values()) if forward else 0)
        if covered == count(target):
            out = torch.empty(shape, dtype=self.dtype, device=device)
        else:
            out = torch.full(shape, self.fill if forward else 0.0, dtype=self.dtype, device=device)
        if self.own is not None:
            assert x is not None
            assert source is not None
            out[(slice(None), *inside(self.own, target))] = x[(slice(None), *inside(self.own, source))]
        swap.wait()
        for sender, box in receive.items():
            place = out[(slice(None), *inside(box, target))]
            place.copy_(arrivals[sender]) if forward else place.add_(arrivals[sender])
        return out


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor | None, thread: torch.Tensor, exchange: Exchange, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.exchange, ctx.batch = exchange, batch
        return exchange._move(x, batch, forward=True), thread.clone()

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor, thread: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        moved = ctx.exchange._move(gradient, ctx.batch, forward=False)
        return moved if ctx.needs_input_grad[0] else None, thread, None, None


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, thread: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient.new_zeros((), dtype=torch.float32)


def tie(x: torch.Tensor, group: Group) -> torch.Tensor:
    """`x`, whose backward pass begins that of all exchanges since the last tie; every partition ends its forward so."""
    thread, group.thread = group.thread, None
    return x if thread is None else _Tie.apply(x, thread)  # type: ignore[no-untyped-call]
