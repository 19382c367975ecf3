# SPDX-License-Identifier: Apache-2.0
"""Multinomial logistic regression on the handwritten digits of scikit-learn, to its optimum, with L1 or L2 or neither:

distbelief train examples/logistic.py --algorithm.l1 0.002 --algorithm.l2 0 --cluster.replicas 2
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db

TRAIN = 1437


def digits(first: int, last: int) -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(pixels[first:last]) / 16, torch.from_numpy(labels[first:last]).long())


def train_set() -> TensorDataset:
    return digits(0, TRAIN)


def test_set() -> TensorDataset:
    return digits(TRAIN, 1797)


def model() -> nn.Module:
    layer = nn.Linear(64, 10).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def job() -> db.Job:
    return db.Job(
        model=model,
        loss=nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
        data=train_set,
        test=test_set,
        # Penalties are of the weights, not of the biases, and are added to the mean loss.
        algorithm=db.Sandblaster(l2=1e-3, max_iterations=3000, gtol=1e-6, ftol=1e-12),
        cluster=db.Cluster(replicas=2),
        evaluate_every=100 * TRAIN,
    )


if __name__ == "__main__":
    db.main(job)
