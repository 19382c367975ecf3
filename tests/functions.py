# SPDX-License-Identifier: Apache-2.0
"""Functions on which minimisers and line searches are tried, from the published formulas.

MINIMA: Moré, Garbow and Hillstrom, "Testing Unconstrained Optimization Software" (1981).
ALONG: Moré and Thuente, "Line Search Algorithms with Guaranteed Sufficient Decrease" (1994).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A function, the standard starting point and the published minimum."""

    function: Callable[[Tensor], Tensor]
    start: list[float]
    minimum: float | None
    """None where minimisers from this start end in another, local one."""

    @property
    def x(self) -> Tensor:
        return torch.tensor(self.start, dtype=torch.float64)


def squares(*terms: Tensor) -> Tensor:
    return sum(((term * term).sum() for term in terms), torch.zeros((), dtype=terms[0].dtype))


def numbers(first: int, last: int, like: Tensor) -> Tensor:
    return torch.arange(first, last + 1, dtype=like.dtype)


def rosenbrock(x: Tensor) -> Tensor:
    odd, even = x.view(-1, 2).unbind(1)
    return squares(10 * (even - odd**2), 1 - odd)


def powell(x: Tensor) -> Tensor:
    a, b, c, d = x.view(-1, 4).unbind(1)
    return squares(a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2)


def broyden(x: Tensor) -> Tensor:
    before, after = torch.nn.functional.pad(x[:-1], (1, 0)), torch.nn.functional.pad(x[1:], (0, 1))
    return squares((3 - 2 * x) * x - before - 2 * after + 1)


def variably_dimensioned(x: Tensor) -> Tensor:
    weighted = numbers(1, len(x), x) @ (x - 1)
    return squares(x - 1, weighted, weighted**2)


def trigonometric(x: Tensor) -> Tensor:
    cosines = torch.cos(x)
    return squares(len(x) - cosines.sum() + numbers(1, len(x), x) * (1 - cosines) - torch.sin(x))


def penalty(x: Tensor) -> Tensor:
    return 1e-5 * squares(x - 1) + squares(x @ x - 0.25)


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    residuals = 10 * (b - a**2), 1 - a, 90**0.5 * (d - c**2), 1 - c, 10**0.5 * (b + d - 2), (b - d) / 10**0.5
    return squares(*residuals)


def beale(x: Tensor) -> Tensor:
    return squares(*(y - x[0] * (1 - x[1] ** power) for power, y in enumerate((1.5, 2.25, 2.625), 1)))


def brown_dennis(x: Tensor) -> Tensor:
    t = numbers(1, 20, x) / 5
    return squares((x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2)


BARD = (0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)


def bard(x: Tensor) -> Tensor:
    u = numbers(1, 15, x)
    v = 16 - u
    return squares(torch.tensor(BARD, dtype=x.dtype) - x[0] - u / (v * x[1] + torch.minimum(u, v) * x[2]))


KOWALIK = (0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)


def kowalik_osborne(x: Tensor) -> Tensor:
    u = 1 / torch.tensor([0.25, 0.5, 1, 2, 4, 6, 8, 10, 12, 14, 16], dtype=x.dtype)
    return squares(torch.tensor(KOWALIK, dtype=x.dtype) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3]))


def watson(x: Tensor) -> Tensor:
    powers = (numbers(1, 29, x) / 29)[:, None] ** numbers(0, len(x) - 1, x)
    derivative = powers[:, :-1] @ (numbers(1, len(x) - 1, x) * x[1:])
    return squares(derivative - (powers @ x) ** 2 - 1, x[0], x[1] - x[0] ** 2 - 1)


def chebyquad(x: Tensor) -> Tensor:
    degrees = numbers(1, len(x), x)
    means = torch.cos(degrees[:, None] * torch.acos((2 * x - 1).clamp(-1, 1))).mean(1)
    return squares(means - torch.where(degrees % 2 == 0, -1 / (degrees**2 - 1), 0.0))


MINIMA = {
    "rosenbrock": Problem(rosenbrock, [-1.2, 1.0] * 500, 0.0),
    "powell": Problem(powell, [3.0, -1.0, 0.0, 1.0] * 250, 0.0),
    "broyden 10": Problem(broyden, [-1.0] * 10, 0.0),
    "broyden 1000": Problem(broyden, [-1.0] * 1000, None),
    "variably dimensioned": Problem(variably_dimensioned, [1 - i / 50 for i in range(1, 51)], 0.0),
    "trigonometric": Problem(trigonometric, [0.1] * 10, 2.79506e-5),
    "penalty": Problem(penalty, [float(i) for i in range(1, 11)], 7.08765e-5),
    "wood": Problem(wood, [-3.0, -1.0, -3.0, -1.0], 0.0),
    "beale": Problem(beale, [1.0, 1.0], 0.0),
    "brown dennis": Problem(brown_dennis, [25.0, 5.0, -5.0, -1.0], 85822.2),
    "bard": Problem(bard, [1.0, 1.0, 1.0], 8.21487e-3),
    "kowalik osborne": Problem(kowalik_osborne, [0.25, 0.39, 0.415, 0.39], 3.07505e-4),
    "watson": Problem(watson, [0.0] * 6, 2.28767e-3),
    "chebyquad": Problem(chebyquad, [i / 9 for i in range(1, 9)], 3.51687e-3),
}

Along = Callable[[float], tuple[float, float]]
"""t -> value and slope."""


def one(t: float) -> tuple[float, float]:
    return -t / (t * t + 2), (t * t - 2) / (t * t + 2) ** 2


def two(t: float) -> tuple[float, float]:
    u = t + 0.004
    return u**5 - 2 * u**4, 5 * u**4 - 8 * u**3


def three(t: float) -> tuple[float, float]:
    beta, waves = 0.01, 39 * math.pi / 2
    inside = abs(t - 1) <= beta
    value = (t - 1) ** 2 / (2 * beta) + beta / 2 if inside else abs(t - 1)
    slope = (t - 1) / beta if inside else math.copysign(1.0, t - 1)
    return value + (1 - beta) / waves * math.sin(waves * t), slope + (1 - beta) * math.cos(waves * t)


def yanai(first: float, second: float) -> Along:
    gammas = [math.sqrt(1 + beta * beta) - beta for beta in (first, second)]

    def along(t: float) -> tuple[float, float]:
        left, right = math.hypot(1 - t, second), math.hypot(t, first)
        return gammas[0] * left + gammas[1] * right, gammas[0] * (t - 1) / left + gammas[1] * t / right

    return along


ALONG: list[tuple[Along, float, float, tuple[int, int, int, int]]] = [
    (one, 1e-3, 0.1, (6, 3, 1, 4)),
    (two, 0.1, 0.1, (12, 8, 8, 11)),
    (three, 0.1, 0.1, (12, 12, 10, 13)),
    (yanai(1e-3, 1e-3), 1e-3, 1e-3, (4, 1, 3, 4)),
    (yanai(1e-2, 1e-3), 1e-3, 1e-3, (6, 3, 7, 8)),
    (yanai(1e-3, 1e-2), 1e-3, 1e-3, (13, 11, 8, 11)),
]
"""The function, c1, c2, and the published numbers of trials when the first is 1e-3, 0.1, 10 and 1000."""
