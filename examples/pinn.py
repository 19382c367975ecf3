# SPDX-License-Identifier: Apache-2.0
"""A physics-informed network for the viscous Burgers equation, u_t + u u_x = nu u_xx, by full-batch L-BFGS in float64:

python examples/pinn.py      (minutes on two cores; draws burgers.png: the network beside the solution)
"""

import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db

NU = 0.01 / math.pi


def solution(points: Tensor) -> Tensor:  # for u(x, 0) = -sin(pi x), t > 0: Cole and Hopf's formula by Gauss and Hermite
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite.hermgauss(100))
    y = points[:, :1] - nodes * 2 * (NU * points[:, 1:]).sqrt()
    kernel = weights * torch.exp(-torch.cos(math.pi * y) / (2 * math.pi * NU))
    return -(torch.sin(math.pi * y) * kernel).sum(1) / kernel.sum(1)


class Burgers(nn.Module):  # -sin(pi x) + t (1 - x^2) (N(x, t) - N(-x, t)): odd, and right at t = 0 and x = +-1
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        ends = itertools.pairwise([2, *[width] * layers])
        hidden = [part for a, b in ends for part in (nn.Linear(a, b), nn.Tanh())]
        self.network = nn.Sequential(*hidden, nn.Linear(width, 1)).double()
        for layer in self.network[::2]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        x, t = points.unbind(1)
        odd = self.network(torch.stack([x, 2 * t - 1], 1)) - self.network(torch.stack([-x, 2 * t - 1], 1))
        return -torch.sin(math.pi * x) + t * (1 - x**2) * odd[:, 0]


def residual(model: nn.Module, batch: tuple[Tensor]) -> Tensor:  # how far the equation is from holding, squared
    points = batch[0].requires_grad_()
    with torch.enable_grad():
        u = model(points)
        u_x, u_t = torch.autograd.grad(u.sum(), points, create_graph=True)[0].unbind(1)
        u_xx = torch.autograd.grad(u_x.sum(), points, create_graph=True)[0][:, 0]
    return (u_t + u * u_x - NU * u_xx).square().mean()


def error(model: nn.Module, test: TensorDataset) -> dict[str, float]:
    exact = solution(*test.tensors)
    return {"relative_l2_error": float((model(*test.tensors) - exact).norm() / exact.norm())}


def collocation(count: int) -> TensorDataset:  # half of the points where the front becomes as steep as 1 / nu
    x, t = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=torch.float64).unbind(1)
    x = (2 * x - 1).abs()
    return TensorDataset(torch.stack([torch.where(torch.arange(count) % 2 == 0, x, x**3), t], 1))


def grid() -> TensorDataset:
    return TensorDataset(torch.cartesian_prod(torch.linspace(-1, 1, 201), torch.linspace(0.01, 1, 100)).double())


def job(points: int = 2048, width: int = 20, layers: int = 4) -> db.Job:
    algorithm = db.Sandblaster(history=50, max_iterations=7000, gtol=0.0, ftol=0.0)
    model, data = functools.partial(Burgers, width, layers), functools.partial(collocation, points)
    return db.Job(
        model=model,
        data=data,
        step=residual,
        test=grid,
        evaluate=error,
        evaluate_every=500 * points,
        algorithm=algorithm,
    )


if __name__ == "__main__":
    from matplotlib.figure import Figure

    model, figure = db.train(job()).model, Figure(figsize=(6, 4))
    axes = figure.add_subplot(title="Burgers: the network (lines) and the solution (dots)", xlabel="x", ylabel="u")
    for t in (0.1, 0.3, 0.6, 1.0):
        line = torch.stack([torch.linspace(-1, 1, 201).double(), torch.full((201,), t).double()], 1)
        axes.plot(line[:, 0], model(line).detach(), label=f"t = {t}")
        axes.plot(line[::4, 0], solution(line[::4]), "k.", markersize=2)
    axes.legend()
    figure.savefig("burgers.png", dpi=120)
