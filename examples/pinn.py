# SPDX-License-Identifier: Apache-2.0
"""A physics-informed network for the viscous Burgers equation, u_t + u u_x = nu u_xx, by full-batch L-BFGS in float64:

distbelief train examples/pinn.py --cluster.replicas 2
python examples/pinn.py                                  (also draws burgers.png: the network beside the solution)
"""

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db

NU = 0.01 / math.pi


def solution(points: Tensor) -> Tensor:
    """u at (x, t > 0), shape (n, 2) -> (n,), for u(x, 0) = -sin(pi x): Cole and Hopf's formula by Gauss and Hermite."""
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite.hermgauss(100))
    y = points[:, :1] - nodes * 2 * (NU * points[:, 1:]).sqrt()
    kernel = weights * torch.exp(-torch.cos(math.pi * y) / (2 * math.pi * NU))
    return -(torch.sin(math.pi * y) * kernel).sum(1) / kernel.sum(1)


class Burgers(nn.Module):
    """-sin(pi x) + t (1 - x^2) N(x, t): the initial and boundary values hold whatever the network N says."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [2, *[width] * layers]
        hidden = [part for ends in itertools.pairwise(widths) for part in (nn.Linear(*ends), nn.Tanh())]
        self.network = nn.Sequential(*hidden, nn.Linear(width, 1)).double()

    def forward(self, points: Tensor) -> Tensor:
        x, t = points[:, 0], points[:, 1]
        return -torch.sin(math.pi * x) + t * (1 - x**2) * self.network(points)[:, 0]


def residual(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Mean over the points of how far the equation is from holding, squared."""
    points = batch[0].requires_grad_()
    with torch.enable_grad():
        u = model(points)
        u_x, u_t = torch.autograd.grad(u.sum(), points, create_graph=True)[0].unbind(1)
        u_xx = torch.autograd.grad(u_x.sum(), points, create_graph=True)[0][:, 0]
    return (u_t + u * u_x - NU * u_xx).square().mean()


def error(model: nn.Module, test: TensorDataset) -> dict[str, float]:
    (points,) = test.tensors
    exact = solution(points)
    return {"relative_l2_error": float((model(points) - exact).norm() / exact.norm())}


def collocation(count: int) -> TensorDataset:
    """Half of the points where the front is: it is as steep as 1 / nu there."""
    square = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=torch.float64)
    x = 2 * square[:, 0] - 1
    return TensorDataset(torch.stack([torch.where(torch.arange(count) % 2 == 0, x, x**3 / 2), square[:, 1]], 1))


def grid() -> TensorDataset:
    return TensorDataset(torch.cartesian_prod(torch.linspace(-1, 1, 201), torch.linspace(0.01, 1, 100)).double())


def job(points: int = 4096, width: int = 24, layers: int = 4) -> db.Job:
    return db.Job(
        model=functools.partial(Burgers, width, layers), step=residual, data=functools.partial(collocation, points),
        test=grid, evaluate=error, evaluate_every=200 * points,
        algorithm=db.Sandblaster(history=50, max_iterations=3000, gtol=1e-8, ftol=0.0),
        cluster=db.Cluster(replicas=2),
    )  # fmt: skip


if __name__ == "__main__":
    from matplotlib.figure import Figure

    model = db.train(job()).model
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(title="Burgers: the network (lines) and the solution (dots)", xlabel="x", ylabel="u")
    for t in (0.1, 0.3, 0.6, 1.0):
        line = torch.stack([torch.linspace(-1, 1, 201).double(), torch.full((201,), t).double()], 1)
        axes.plot(line[:, 0], model(line).detach(), label=f"t = {t}")
        axes.plot(line[::4, 0], solution(line[::4]), "k.", markersize=2)
    axes.legend()
    figure.savefig(Path("burgers.png"), dpi=120)
