# SPDX-License-Identifier: Apache-2.0
"""The physics-informed example: its reference solves the equation, its gradient is right, and the error falls."""

import dataclasses
from pathlib import Path

import pytest
import torch

import distbelief as db
from tests import problems


def test_the_reference_solves_the_equation_and_its_initial_and_boundary_values() -> None:
    with problems.example("pinn") as pinn:
        generator = torch.Generator().manual_seed(0)
        x = 0.1 + 0.8 * torch.rand(50, generator=generator, dtype=torch.float64)
        t = 0.1 + 0.9 * torch.rand(50, generator=generator, dtype=torch.float64)

        def u(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return pinn.solution(torch.stack([x, t], 1))

        h = 1e-4
        u_t, u_x = (u(x, t + h) - u(x, t - h)) / (2 * h), (u(x + h, t) - u(x - h, t)) / (2 * h)
        u_xx = (u(x + h, t) - 2 * u(x, t) + u(x - h, t)) / h**2
        torch.testing.assert_close(u_t + u(x, t) * u_x, pinn.NU * u_xx, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(u(x, torch.full_like(x, 1e-6)), -torch.sin(torch.pi * x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(u(torch.ones(3).double(), t[:3]), torch.zeros(3).double(), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_error_falls_below_a_tenth_in_three_hundred_iterations(tmp_path: Path) -> None:
    with problems.example("pinn") as pinn:
        job = pinn.job(points=1024)  # with half of them the error stays at a tenth
        algorithm = dataclasses.replace(job.algorithm, max_iterations=300)
        cluster = db.Cluster(replicas=1, engine="simulated")
        result = db.train(
            dataclasses.replace(job, algorithm=algorithm, cluster=cluster, run=tmp_path / "run"), view=False
        )
    assert (result.test["relative_l2_error"] or 1.0) < 0.1
