"""Batches for the steps: the photographs of the training job in any size, or noise where they are not installed."""

from __future__ import annotations

import torch
from training import Batch

from adcert import data
from adcert.errors import AdcertError


def pictures(batch: int, count: int, size: int = 32) -> tuple[list[Batch], str]:
    """The same batches every time, and what they show.

    Noise has square spots of one grey level, so that equal patches, and with them ties, occur as on photographs.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        photos = data.load("photos").train
    except AdcertError:
        spots = torch.randint(0, 256, (count, batch, 3, -(-size // 4), -(-size // 4)), generator=generator)
        x = spots.repeat_interleave(4, 3).repeat_interleave(4, 4)[..., :size, :size] / 128 - 1
        return [(image, torch.randint(10, (batch,), generator=generator)) for image in x], "noise"
    assert isinstance(photos, data.Crops)
    crops = data.Crops(photos.photos, size, photos.length)
    return [crops.draw(batch, generator) for _ in range(count)], "photographs"
