# SPDX-License-Identifier: Apache-2.0
"""Trying an optimizer on six numbers, to know it before it is given millions.

A shard holds an arbitrary cut of the flat parameter vector, so an update rule must treat every parameter by itself:
cutting the vector, or shaping it as a matrix, must not change what an optimizer does. This is tried, not believed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Builds the optimizer to try on these parameters."""

_LENGTH = 6

REFUSED: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "one line search moves all parameters together and asks for the loss again, which no shard can",
    torch.optim.Adafactor: "it scales by the norm of a whole tensor and factors matrices, but a shard holds a cut",
    torch.optim.Muon: "it orthogonalises whole matrices, but a shard holds a cut",
    torch.optim.SparseAdam: "it takes sparse gradients, but pushed gradients are dense",
}
"""Optimizers of torch that cannot work on a cut of the parameters, and why."""


@dataclass(frozen=True)
class Trial:
    """What an optimizer did in a few steps."""

    values: Tensor
    """The parameters after the last step, flat."""
    state: dict[str, Any]
    """What it keeps for the parameter afterwards, without the entries that are None."""
    writes_gradient: bool
    """Whether it changed the gradients it was given."""
    counted: dict[str, Any]
    """The numbers of its parameter groups that its steps have changed, afterwards."""
    elsewhere: list[str]
    """What else its steps have changed: no checkpoint would hold it."""

    def vectors(self) -> dict[str, torch.dtype]:
        """Names and dtypes of the state that has one value per parameter."""
        return {
            name: value.dtype
            for name, value in self.state.items()
            if isinstance(value, Tensor) and value.numel() == self.values.numel()
        }

    def numbers(self) -> dict[str, Any]:
        """The state that is one number, as a zero-dimensional tensor or a Python number."""
        return {name: value for name, value in self.state.items() if _is_number(value)}

    def other_state(self) -> list[str]:
        """Names of state that is neither."""
        return sorted(set(self.state) - set(self.vectors()) - set(self.numbers()))


def run(
    make: Make, first: int = 0, last: int = _LENGTH, shape: tuple[int, ...] = (-1,), dtype: torch.dtype = torch.float64
) -> Trial:
    """Four steps of a new optimizer on the elements [first, last) of a fixed problem. Raises what the optimizer raises.

    The gradients vary from small to large, so that clipping by a norm shows.
    """
    index = torch.arange(first, last, dtype=torch.float64)
    parameter = nn.Parameter(torch.cos(1.7 * index).to(dtype).view(shape))
    optimizer = make([parameter])
    (group,), written = optimizer.param_groups, False
    in_group, in_itself = _values(group), _values(vars(optimizer))
    for step, scale in enumerate((1.0, 100.0, 0.01, 1.0)):
        gradient = (scale * torch.sin(1.0 + index * (step + 1.3))).to(dtype).view(shape)
        parameter.grad = gradient.clone()
        given = parameter.grad
        optimizer.step()
        written = written or not torch.equal(given, gradient)
    state = {name: value for name, value in optimizer.state[parameter].items() if value is not None}
    of_group, of_itself = _changed(in_group, group), _changed(in_itself, vars(optimizer))
    counted = {name: value for name, value in of_group.items() if _is_number(value)}
    others = [str(key) for key in optimizer.state if key is not parameter]
    elsewhere = [*others, *of_itself, *(of_group.keys() - counted)]
    return Trial(parameter.detach().reshape(-1), state, written, counted, elsewhere)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _values(known: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and tensors among these, as they are now; torch's optimizers note in flags what they have checked."""
    kept = {name: value for name, value in known.items() if isinstance(value, int | float | Tensor)}
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in kept.items()
        if not isinstance(value, bool)
    }


def _changed(before: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and tensors among these that are others than before."""
    now = _values(known)
    return {name: value for name, value in now.items() if name not in before or not _equal(before[name], value)}


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def whole_tensor_reason(make: Make) -> str | None:
    """Why the optimizer is not elementwise, in words that follow "it"; None when it is."""
    whole = run(make)
    if not _same(whole, run(make, 0, 2), run(make, 2, _LENGTH)):
        return "takes another step when its parameters are cut in two"
    if not _same(whole, run(make, shape=(2, _LENGTH // 2))):
        return "takes another step for a matrix than for the same numbers in a row"
    return None


def _same(whole: Trial, *cuts: Trial) -> bool:
    if any(set(cut.vectors()) != set(whole.vectors()) for cut in cuts):
        return False
    pairs = [(whole.values, torch.cat([cut.values for cut in cuts]))]
    for name in whole.vectors():
        pairs.append((whole.state[name].reshape(-1), torch.cat([cut.state[name].reshape(-1) for cut in cuts])))
    # Fused kernels may differ in the last bit between the elements of a full vector register and the rest.
    return all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in pairs)
