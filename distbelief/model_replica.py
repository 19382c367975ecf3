# SPDX-License-Identifier: Apache-2.0
"""A model replica: the user's model over flat buffers, computing one gradient after another (paper, section 4.1).

    host memory      parameters | gradient | spare      (shared with the shards), which take turns:
    compute          each parameter's gradient is added into its place as soon as backward has made it, or made there
    take_gradient    gradient <-> spare: shards read the gradient in the spare one, and may answer there
    adopt            parameters <-> spare, once a fetch has filled it

On a CPU the model computes on the host buffers themselves. On an accelerator the model's flat vector and gradient live
there, and two host buffers, page-locked for CUDA, stage them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import nn

from distbelief.buffers import Registered, flat_buffers
from distbelief.data_shard import pair, to_device
from distbelief.draws import begin_draws
from distbelief.errors import ConfigurationError
from distbelief.freed import freed_at_once
from distbelief.frozen import Frozen
from distbelief.gradient_place import write_in_place
from distbelief.parameters import Groups, Layout, check_same, lay_out, trainable
from distbelief.partition.group import Group

Step = Callable[[nn.Module, Any], torch.Tensor]

_CHUNK = 1 << 22
"""Numbers that torch widens to 64 bits at once, in new memory."""


@dataclass(frozen=True)
class Objective:
    """What to minimise: `step`, or `loss` of the model's output on batches of (input, target)."""

    loss: Callable[[Any, Any], torch.Tensor] | None
    step: Step | None = None

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The scalar loss of one mini-batch. Raises ConfigurationError when it is none."""
        if self.step is not None:
            return scalar(self.step(model, batch))
        inputs, target = pair(batch)
        return self.of(model(inputs), target)

    def of(self, output: Any, target: Any) -> torch.Tensor:
        """The scalar `loss` of an output. Raises ConfigurationError when it is none."""
        assert self.loss is not None
        return scalar(self.loss(output, target))

    def differentiate(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Add the gradient of the loss to the parameters'; returns the detached loss."""
        loss = self(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def scalar(
    value: Any, subject: str = "the loss is", hint: str = "return the mean over the mini-batch, for example loss.mean()"
) -> torch.Tensor:
    """The loss of one mini-batch, or what else is to be one number. Raises ConfigurationError."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        if hasattr(value, "loss"):
            hint = "return its loss alone: output.loss"
        elif isinstance(value, Mapping) and "loss" in value:
            hint = 'return its loss alone: output["loss"]'
        elif isinstance(value, Mapping | tuple | list):
            hint = "return the loss alone, or the sum where these are several"
        raise ConfigurationError(f"{subject} {shape}, not a scalar", hint=hint)
    return value


def build(
    model: Callable[[], nn.Module], seed: int, groups: Groups | None, expected: Layout | None = None
) -> tuple[nn.Module, Layout]:
    """The user's model with the initial values of `seed`, and where its parameters lie.

    Raises ConfigurationError when that is not where they are expected.
    """
    begin_draws(seed)
    with freed_at_once():  # the replica moves the values to where they are to be, and lets these go
        module = model()
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"the job's model is a {type(module).__name__}, not a torch.nn.Module",
            hint="let the function that builds it return it",
        )
    layout = lay_out(module, groups)
    if expected is not None:
        check_same(layout, expected)
    return module, layout


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a model that one process holds; of a replica of one process that is the whole of it."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    """Trainable parameters, or boxes of them, by their names in the uncut model."""
    buffers: Mapping[str, torch.Tensor]


def whole(module: nn.Module) -> Part:
    """All of a model."""
    return Part(module, dict(trainable(module)), Registered(module))


def pick_device(name: str | None, index: int) -> torch.device:
    """The device of process `index` of the replicas: as named, "cuda" means the CUDA devices in turn. None takes CUDA
    when there is one, else the CPU.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" or ":" in (name or ""):
        return device
    return torch.device("cuda", index % max(1, torch.cuda.device_count()))


def check_device(name: str | None) -> None:
    """Raise ConfigurationError for a device that torch does not know or that this machine has not."""
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise ConfigurationError(
            f"Cluster(device={name!r}) is no device: {error}", hint='use "cpu", "cuda", or None'
        ) from error
    if device.type != "cpu" and (device.index or 0) >= (count := _devices_here(device.type)):
        raise ConfigurationError(
            f"Cluster(device={name!r}): this machine has {count} {device.type} devices that torch can use",
            hint="use Cluster(device=None) to take what there is",
        )


def _devices_here(kind: str) -> int:
    """How many accelerators of this type torch can use."""
    try:
        return int(torch.get_device_module(kind).device_count())
    except RuntimeError:  # torch has no module for it
        return 0


@dataclass(frozen=True, eq=False)
class Vector:
    """A flat vector, and where in it each parameter lies, in the shape that the module has: a piece may be a view."""

    flat: torch.Tensor
    views: list[torch.Tensor]


@final
class ModelReplica:
    """The model of one replica and its buffers.

    `differentiate(module, batch)` adds the gradient of a mini-batch to the parameters' and returns the detached loss.
    `allocate(length, dtype)` gives host memory that the shards can reach.
    """

    def __init__(
        self, part: Part, layout: Layout, differentiate: Step, device: torch.device,
        allocate: Callable[[int, torch.dtype], torch.Tensor], group: Group,
    ) -> None:  # fmt: skip
        for buffer in part.buffers.values():  # in place: the part goes on naming those that the module computes with
            buffer.data = buffer.data.to(device)
        part.module.to(device)
        self.part, self.group, self._differentiate, self._device = part, group, differentiate, device
        self.frozen = Frozen(part.module)
        on_cpu = device.type == "cpu"
        self._parameters = [part.parameters[piece.name] for piece in layout.pieces]

        def vector(flat: torch.Tensor) -> Vector:
            pairs = zip(layout.views(flat).values(), self._parameters, strict=True)
            return Vector(flat, [view.view(parameter.shape) for view, parameter in pairs])

        host = [vector(allocate(layout.length, layout.dtype)) for _ in range(3 if on_cpu else 2)]
        if device.type == "cuda":
            for each in host:
                _pin(each.flat)
        self._fetched, self._spare = host[:2]
        self._gradient = host[2] if on_cpu else vector(torch.zeros_like(self._spare.flat, device=device))
        self._working = None if on_cpu else vector(torch.zeros_like(self._spare.flat, device=device))
        """What the model computes with, where that is not what was fetched."""
        self._written = [False] * len(self._parameters)
        self._mini_batches = 0
        self._weight = 1.0
        self.local_rate: float | None = None
        """Rate of the local step after each mini-batch; None for none."""
        self.momentum = 0.0
        """What of the gradients before is added to each one that is taken."""
        self._velocity: torch.Tensor | None = None
        """Their sum, each less by `momentum` than the next; None before the first."""
        self._promised = [False] * len(self._parameters)
        """Whose place backward has been given, and has not yet handed back as the gradient."""
        self._aside: dict[int, torch.Tensor] = {}
        """What came meanwhile, by parameter."""
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._accrue_hook(index))  # type: ignore[no-untyped-call]
        for piece, parameter in zip(layout.pieces, self._parameters, strict=True):
            # What the part was built with lies in the spare until the first fetch.
            self.spare[piece.span.start : piece.span.stop] = parameter.detach().reshape(-1)
        self._point()
        if on_cpu:
            places = {each: partial(self._place, index) for index, each in enumerate(self._parameters)}
            write_in_place(part.module, places)

    # parameters

    @property
    def spare(self) -> torch.Tensor:
        """The host buffer, shape (n,), that a fetch may fill while the model computes, or shards read a gradient in."""
        return self._spare.flat

    @property
    def fetched(self) -> torch.Tensor:
        """The host buffer, shape (n,), with what was adopted last; local steps change it on the CPU."""
        return self._fetched.flat

    def adopt(self) -> None:
        """Switch the model to what a fetch has put into the spare buffer."""
        self._fetched, self._spare = self._spare, self._fetched
        if self._working is not None:
            # Awaited: the next gradient is put into this host buffer, however far behind the accelerator is.
            self._working.flat.copy_(self._fetched.flat)
        self._point()  # also there, where flatten_parameters of an RNN takes them out of the vector

    def _point(self) -> None:
        for parameter, view in zip(self._parameters, (self._working or self._fetched).views, strict=True):
            parameter.data = view

    # gradient

    def compute(self, batch: Any, weight: float = 1.0) -> torch.Tensor:
        """Add `weight` times the gradient of the mean loss over one mini-batch to what is accrued.

        Returns the detached mean loss.
        """
        self._weight = weight
        loss = self._differentiate(self.part.module, to_device(batch, self._device))
        self._mini_batches += 1
        if self._aside:
            self._add_what_is_aside()
        if not all(self._written):
            self._zero_what_is_missing()
        return loss

    def _accrue_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def accrue(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:  # a hook of the user's has dropped it
                return
            parameter.grad = None
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            if self.local_rate is not None:
                # The paper's local step: parameters -= rate * gradient, as soon as backward needs this one no more.
                parameter.data.add_(gradient, alpha=-self.local_rate)
            view = self._gradient.views[index]
            if not self._promised[index]:
                self._accrue(view, gradient, again=self._written[index])
            elif gradient.data_ptr() != view.data_ptr():
                # What lies in the place is a part of this, or belongs to a pass of autograd around this one.
                gradient = gradient * self._weight
                self._aside[index] = self._aside[index] + gradient if index in self._aside else gradient
                return
            elif self._weight != 1.0:
                view.mul_(self._weight)
            self._written[index], self._promised[index] = True, False

        return accrue

    def _accrue(self, view: torch.Tensor, gradient: torch.Tensor, *, again: bool) -> None:
        """Put `gradient` into its place, or add it to what is there."""
        if again:
            view.add_(gradient, alpha=self._weight)
        elif self._weight != 1.0:
            torch.mul(gradient, self._weight, out=view)
        else:
            view.copy_(gradient)  # a quarter faster than to multiply by one

    def _add_what_is_aside(self) -> None:
        for index, gradient in self._aside.items():
            view = self._gradient.views[index]
            if self._written[index]:
                view.add_(gradient)
            else:
                view.copy_(gradient)
            self._written[index], self._promised[index] = True, False
        self._aside.clear()

    def _place(self, index: int) -> torch.Tensor | None:
        """Where backward may write a gradient instead of into new memory, if nothing is there yet."""
        if self._written[index] or self._promised[index]:
            return None
        self._promised[index] = True
        view = self._gradient.views[index]
        return view.view(view.shape)

    def _zero_what_is_missing(self) -> None:
        """A parameter that had no part in the loss has gradient zero."""
        for index, written in enumerate(self._written):
            if not written:
                self._gradient.views[index].zero_()
                self._written[index] = True

    @property
    def accrued(self) -> int:
        """Mini-batches whose gradients are in the accruing buffer."""
        return self._mini_batches

    def take_gradient(self, *, mean: bool, clip_norm: float | None) -> torch.Tensor | None:
        """The accrued gradient, in the spare host buffer, shape (n,), of which nobody else has use any more.

        `clip_norm` bounds the norm over all partitions, before momentum is added. None when the outcome is not finite,
        on any partition; momentum then begins anew. The caller owns the memory until it adopts what was fetched there,
        or takes the next gradient.
        """
        source = self._gradient.flat
        if mean and self._mini_batches > 1:
            source.div_(self._mini_batches)
        self.discard()
        if clip_norm is not None:
            norm = torch.linalg.vector_norm(source)
            if not norm.isfinite():  # of numbers whose squares are too large for their type
                parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(source, _CHUNK)]
                norm = torch.linalg.vector_norm(torch.stack(parts))
            if self.group.size > 1:
                norm = self.group.sum(norm.double().square().cpu().view(1)).sqrt().to(norm.device)
            source.mul_(torch.clamp(clip_norm / (norm + 1e-6), max=1.0))
        if self.momentum:
            self._add_momentum(source)
        finite = math.isfinite(float(source.sum()))  # one pass; a sum that overflowed is looked at again below
        finite = finite or bool(torch.isfinite(source).all())
        if any(self.group.any(not finite)):
            self._velocity = None
            return None
        if self._working is None:
            self._gradient, self._spare = self._spare, self._gradient
        else:
            self._spare.flat.copy_(source)
        return self._spare.flat

    def discard(self) -> None:
        """Begin to accrue anew, in the same place."""
        self._written = [False] * len(self._parameters)
        self._mini_batches = 0

    def _add_momentum(self, gradient: torch.Tensor) -> None:
        """`v = momentum * v + g; g += momentum * v`: what torch.optim.SGD steps by with `nesterov`."""
        if self._velocity is None:
            self._velocity = torch.zeros_like(gradient)
        torch.add(gradient, self._velocity, alpha=self.momentum, out=self._velocity)
        gradient.add_(self._velocity, alpha=self.momentum)

    # buffers

    def buffers(self) -> torch.Tensor:
        """The module's buffers (BatchNorm statistics and counters) as one float64 vector on the CPU."""
        return flat_buffers(self.part.buffers)


def load_parameters(parameters: Mapping[str, nn.Parameter], layout: Layout, flat: torch.Tensor) -> None:
    """Copy the flat vector, shape (n,), into the parameters."""
    with torch.no_grad():
        for name, view in layout.views(flat).items():
            parameters[name].copy_(view.view(parameters[name].shape))


def _pin(buffer: torch.Tensor) -> None:
    """Page-lock host memory that we allocated ourselves, so that copies to and from the device run at full speed."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel() * buffer.element_size(), 0)
    if int(status) != 0:
        raise ConfigurationError(
            f"CUDA could not page-lock {buffer.numel()} parameters of host memory (error {int(status)})",
            hint="raise `ulimit -l`, or use Cluster(device='cpu')",
        )
