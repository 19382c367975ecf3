# SPDX-License-Identifier: Apache-2.0
"""The paper's layers against their formulas, written out place by place."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distbelief import layers
from distbelief.errors import ConfigurationError
from distbelief.layers import L2Pool2d, LocalContrastNorm2d, LocallyConnected2d

SIZES = [
    ((7, 7), 3, 1, 0), ((7, 7), 3, 1, 1), ((8, 5), (3, 2), (2, 1), (1, 0)), ((6, 9), (1, 4), 3, (0, 2)),
    ((4, 4), 4, 1, 0),
]  # fmt: skip
"""Plane, kernel, stride, padding."""


def made(plane: tuple[int, int], kernel: int, stride: int, padding: int, *, bias: bool = True) -> LocallyConnected2d:
    torch.manual_seed(3)
    return LocallyConnected2d(2, 3, plane, kernel, stride, padding, bias).double()


def by_the_formula(layer: LocallyConnected2d, x: Tensor) -> Tensor:
    (rows, columns), (height, width) = layer.out_plane, layer.kernel_size
    weight = layer.weight.reshape(rows, columns, height, width, layer.in_channels, layer.out_channels)
    padded = functional.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    y = x.new_zeros(len(x), layer.out_channels, rows, columns)
    for i, j, u, v in itertools.product(range(rows), range(columns), range(height), range(width)):
        seen = padded[:, :, i * layer.stride[0] + u, j * layer.stride[1] + v]
        y[:, :, i, j] += seen @ weight[i, j, u, v]
    return y if layer.bias is None else y + layer.bias.permute(2, 0, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_place_of_a_locally_connected_layer_has_filters_of_its_own(size: tuple[object, ...], bias: bool) -> None:
    layer = made(*size, bias=bias)  # type: ignore[arg-type]
    x = torch.randn(4, 2, *size[0], dtype=torch.float64)  # type: ignore[misc]
    torch.testing.assert_close(layer(x), by_the_formula(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strip_bytes", [1, 3000, 2**20])
@pytest.mark.parametrize("size", SIZES)
def test_its_gradients_are_those_of_the_formula_however_the_plane_is_cut_into_strips(
    size: tuple[object, ...], strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "PATCHES_BYTES", strip_bytes)
    layer = made(*size)  # type: ignore[arg-type]
    x = torch.randn(4, 2, *size[0], dtype=torch.float64, requires_grad=True)  # type: ignore[misc]
    wanted = [x, *layer.parameters()]
    y = by_the_formula(layer, x)
    weight = torch.randn_like(y)
    expected = torch.autograd.grad((y * weight).sum(), wanted)
    for found, gradient in zip(torch.autograd.grad((layer(x) * weight).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_with_equal_filters_everywhere_it_is_a_convolution() -> None:
    layer = made((9, 8), 3, 2, 1)
    with torch.no_grad():
        layer.weight.copy_(layer.weight[0, 0].expand_as(layer.weight))
        assert layer.bias is not None
        layer.bias.copy_(layer.bias[0, 0].expand_as(layer.bias))
    x = torch.randn(4, 2, 9, 8, dtype=torch.float64)
    filters = layer.weight[0, 0].reshape(3, 3, 2, 3).permute(3, 2, 0, 1)
    torch.testing.assert_close(layer(x), functional.conv2d(x, filters, layer.bias[0, 0], 2, 1), rtol=1e-12, atol=1e-12)


def test_its_first_values_are_uniform_and_small_enough_for_its_inputs() -> None:
    torch.manual_seed(0)
    layer = LocallyConnected2d(4, 8, 16, 5)
    bound = 1 / math.sqrt(4 * 25)
    assert layer.weight.shape == (12, 12, 100, 8)
    for values in layer.state_dict().values():
        assert values.abs().max() <= bound
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_l2_pooling_is_the_root_of_the_summed_squares_of_a_window() -> None:
    x = torch.randn(3, 2, 7, 8, dtype=torch.float64)
    pooled = L2Pool2d((2, 3), (2, 1), (1, 0), eps=0.0)(x)
    padded = functional.pad(x, (0, 0, 1, 1))
    for i, j in itertools.product(range(4), range(6)):
        window = padded[:, :, 2 * i : 2 * i + 2, j : j + 3]
        torch.testing.assert_close(pooled[:, :, i, j], window.square().sum((2, 3)).sqrt(), rtol=1e-12, atol=1e-12)
    assert pooled.shape == (3, 2, 4, 6)
    assert L2Pool2d(3)(x).shape == (3, 2, 2, 2)


def test_l2_pooling_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    L2Pool2d(2)(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("kernel", "constant"), [(3, 1e-2), (5, 0.7)])
def test_contrast_normalisation_subtracts_the_surroundings_and_divides_by_their_deviation(
    kernel: int, constant: float
) -> None:
    channels, plane, middle = 3, 6, kernel // 2
    x = torch.randn(2, channels, plane, plane, dtype=torch.float64)
    window = {
        (u, v): math.exp(-(u * u + v * v) / (2 * (0.25 * kernel) ** 2))
        for u, v in itertools.product(range(-middle, middle + 1), repeat=2)
    }
    total = channels * sum(window.values())

    def around(values: Tensor, i: int, j: int) -> Tensor:
        summed = values.new_zeros(len(values))
        for (u, v), weight in window.items():
            if 0 <= i + u < plane and 0 <= j + v < plane:
                summed += weight / total * values[:, :, i + u, j + v].sum(1)
        return summed[:, None]

    places = list(itertools.product(range(plane), repeat=2))
    centred, expected = torch.empty_like(x), torch.empty_like(x)
    for i, j in places:
        centred[:, :, i, j] = x[:, :, i, j] - around(x, i, j)
    for i, j in places:
        expected[:, :, i, j] = centred[:, :, i, j] / around(centred.square(), i, j).sqrt().clamp(min=constant)
    found = LocalContrastNorm2d(channels, kernel, constant)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_contrast_normalisation_of_a_constant_plane_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 2, 5, 5, requires_grad=True)
    LocalContrastNorm2d(2, 3)(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_a_window_without_a_middle_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"LocalContrastNorm2d\(kernel_size=4\): the window has no middle"):
        LocalContrastNorm2d(2, 4)


def test_the_layers_say_what_they_are() -> None:
    assert repr(LocallyConnected2d(1, 2, 6, 3, padding=1)) == (
        "LocallyConnected2d(1, 2, plane=(6, 6), kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=True)"
    )
    assert repr(L2Pool2d(2)) == "L2Pool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0), eps=1e-08)"
    assert repr(LocalContrastNorm2d(4, 5)) == "LocalContrastNorm2d(4, kernel_size=5, constant=0.01)"
