# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits, the 1797 images of 8 x 8 pixels that come with scikit-learn, on four model replicas.

    python examples/digits.py --cluster.replicas 4 --cluster.shards 2
    python examples/digits.py --untied --cluster.replicas 2 --cluster.partitions 4

It ends at 97 to 98 % test accuracy after a few seconds of training, the paper's kind of network at 98 to 99 %.
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db

SPLIT_SEED = 0


def digits(test: bool) -> TensorDataset:
    """A fixed random fifth of the images for testing, the others for training: pixels in [0, 1] and labels."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = order[: len(order) // 5] if test else order[len(order) // 5 :]
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return TensorDataset(images[chosen], torch.as_tensor(labels, dtype=torch.int64)[chosen])


def convolutional(channels: int) -> nn.Module:
    """Two convolutions with a pooling between them, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 4 * 4, 10),
    )


def locally_connected(channels: int) -> nn.Module:
    """The paper's vision model in small: twice filters of which every place has its own, pooling, normalisation."""
    return nn.Sequential(
        db.LocallyConnected2d(1, channels, 8, kernel_size=3, padding=1),
        db.L2Pool2d(2),
        db.LocalContrastNorm2d(channels, kernel_size=3),
        db.LocallyConnected2d(channels, 2 * channels, 4, kernel_size=3, padding=1),
        db.L2Pool2d(2),
        db.LocalContrastNorm2d(2 * channels, kernel_size=3),
        nn.Flatten(),
        nn.Linear(2 * channels * 2 * 2, 10),
    )


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The fraction of images whose largest score is that of their digit."""
    return (output.argmax(1) == target).float().mean()


def job(channels: int = 16, untied: bool = False) -> db.Job:
    """`channels` of the first layer; the second has twice as many. `untied` for filters that are not shared."""
    return db.Job(
        model=functools.partial(locally_connected if untied else convolutional, channels),
        loss=nn.functional.cross_entropy,
        data=functools.partial(digits, test=False),
        test=functools.partial(digits, test=True),
        metrics={"accuracy": accuracy},
        algorithm=db.Downpour(update_rule=db.adagrad(0.05)),
        cluster=db.Cluster(replicas=4, shards=2),
        epochs=20,
        batch_size=32,
    )


if __name__ == "__main__":
    db.main(job)
