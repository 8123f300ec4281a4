"""Crops, flips and normalisation of training images, drawn from a generator of the caller's.

A photograph is a PIL image; a batch is uint8 [B, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from PIL.Image import Image

AREA: Final = (0.08, 1.0)  # of a random crop, as a share of the image
RATIO: Final = (3 / 4, 4 / 3)  # of its width to its height
TRIES: Final = 10
MARGIN: Final = 256 / 224  # shorter side to crop in evaluation


def normalise(pixels: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """uint8 [..., C, H, W] to float32: value / 255, minus mean, over deviation.

    Example:
        >>> normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), (0.5,), (0.25,)).item()
        2.0
    """
    shape = (len(mean), 1, 1)
    return (pixels.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(deviation).view(shape)


def crop_and_flip(pixels: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to ``padding`` pixels in each direction, with black behind it, and mirrored half the time.

    uint8 [B, C, H, W]; all shifts and flips are uniform and independent.
    """
    count, _, height, width = pixels.shape
    shifts = torch.randint(2 * padding + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    padded = functional.pad(pixels, (padding,) * 4)
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    rows = torch.arange(height) + shifts[:, :1]
    images = torch.arange(count)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_box(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop of 8 to 100 % of the image and of a ratio of 3:4 to 4:3.

    The ratio is uniform on a logarithmic scale, as in Szegedy et al., "Going deeper with convolutions" (CVPR 2015).
    After ten tries that do not fit: the largest box of the nearest ratio, in the middle.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for area, ratio, x, y in torch.rand(TRIES, 4, generator=generator, dtype=torch.float64).tolist():
        share = (AREA[0] + area * (AREA[1] - AREA[0])) * width * height
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_crop(image: Image, size: int, generator: torch.Generator) -> Image:
    """A random box of the image, resized to ``size`` pixels a side, mirrored half the time."""
    from PIL.Image import Resampling, Transpose

    crop = image.crop(random_box(*image.size, generator)).resize((size, size), Resampling.BILINEAR)
    mirrored = torch.rand((), generator=generator).item() < 0.5
    return crop.transpose(Transpose.FLIP_LEFT_RIGHT) if mirrored else crop


def middle_crop(image: Image, size: int) -> Image:
    """The middle ``size`` pixels a side of the image, whose shorter side is first resized to 256/224 of that."""
    from PIL.Image import Resampling

    width, height = image.size
    shorter = max(size, round(size * MARGIN))
    scale = shorter / min(width, height)
    width, height = max(shorter, int(width * scale)), max(shorter, int(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size))
