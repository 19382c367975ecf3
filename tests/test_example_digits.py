# SPDX-License-Identifier: Apache-2.0
"""examples/digits.py: its data and its network, trained here by a plain PyTorch loop."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_digits

from tests import problems


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    with problems.example("digits") as module:
        yield module


def test_the_example_is_under_80_lines() -> None:
    assert len((problems.EXAMPLES / "digits.py").read_text().splitlines()) < 80


def test_every_image_is_in_exactly_one_of_the_two_sets(digits: ModuleType) -> None:
    pixels, labels = load_digits(return_X_y=True)
    train, test = digits.digits(test=False), digits.digits(test=True)
    assert (len(train), len(test)) == (1438, 359)
    images, found = (torch.cat(parts) for parts in zip(train[:], test[:], strict=True))
    rows = [(*(image * 16).flatten().int().tolist(), int(label)) for image, label in zip(images, found, strict=True)]
    expected = [(*map(int, image), int(label)) for image, label in zip(pixels, labels, strict=True)]
    assert sorted(rows) == sorted(expected)


def test_the_split_is_the_same_whatever_the_global_seed(digits: ModuleType) -> None:
    torch.manual_seed(1)
    first = digits.digits(test=True)
    torch.manual_seed(2)
    again = digits.digits(test=True)
    assert all(torch.equal(a, b) for a, b in zip(first[:], again[:], strict=True))


def test_accuracy_is_the_fraction_of_right_answers(digits: ModuleType) -> None:
    output = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert digits.accuracy(output, torch.tensor([1, 0, 0, 0])) == 0.75


def test_untied_filters_of_two_places_learn_different_things_and_tied_ones_are_the_same(digits: ModuleType) -> None:
    torch.manual_seed(0)
    model, (images, labels) = digits.job(channels=4, untied=True).model(), digits.digits(test=False)[:64]
    digits.job().loss(model(images), labels).backward()
    gradient = model[0].weight.grad
    assert gradient.shape == (8, 8, 9, 4)  # height, width, inputs of a unit, channels
    assert not torch.allclose(gradient[3, 3], gradient[4, 4])
    assert digits.job(channels=4).model()[0].weight.shape == (4, 1, 3, 3)


def test_the_job_trains_four_replicas_against_two_shards(digits: ModuleType) -> None:
    job = digits.job()
    assert (job.cluster.replicas, job.cluster.shards) == (4, 2)


@pytest.mark.parametrize("untied", [False, True])
def test_a_plain_loop_reaches_96_percent_test_accuracy(digits: ModuleType, untied: bool) -> None:
    job = digits.job(untied=untied)
    images, labels = job.data()[:]
    torch.manual_seed(0)
    model = job.model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for _ in range(8):
        for batch in torch.randperm(len(images)).chunk(len(images) // job.batch_size):
            optimizer.zero_grad()
            job.loss(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    test_images, test_labels = job.test()[:]
    with torch.no_grad():
        assert job.metrics["accuracy"](model(test_images), test_labels) >= 0.96
