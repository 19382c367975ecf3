# SPDX-License-Identifier: Apache-2.0
"""A job tried on one mini-batch before anything starts, so that what cannot work is said at once."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from distbelief.buffers import flat_buffers
from distbelief.checkpoint import try_store
from distbelief.data_shard import Collated, cloned, collect, first
from distbelief.errors import ConfigurationError
from distbelief.files import path_of
from distbelief.frozen import Frozen, bit_sum, changed
from distbelief.job import Job, Prepared, input_of, sample_of, trial
from distbelief.mean_loss import AS_A_MEAN, DISTANCES, check_mean, check_scale, divided, doubled, moved
from distbelief.model_partition import CutModel
from distbelief.model_replica import Objective, build, scalar, whole
from distbelief.parameters import trainable
from distbelief.partition.stages import StagePlan
from distbelief.repeatable import check_data, check_repeatable
from distbelief.sandblaster import Sandblaster


def attempt(prepared: Prepared) -> None:
    """Try one mini-batch, a look at the test set, and the store of the checkpoints.

    Raises ConfigurationError, and what the user's code raises.
    """
    job, data, test = prepared.job, prepared.data, prepared.test
    if "://" in (job.checkpoints or "") and job.cluster.engine == "ray":  # of this machine the coordinator tries it
        _attempt_store(str(job.checkpoints))
    sample = sample_of(job, data)
    if isinstance(job.algorithm, Sandblaster):
        check_data(sample, sample_of(job, data))
    if prepared.cut is not None:
        _attempt_loss(job, prepared.cut, data, *sample)
        if test is not None and job.evaluate is None and not isinstance(prepared.cut.plan, StagePlan):
            some = first(test, job.batch_size)
            prepared.cut.output(input_of(job, collect(some, torch.arange(len(some)))))
        return
    module, _ = build(job.model, job.seed, job.grouping, prepared.layout)
    if isinstance(job.algorithm, Sandblaster):
        _attempt_gradient(job.objective, module, cloned(sample))
        check_repeatable(module, job.objective, sample)
        parameters = [parameter for _, parameter in trainable(module)]
        _check_parts(job, data, sample, lambda batch: job.objective(module, cloned(batch)), parameters)
    else:
        _attempt_gradient(job.objective, module.train(), sample)
    if test is not None and job.evaluate is None:
        job.measures.measure(module, first(test, job.batch_size), torch.device("cpu"))


def _attempt_store(store: str) -> None:
    """Write where shards will, in a process that has the environment that theirs have. Raises ConfigurationError."""
    try:
        try_store(path_of(store))
    except OSError as error:
        raise ConfigurationError(
            f"checkpoints cannot be kept at {store}: {error}",
            hint="give a place that every host can write, and each host the package and the credentials for it: roles "
            "have the environment of their host, not that of your shell, see docs/clusters.md",
        ) from error


def _attempt_gradient(objective: Objective, module: nn.Module, sample: Any) -> None:
    """Compute a loss as replicas do, up to the backward pass. Raises ConfigurationError, and what user code raises."""
    before = {name: (each, bit_sum(each)) for name, each in trainable(module)}
    buffers, frozen = whole(module).buffers, Frozen(module)
    with _no_backward(module), _nothing_followed(objective.step or objective.loss, module):
        loss = objective(module, sample)
    if not loss.requires_grad:
        raise ConfigurationError(
            "the loss of a mini-batch does not lead back to the parameters, so it has no gradient",
            hint="compute it from the model's output, without .item(), .detach(), NumPy or torch.no_grad()",
        )
    _check_trained(loss, module)
    flat_buffers(buffers)
    frozen.check(closely=True)
    for name, (parameter, bits) in before.items():  # what torch has not noticed, as it was done through `.data`
        if bit_sum(parameter) != bits:
            raise changed(name)


def _check_trained(loss: torch.Tensor, module: nn.Module | None) -> None:
    """Raise ConfigurationError where the loss leads back to a parameter that is none of the module's."""
    known = set() if module is None else {id(parameter) for parameter in module.parameters()}
    waiting, seen = [loss.grad_fn], set[Any]()
    while waiting:
        step = waiting.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        waiting += [before for before, _ in step.next_functions]
        leaf = getattr(step, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise ConfigurationError(
                f"the loss depends on a parameter of shape {list(leaf.shape)} that the model has not, and nobody would "
                "train it",
                hint="let the model hold it, or the module that it is of, and give step=(model, batch) -> loss; or "
                "detach it, or freeze it with requires_grad_(False), if it is not to be trained",
            )


@contextlib.contextmanager
def _no_backward(module: nn.Module) -> Iterator[None]:
    """Raise ConfigurationError where a parameter is given a gradient meanwhile, which a replica would push, too."""
    given: list[str] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: given.append(name))  # type: ignore[no-untyped-call]
        for name, parameter in trainable(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if given:
        raise ConfigurationError(
            f"computing the loss calls backward(), and what that adds to the gradient of {given[0]} would be pushed "
            "with the gradient of the loss",
            hint="return the loss, or the sum of several, and leave backward and the step to the job; a gradient by "
            "the input is torch.autograd.grad(loss, inputs)",
        )


@contextlib.contextmanager
def _nothing_followed(function: Any, model: nn.Module | None) -> Iterator[None]:
    """Raise ConfigurationError where a module that the function holds, and the model does not, is changed meanwhile."""
    own = set() if model is None else set(model.modules())
    held = [each for each in _held(function) if isinstance(each, nn.Module) and each not in own]
    before = [_bits(each) for each in held]
    yield
    for each, known in zip(held, before, strict=True):
        if different := [name for name, bits in _bits(each).items() if known.get(name) != bits]:
            raise ConfigurationError(
                f"computing the loss changes {different[0]} of a {type(each).__name__} that the model has not, and "
                "nobody would keep it: tests, resumed jobs and what replaces a dead replica have its first values",
                hint="let the model hold it, as buffers (register_buffer), and give step=(model, batch) -> loss; or "
                "call .eval() on it, if it is not to change",
            )


def _held(function: Any) -> Iterator[Any]:
    """What a function computes with beside its arguments."""
    yield function
    if isinstance(function, functools.partial):
        yield from (*_held(function.func), *function.args, *function.keywords.values())
    elif inspect.ismethod(function):
        yield from (function.__self__, *_held(function.__func__))
    elif inspect.isfunction(function):
        with contextlib.suppress(ValueError):  # a cell that is empty
            found = inspect.getclosurevars(function)
            yield from (*found.nonlocals.values(), *found.globals.values())
    elif not isinstance(function, nn.Module):
        yield from getattr(function, "__dict__", {}).values()


def _bits(module: nn.Module) -> dict[str, int]:
    return {name: bit_sum(each) for name, each in (*module.named_parameters(), *module.named_buffers())}


def _attempt_loss(job: Job, cut: CutModel, data: Any, x: torch.Tensor, target: Any) -> None:
    """Try the loss of a partitioned model, which no process may hold whole, on an output that is invented."""
    assert job.loss is not None
    output = torch.zeros_like(cut.output(x), device="cpu")
    if output.is_floating_point():
        output.uniform_(0.25, 0.75, generator=torch.Generator().manual_seed(job.seed))
    try:
        with _nothing_followed(job.loss, None):
            value = job.loss(output, target)
    except ConfigurationError:
        raise
    except Exception:
        return  # what was invented may be to blame: the first mini-batch will tell
    _check_trained(scalar(value), None)
    loss, sample = job.loss, (output, target)
    if isinstance(cut.plan, StagePlan) and torch.equal(value, loss(*sample)):  # else it draws, and nothing can be told
        size = len(x) // cut.plan.micro_batches(len(x))
        if (parts := divided(sample, range(0, len(x) + 1, size))) is not None:
            hint = f"use Plan.stages({cut.plan.partitions}, microbatches=1), or a loss that is a mean over examples"
            check_mean(lambda pair: loss(*pair), sample, parts, hint)
    if isinstance(job.algorithm, Sandblaster):
        _check_parts(job, data, sample, lambda pair: loss(*pair), [])


def _check_parts(
    job: Job, data: Any, sample: Any, loss_of: Callable[[Any], torch.Tensor], parameters: Sequence[nn.Parameter]
) -> None:
    """Refuse a loss whose value depends on how Sandblaster cuts the data. Raises ConfigurationError."""
    indices = trial(job, data)
    collated = isinstance(data, Collated) and job.cluster.plan.partitions == 1  # else its inputs are no outputs
    if len(indices) in (1, len(data)):  # what is computed at once may have any loss but one on another scale
        twice = collect(data, indices.repeat(2)) if collated else doubled(sample)
        if twice is not None:
            check_scale(loss_of, sample, twice)
        return
    edges = [0, (len(indices) + 2) // 3, len(indices)]
    pieces = indices.tensor_split(edges[1:2])
    parts = [(len(piece), collect(data, piece)) for piece in pieces] if collated else divided(sample, edges)
    if parts is None:
        return
    hint = f"{AS_A_MEAN}; or compute them at once, with Sandblaster(micro_batch={len(data)})"
    for distance in DISTANCES:
        with moved(parameters, distance):
            check_mean(loss_of, sample, parts, hint)
