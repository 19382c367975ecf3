# SPDX-License-Identifier: Apache-2.0
"""The layers of the paper's vision model (section 5; Le et al., ICML 2012) that torch does not have.

Filters that see a patch each and share no weights, L2 pooling, local contrast normalisation. They are ordinary modules,
to be used with or without partitions.
"""

import math
from typing import Any, final

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from distbelief.errors import ConfigurationError

Pair = tuple[int, int]

PATCHES_BYTES = 2**20
"""How much a locally connected layer gathers at a time: what a core's cache holds."""

DEVIATION = 0.25
"""Standard deviation of the Gaussian window of local contrast normalisation, in windows."""


def pair(value: int | Pair) -> Pair:
    """One number for both dimensions of the plane, or one for each."""
    return (value, value) if isinstance(value, int) else value


@final
class LocallyConnected2d(nn.Module):
    """A convolution whose filters are not tied: every place of the output plane has its own.

        y[b, o, i, j] = bias[i, j, o] + sum over u, v, c of x[b, c, i*s - p + u, j*s - p + v] w[i, j, (u, v, c), o]

    `weight` has the shape (height, width, inputs of a unit, out_channels), height and width of the output plane, with
    kernel height * kernel width * in_channels inputs; `bias` has (height, width, out_channels). Padding is zero.
    """

    def __init__(
        self, in_channels: int, out_channels: int, plane: int | Pair, kernel_size: int | Pair,
        stride: int | Pair = 1, padding: int | Pair = 0, bias: bool = True,
    ) -> None:  # fmt: skip
        """`plane` is height and width of the input, which is fixed since every place has weights of its own."""
        super().__init__()
        self.in_channels, self.out_channels, self.plane = in_channels, out_channels, pair(plane)
        self.kernel_size, self.stride, self.padding = pair(kernel_size), pair(stride), pair(padding)
        self.out_plane = tuple(
            (length + 2 * p - k) // s + 1
            for length, k, s, p in zip(self.plane, self.kernel_size, self.stride, self.padding, strict=True)
        )
        inputs = in_channels * math.prod(self.kernel_size)
        self.weight = nn.Parameter(torch.empty(*self.out_plane, inputs, out_channels))
        self.bias = nn.Parameter(torch.empty(*self.out_plane, out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(inputs of a unit), like torch's convolutions."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, in_channels, *plane) to (batch, out_channels, *out_plane)."""
        up, left = self.padding
        x = functional.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up)).contiguous()
        y: torch.Tensor = _Untied.apply(x, self.weight, self.kernel_size, self.stride)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias.unsqueeze(2)
        return y.permute(2, 3, 0, 1).contiguous()

    def extra_repr(self) -> str:
        """The arguments, as torch's layers show them."""
        return (
            f"{self.in_channels}, {self.out_channels}, plane={self.plane}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


class _Untied(torch.autograd.Function):
    """Patches times their weights, some rows of the plane at a time.

    Gathered into patches, the input takes as many times its memory as a patch has places. Patches are gathered again in
    the backward pass, so that they stay in the cache and are never kept. Channels come last, which makes long copies.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, kernel: Pair, stride: Pair) -> torch.Tensor:
        """From (batch, height, width, channels) to (rows, columns, batch, outputs)."""
        ctx.save_for_backward(x, weight)
        ctx.kernel, ctx.stride = kernel, stride
        y = x.new_empty((*weight.shape[:2], x.shape[0], weight.shape[3]))
        for low, high in _strips(x, weight):
            patches = _patches(x, low, high, kernel, stride)
            torch.bmm(patches, weight[low:high].flatten(0, 1), out=y[low:high].flatten(0, 1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        x, weight = ctx.saved_tensors
        gradient, of_weight = gradient.contiguous(), torch.empty_like(weight)
        of_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for low, high in _strips(x, weight):
            back = gradient[low:high].flatten(0, 1)
            patches = _patches(x, low, high, ctx.kernel, ctx.stride)
            torch.bmm(patches.transpose(1, 2), back, out=of_weight[low:high].flatten(0, 1))
            if of_x is not None:
                seen = torch.bmm(back, weight[low:high].flatten(0, 1).transpose(1, 2))
                _add_patches(of_x, seen, low, high, ctx.kernel, ctx.stride)
        return of_x, of_weight, None, None


def _strips(x: torch.Tensor, weight: torch.Tensor) -> list[Pair]:
    """Ranges of output rows whose patches fit into the cache, one row at least."""
    row_bytes = weight.shape[1] * x.shape[0] * weight.shape[2] * x.element_size()
    rows = max(1, PATCHES_BYTES // max(1, row_bytes))
    return [(low, min(low + rows, weight.shape[0])) for low in range(0, weight.shape[0], rows)]


def _patches(x: torch.Tensor, low: int, high: int, kernel: Pair, stride: Pair) -> torch.Tensor:
    """What the units of output rows [low, high) see: shape (places, batch, inputs)."""
    strip = x[:, low * stride[0] : (high - 1) * stride[0] + kernel[0]]
    windows = strip.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1]).permute(1, 2, 0, 4, 5, 3)
    return windows.reshape(windows.shape[0] * windows.shape[1], x.shape[0], -1)


def _add_patches(x: torch.Tensor, patches: torch.Tensor, low: int, high: int, kernel: Pair, stride: Pair) -> None:
    """Add to `x` what patches of its shape hold for its places: the adjoint of `_patches`, columns first, then rows."""
    batch, _, width, channels = x.shape
    (height, across), (down, right) = kernel, stride
    patches = patches.view(high - low, -1, batch, height, across, channels)
    rows = patches.new_zeros((high - low, width, batch, height, channels))
    for column in range(across):
        rows[:, column : column + (patches.shape[1] - 1) * right + 1 : right] += patches[:, :, :, :, column]
    for row in range(height):
        x[:, low * down + row : (high - 1) * down + row + 1 : down] += rows[:, :, :, row].permute(2, 0, 1, 3)


@final
class L2Pool2d(nn.Module):
    """The root of the summed squares of a window: sqrt(eps + sum of x²), per channel.

    `eps` keeps the gradient finite where a window is zero. Padding is zero.
    """

    def __init__(
        self, kernel_size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0, eps: float = 1e-8
    ) -> None:
        """`stride` None is that of windows side by side."""
        super().__init__()
        self.kernel_size, self.padding, self.eps = pair(kernel_size), pair(padding), eps
        self.stride = self.kernel_size if stride is None else pair(stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, channels, height, width) to (batch, channels, *out_plane)."""
        squares = functional.avg_pool2d(x.square(), self.kernel_size, self.stride, self.padding, divisor_override=1)
        return (squares + self.eps).sqrt()

    def extra_repr(self) -> str:
        """The arguments, as torch's layers show them."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, eps={self.eps}"


@final
class LocalContrastNorm2d(nn.Module):
    """Subtract the mean of the surroundings, divide by their deviation, over all channels of a place.

        v = x - sum of w * x        sigma = sqrt(sum of w * v²)        y = v / max(c, sigma)

    The sums run over the channels and a Gaussian window of `kernel_size` around the place, the weights w add up to 1
    (Jarrett et al., ICCV 2009, with a constant c as in Le et al., ICML 2012). Outside the plane x and v count as zero.
    """

    def __init__(self, channels: int, kernel_size: int = 9, constant: float = 0.01) -> None:
        """`kernel_size` is odd, so that the window has a middle."""
        super().__init__()
        if kernel_size % 2 == 0:
            raise ConfigurationError(
                f"LocalContrastNorm2d(kernel_size={kernel_size}): the window has no middle", hint="use an odd size"
            )
        self.channels, self.kernel_size, self.constant = channels, kernel_size, constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, channels, height, width), and the same again."""
        margin = (self.kernel_size // 2,) * 4
        centred = x - self.mean(functional.pad(x, margin))
        return self.scaled(centred, functional.pad(centred, margin))

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The weighted mean around every place that has a full window in `x`: shape (batch, 1, height, width)."""
        middle = self.kernel_size // 2
        places = torch.arange(-middle, middle + 1, dtype=x.dtype, device=x.device)
        weights = torch.softmax(-0.5 * (places / (DEVIATION * self.kernel_size)).square(), 0)
        return functional.conv2d(x.mean(1, keepdim=True), torch.outer(weights, weights)[None, None])

    def scaled(self, centred: torch.Tensor, surroundings: torch.Tensor) -> torch.Tensor:
        """`centred` over the deviation of its `surroundings`, which reach half a window further on every side."""
        # The larger of two squares before the root: the root has no gradient at zero.
        return centred / self.mean(surroundings.square()).clamp(min=self.constant**2).sqrt()

    def extra_repr(self) -> str:
        """The arguments, as torch's layers show them."""
        return f"{self.channels}, kernel_size={self.kernel_size}, constant={self.constant}"
