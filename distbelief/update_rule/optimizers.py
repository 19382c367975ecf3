# SPDX-License-Identifier: Apache-2.0
"""The optimizers of torch.optim by the names that a job uses."""

from typing import Any

import torch

from distbelief.update_rule.schedule import Schedule
from distbelief.update_rule.torch_rule import TorchRule


def adagrad(
    rate: float = 0.05,
    *,
    initial_accumulator: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    schedule: Schedule | None = None,
    damping: float = 0.0,
) -> TorchRule:
    """Adagrad (paper, section 4.1, equation 1), the default: `sum += g^2; w -= rate * g / (sqrt(sum) + eps)`.

    initial_accumulator: the start of `sum`; above 0 it softens the first steps.
    schedule: factor on the rate as a function of the examples applied.
    damping: the rate is divided by (1 + staleness) ** damping for each push.
    """
    options = {"initial_accumulator_value": initial_accumulator, "eps": eps, "weight_decay": weight_decay}
    return TorchRule("adagrad", torch.optim.Adagrad, (("lr", rate), *options.items()), schedule, damping)


def sgd(
    rate: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    schedule: Schedule | None = None,
    damping: float = 0.0,
) -> TorchRule:
    """Stochastic gradient descent.

    momentum: of one replica. Of several it ruins training more easily than `Downpour(momentum=...)`, which each keeps.
    weight_decay: added to what is pushed, so that `Downpour(momentum=m)` does not make it 1 / (1 - m) times as strong.
    `schedule` and `damping` as in `adagrad`.
    """
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    return TorchRule("sgd", torch.optim.SGD, (("lr", rate), *options.items()), schedule, damping)


def adam(
    rate: float = 0.001,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    schedule: Schedule | None = None,
    damping: float = 0.0,
) -> TorchRule:
    """Adam; its step counts pushes. Staleness hurts it more than Adagrad.

    `schedule` and `damping` as in `adagrad`.
    """
    options = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    return TorchRule("adam", torch.optim.Adam, (("lr", rate), *options.items()), schedule, damping)


def adamw(
    rate: float = 0.001,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    schedule: Schedule | None = None,
    damping: float = 0.0,
) -> TorchRule:
    """Adam with weight decay apart from the gradient; its step counts pushes. `schedule`, `damping` as in `adagrad`."""
    options = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    return TorchRule("adamw", torch.optim.AdamW, (("lr", rate), *options.items()), schedule, damping)


def optimizer(
    optimizer: type[torch.optim.Optimizer], *, schedule: Schedule | None = None, damping: float = 0.0, **options: Any
) -> TorchRule:
    """Any optimizer class that treats each parameter by itself, torch's or your own, with its own options.

    optimizer(torch.optim.RMSprop, lr=0.01, momentum=0.9). `check` refuses the others; `schedule` and `damping` as in
    `adagrad`.
    """
    return TorchRule(getattr(optimizer, "__name__", "optimizer"), optimizer, tuple(options.items()), schedule, damping)
