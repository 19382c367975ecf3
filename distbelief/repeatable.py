# SPDX-License-Identifier: Apache-2.0
"""What full-batch optimisation needs of a model, tried before anything starts: an objective of the parameters alone.

L-BFGS compares losses and gradients of different points. Dropout, or statistics of a mini-batch, make them differ for
other reasons, and then the search fails in ways that nobody would trace to them.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from distbelief.batch_section import Keeping
from distbelief.data_shard import cloned
from distbelief.errors import ConfigurationError
from distbelief.model_replica import Objective
from distbelief.parameters import Layout, trainable

PENALTIES = ("l2", "l1", "low", "high")
"""What a parameter group may say."""
_Gradient = tuple[nn.Parameter, torch.Tensor]
"""A parameter and the gradient of the loss with respect to it."""


def check_batch(module: nn.Module, layout: Layout, keeping: Keeping) -> None:
    """Refuse layers that are random or look at the whole mini-batch, and penalties that cannot be.

    The module may be on the meta device; initial values are looked at where they are. Raises ConfigurationError.
    """
    for name, layer in module.named_modules():
        random = isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
        attends = isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0
        batch = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        if layer.training and (random or attends or batch):
            why = "uses the statistics of each mini-batch" if batch else "drops states at random"
            raise ConfigurationError(
                f"layer {name or 'of the model'} ({type(layer).__name__}) {why}, so the loss is no function of the "
                "parameters alone",
                hint="let the function that builds the model call .eval() on such layers, or leave them out",
            )
    parameters = dict(trainable(module))
    for piece in layout.pieces:
        options = dict(piece.options)
        if unknown := options.keys() - set(PENALTIES):
            raise ConfigurationError(
                f"Job(groups=...) gives {piece.name} {', '.join(sorted(unknown))}, which Sandblaster has not",
                hint=f"use {', '.join(PENALTIES)}",
            )
        own = {name: options.get(name, getattr(keeping, name)) for name in PENALTIES}
        numbers = all(isinstance(value, Real) for value in own.values())
        if not numbers or not (0 <= own["l2"] < math.inf and 0 <= own["l1"] < math.inf and own["low"] <= own["high"]):
            raise ConfigurationError(
                f"Job(groups=...) gives {piece.name} {', '.join(f'{name}={value}' for name, value in options.items())}",
                hint="give numbers: l2 and l1 of 0 or more, and a low that is not above high",
            )
        bounded = own["low"] > -math.inf or own["high"] < math.inf
        if own["l1"] and bounded:
            raise ConfigurationError(
                f"{piece.name} has l1={own['l1']} and bounds, {own['low']} to {own['high']}: there is no rule for both",
                hint="use one of them; for parameters that are never negative, add l1 * x to the loss",
            )
        if bounded and not parameters[piece.name].is_meta:
            _check_within(piece.name, parameters[piece.name].detach(), own["low"], own["high"])


def _check_within(name: str, values: torch.Tensor, low: float, high: float) -> None:
    outside = (values < low) | (values > high)
    if outside.any():
        first = float(values[outside].reshape(-1)[0])
        raise ConfigurationError(
            f"{int(outside.sum())} of the {values.numel()} initial values of {name} lie outside its bounds, {low:g} to "
            f"{high:g}; the first is {first:g}",
            hint="initialise the parameter within its bounds, for example with torch.nn.init, or widen them",
        )


def check_data(sample: Any, again: Any) -> None:
    """Refuse a data set whose examples are others when it is asked for them again. Raises ConfigurationError."""
    for one, other in zip(tree_leaves(sample), tree_leaves(again), strict=True):
        if isinstance(one, torch.Tensor) and not _same(one, other):
            raise ConfigurationError(
                "the data set gives other values each time it is asked for the same examples",
                hint="remove what is random from the data (augmentation, noise), or draw it once, for all examples",
            )


def check_repeatable(module: nn.Module, objective: Objective, sample: Any) -> None:
    """Compute the loss of a mini-batch twice, and along its gradient; refuse what does not fit together.

    Gradients of the module are left as they were found: none. Raises ConfigurationError.
    """
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    (loss, found), second = (_loss_and_gradient(module, objective, sample) for _ in range(2))
    changed = [name for name, buffer in module.named_buffers() if not _same(buffer, before[name])]
    if changed:
        raise ConfigurationError(
            f"computing the loss changes the buffer {changed[0]}, so the loss is no function of the parameters alone",
            hint="let the function that builds the model call .eval() on the layer",
        )
    if [id(each) for each, _ in found] != [id(each) for each, _ in second[1]]:
        raise ConfigurationError(
            "the loss of the same examples depends on other parameters from call to call",
            hint="remove what is random from the model, such as layers that are left out by chance",
        )
    pairs = [(loss, second[0]), *((one, other) for (_, one), (_, other) in zip(found, second[1], strict=True))]
    if not all(_same(one, other) for one, other in pairs):
        difference = max(float((one - other).abs().max()) for one, other in pairs)
        raise ConfigurationError(
            f"the loss or gradient of the same examples differs by {difference:.1e} from call to call",
            hint="remove what is random from the model, the loss and the data (dropout, noise, augmentation)",
        )
    _check_gradient(module, objective, sample, loss, found)


def _check_gradient(
    module: nn.Module, objective: Objective, sample: Any, loss: torch.Tensor, found: Sequence[_Gradient]
) -> None:
    """Go a little way along the gradient and back: the loss must change as the gradient says, if not exactly.

    A kink may lie on the way, so the change may be wrong by a factor of two, at all of three distances. Where the kink
    is at the point itself, the gradient is of one side.
    """
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for _, gradient in found))
    size = math.sqrt(sum(float(parameter.detach().double().square().sum()) for parameter, _ in found))
    rounding = 100 * torch.finfo(loss.dtype).eps * max(abs(float(loss)), torch.finfo(loss.dtype).tiny)
    told = ""
    for share in (1e-2, 1e-3, 1e-4):
        step = share * max(size, share)
        promised = 2 * step * norm
        if not (math.isfinite(promised) and promised > rounding):
            continue
        above, here = _at(module, objective, sample, found, step / norm), float(loss)
        below = _at(module, objective, sample, found, -step / norm)
        change = above - below
        sides = change, 2 * (above - here), 2 * (here - below)
        if not math.isfinite(change) or any(promised / 2 < each < 2 * promised for each in sides):
            return
        told = f"by {change:.2e} where the gradient promises {promised:.2e}"
    if told:
        raise ConfigurationError(
            f"a little way along its gradient the loss changes {told}: they do not belong together",
            hint="look for a wrong sign or factor in a backward of your own, or a part of the loss that is detached",
        )


def _at(module: nn.Module, objective: Objective, sample: Any, found: Sequence[_Gradient], step: float) -> float:
    """The loss so far along the gradient; the parameters are as they were afterwards, bit for bit."""
    before = [parameter.detach().clone() for parameter, _ in found]
    with torch.no_grad():
        for parameter, gradient in found:
            parameter.add_(gradient, alpha=step)
    loss = float(objective(module, cloned(sample)).detach())
    with torch.no_grad():
        for (parameter, _), value in zip(found, before, strict=True):
            parameter.copy_(value)
    return loss


def _loss_and_gradient(module: nn.Module, objective: Objective, sample: Any) -> tuple[torch.Tensor, list[_Gradient]]:
    """The loss, and the gradient of each parameter that it depends on."""
    parameters = [parameter for _, parameter in trainable(module)]
    loss = objective(module, cloned(sample))
    gradients = zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)
    return loss.detach(), [(each, _dense(gradient)) for each, gradient in gradients if gradient is not None]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they hold the same numbers, NaN where the other has NaN."""
    if one.layout != torch.strided:
        sparse, another = (each.to_sparse().coalesce() for each in (one, other))
        return _same(sparse.indices(), another.indices()) and _same(sparse.values(), another.values())
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """That of an embedding may be sparse."""
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
