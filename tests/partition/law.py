# SPDX-License-Identifier: Apache-2.0
"""The law that every rule keeps: a model cut into partitions computes what the uncut model computes."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from threads import together
from torch import Tensor, nn

from distbelief.partition.group import Group
from distbelief.partition.units import Blueprint, OwnedPiece, units
from distbelief.plan import Cut


def place(piece: OwnedPiece) -> tuple[slice, ...]:
    """The box as an index of a tensor of its full shape."""
    return tuple(slice(low, high) for low, high in piece.box)


def values_of(model: nn.Module, blueprint: Blueprint, partition: int) -> dict[str, Tensor]:
    """Copies of what one partition holds of the uncut model."""
    whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    pieces = blueprint.pieces(partition) + blueprint.frozen(partition) + blueprint.buffers(partition)
    return {piece.name: whole[piece.name].detach().view(piece.full_shape)[place(piece)].clone() for piece in pieces}


@dataclass(frozen=True)
class Outcome:
    """What all partitions together have computed in one training step and one evaluation."""

    output: Tensor
    evaluation: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    elements_sent: list[int]
    """Per partition, in the forward pass of the evaluation."""
    elements_received: list[int]


def run(model: nn.Module, x: Tensor, weight: Tensor, blueprint: Blueprint) -> Outcome:
    """One training step on the loss (output * weight).sum(), then an evaluation, on threads."""

    def work(group: Group) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor], tuple[int, int]]:
        share = blueprint.share(group.index, values_of(model, blueprint, group.index), group)
        output = share(x)
        ((output * weight).sum() if group.index == blueprint.out else output.sum()).backward()
        gradients = {name: held.grad for name, held in share.parameters_by_name.items() if held.grad is not None}
        share.eval()
        before = group.elements_sent, group.elements_received
        with torch.no_grad():
            evaluation = share(x)
        moved = group.elements_sent - before[0], group.elements_received - before[1]
        return output.detach(), evaluation, gradients, share.buffers_by_name, moved

    results = together(blueprint.partitions, work)
    gradients, buffers = {}, {}
    for index, (_, _, of_parameters, of_buffers, _) in enumerate(results):
        for joined, parts, pieces in (
            (gradients, of_parameters, blueprint.pieces(index)), (buffers, of_buffers, blueprint.buffers(index))
        ):  # fmt: skip
            for piece in pieces:
                full = joined.setdefault(piece.name, torch.full(piece.full_shape, float("nan"), dtype=torch.float64))
                full[place(piece)] = parts[piece.name].double().view(full[place(piece)].shape)
    sent, received = zip(*(result[4] for result in results), strict=True)
    out = results[blueprint.out]
    return Outcome(out[0], out[1], gradients, buffers, list(sent), list(received))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm; where nothing is expected, absolute."""
    scale = float(expected.double().norm()) or 1.0
    return float((found.double().reshape(expected.shape) - expected.double()).norm()) / scale


def _joined(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names])


def _exact_gradients(model: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Those of the uncut model in float64."""
    double = copy.deepcopy(model).double().train()
    (double(x.double() if x.is_floating_point() else x) * weight.double()).sum().backward()
    return {name: held.grad for name, held in double.named_parameters() if held.grad is not None}


def check(model: nn.Module, x: Tensor, partitions: int, cuts: Mapping[str, Cut] | None = None) -> Blueprint:
    """Assert that outputs, gradients and buffers are those of the uncut model, and the traffic that of the plan.

    The relative error is at most 1e-12 for every parameter in float64. In float32 it is at most 1e-6 for the whole
    gradient, and for every parameter at most 1e-6 more than what the uncut model's rounding makes of it.
    """
    blueprint = units(model, x, partitions, cuts)
    uncut = copy.deepcopy(model).train()
    output = uncut(x)
    weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(7))
    (output * weight).sum().backward()
    buffers = {name: buffer.clone() for name, buffer in uncut.named_buffers()}
    with torch.no_grad():
        evaluation = uncut.eval()(x)
    outcome = run(model.train(), x, weight, blueprint)
    expected = {name: held.grad for name, held in uncut.named_parameters() if held.requires_grad}
    assert outcome.gradients.keys() == expected.keys()
    wrong = {name: error(outcome.gradients[name], gradient) for name, gradient in expected.items()}
    if output.dtype == torch.float32:  # rounding alone moves a small gradient between large ones by more
        exact = _exact_gradients(model, x, weight)
        wrong = {
            name: error(outcome.gradients[name], exact[name]) - error(gradient, exact[name])
            for name, gradient in expected.items()
        }
        wrong["gradient"] = error(_joined(outcome.gradients, expected), _joined(expected, expected))
    wrong |= {"output": error(outcome.output, output.detach()), "evaluation": error(outcome.evaluation, evaluation)}
    wrong |= {name: error(found, buffers[name]) for name, found in outcome.buffers.items()}
    assert max(wrong.values()) <= (1e-6 if output.dtype == torch.float32 else 1e-12), wrong
    numbers, batch = blueprint.numbers, len(x)
    assert outcome.elements_sent == [batch * n.elements_out + n.elements_out_once for n in numbers]
    assert outcome.elements_received == [batch * n.elements_in + n.elements_in_once for n in numbers]
    assert sum(n.parameters for n in numbers) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return blueprint
