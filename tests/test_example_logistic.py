# SPDX-License-Identifier: Apache-2.0
"""The logistic example finds scikit-learn's optimum."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

import distbelief as db
from tests import problems


def objective(weight: torch.Tensor, bias: torch.Tensor, l1: float, l2: float, module: object) -> float:
    inputs, targets = module.train_set().tensors  # type: ignore[attr-defined]
    loss = nn.functional.cross_entropy(inputs @ weight.T + bias, targets)
    return float(loss + l2 / 2 * weight.square().sum() + l1 * weight.abs().sum())


@pytest.mark.slow
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 1e-3), (2e-3, 0.0)])
def test_the_optimum_is_that_of_scikit_learn(l1: float, l2: float, tmp_path: Path) -> None:
    with problems.example("logistic") as logistic:
        job = logistic.job()
        algorithm = dataclasses.replace(job.algorithm, l1=l1, l2=l2)
        cluster = db.Cluster(replicas=2, shards=2, engine="simulated")
        job = dataclasses.replace(job, algorithm=algorithm, cluster=cluster, run=tmp_path / "run")
        result = db.train(job, view=False)
        state = result.model.state_dict()
        inputs, targets = (tensor.numpy() for tensor in logistic.train_set().tensors)
        # Scikit-learn's C multiplies the sum of the losses, and L1 with several classes is saga's.
        reference = LogisticRegression(
            C=1 / (len(targets) * (l1 or l2)), l1_ratio=1.0 if l1 else 0.0, solver="saga" if l1 else "lbfgs",
            tol=1e-8 if l2 else 1e-7, max_iter=20_000,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            reference.fit(inputs, targets)
        theirs = objective(torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_), l1, l2, logistic)
        score = reference.score(*(tensor.numpy() for tensor in logistic.test_set().tensors))
        ours = objective(state["weight"], state["bias"], l1, l2, logistic)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert result.test["accuracy"] == pytest.approx(score, abs=0.005)
    if l1:
        zeros, expected = state["weight"].numpy() == 0, np.abs(reference.coef_) < 1e-9
        assert 0.3 < zeros.mean() < 0.9
        assert (zeros == expected).mean() > 0.99
