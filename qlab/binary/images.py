"""First layers on raw images: signs times 8-bit pixels, as bit planes, in exact integers.

A net sees the normalised image x_c = (u_c / 255 - m_c) / s_c, u the pixels. With the digits u = sum_n 2^n u^n of a pixel,

    w . x = sum_c ( I_c / (255 s_c) - m_c S_c / s_c ),    I_c = sum_n 2^n w_c . u_c^n,    S_c = the sum of w_c

I_c and S_c are integers, found with and and popcount; S_c counts only taps inside the image, so zero padding of the normalised
image is exact. The sum over channels is taken in float64, in the order of the channels, and rounded to float32 once: all
backends give the same bits, and they are nearer to the true value than a float32 convolution, whose roundings they do not copy.

Source: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Quantized Neural Networks, JMLR 2018, arXiv 1609.07061, section on the first
layer; the treatment of mean, deviation and border is derived here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from qlab.binary.kernels import reference

__all__ = ["Normalise", "combine", "grouped_weight", "image_weight", "taps"]


class Normalise(nn.Module):
    """Raw pixels as the net was trained on them, (u / 255 - mean) / std: what `DataModule.transform` does.

    Args:
        mean, std: of each channel, on the [0, 1] scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32))

    def forward(self, u: Tensor) -> Tensor:
        """Return the normalised image (N, C, H, W) of pixels u, uint8."""
        shape = (-1, *(1 for _ in u.shape[2:]))
        return u.to(torch.float32).div_(255).sub_(self.mean.view(shape)).div_(self.std.view(shape))


def image_weight(signs: NDArray[np.int8], channels: int) -> NDArray[np.uint64]:
    """Return signs (O, C T) or (O, C, ...) as words (O, C, W(T)), each channel in words of its own."""
    return reference.pack(signs.reshape(len(signs), channels, -1))


def grouped_weight(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return words (O, C, W) as the weight (C O, 1, 1, W) of a convolution with a group per channel."""
    o, c, w = words.shape
    return np.ascontiguousarray(words.transpose(1, 0, 2)).reshape(c * o, 1, 1, w)


def taps(
    u: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the pixels under every window of u (N, C, H, W): (N, OH, OW, C, kh kw), 0 outside the image."""
    u = F.pad(u, (padding[1], padding[1], padding[0], padding[0]))
    windows = u
    for i in (0, 1):
        windows = windows.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(4)


def combine(sums: Tensor, ones: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the products with normalised pixels, float32 (N, ..., O).

    Args:
        sums: I, integers (N, ..., C, O).
        ones: S, integers (..., C, O).
        mean, std: float32 (C,).
    """
    m, s = mean.double(), std.double()
    total = torch.zeros((), dtype=torch.float64, device=sums.device)
    for c in range(sums.shape[-2]):
        total = total + (sums[..., c, :].double() / (255 * s[c]) - ones[..., c, :].double() * (m[c] / s[c]))
    return total.float()
