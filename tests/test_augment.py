"""Crops, flips and normalisation, against every possible answer or by hand."""

from __future__ import annotations

import math

import pytest
import torch

from adcert.augment import AREA, RATIO, crop_and_flip, middle_crop, normalise, random_box, random_crop

image = pytest.importorskip("PIL.Image", reason="photographs are PIL images")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalise_by_hand() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1)
    assert normalise(pixels, (0.5, 0.5), (0.5, 0.25)).flatten().tolist() == [-1.0, 2.0]


def test_a_shifted_image_is_one_of_all_possible_ones() -> None:
    """Padding 1: nine places and two mirror images, each of them met, in both channels alike."""
    x = torch.arange(1, 13, dtype=torch.uint8).view(1, 2, 2, 3)
    black = torch.zeros(1, 2, 4, 5, dtype=torch.uint8)
    black[:, :, 1:3, 1:4] = x
    possible = [black[0, :, i : i + 2, j : j + 3] for i in range(3) for j in range(3)]
    possible += [one.flip(-1) for one in possible]
    found = crop_and_flip(x.expand(600, -1, -1, -1), 1, generator())
    assert found.dtype == torch.uint8 and found.is_contiguous()
    seen = [next(k for k, one in enumerate(possible) if torch.equal(one, crop)) for crop in found]
    counts = torch.tensor(seen).bincount(minlength=18)
    assert int(counts.min()) > 0
    assert float(((counts - 600 / 18) ** 2).sum() / (600 / 18)) < 40.8  # chi-square, 17 degrees of freedom, 0.999


def test_each_image_stays_in_its_place() -> None:
    x = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 1, 1)
    assert torch.equal(crop_and_flip(x, 0, generator()), x)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (1, 1), (7, 300), (300, 7)])
def test_boxes_lie_inside(width: int, height: int) -> None:
    draws = generator()
    for _ in range(200):
        left, top, right, bottom = random_box(width, height, draws)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_boxes_are_of_the_right_sizes() -> None:
    """Of a square one: the logarithm of the ratio is uniform, and so is the share s up to 3/4. Of larger boxes those
    with a ratio beyond s to 1 / s are refused, which leaves the fraction log(1 / s) / log(4 / 3) of them; a share below
    0.4 then has the probability 0.32 / (0.67 + 0.119).
    """
    draws, count = generator(1), 4000
    boxes = [random_box(1000, 1000, draws) for _ in range(count)]
    shares = torch.tensor([(r - x) * (b - y) / 1e6 for x, y, r, b in boxes])
    ratios = torch.tensor([math.log((r - x) / (b - y)) for x, y, r, b in boxes])
    assert float(shares.min()) > AREA[0] - 0.01 and float(shares.max()) <= 1
    assert float(ratios.min()) > math.log(RATIO[0]) - 0.01 and float(ratios.max()) < math.log(RATIO[1]) + 0.01
    assert abs(float(ratios.mean())) < 0.02  # its deviation is 0.17 / sqrt(4000)
    assert abs(float((shares < 0.4).float().mean()) - 0.4056) < 0.03  # its deviation is 0.0078


def test_a_narrow_image_gives_its_middle() -> None:
    """100 x 10 000: no box of 8 % is as narrow as that. The widest box is 100 wide and 133 high."""
    assert random_box(100, 10000, generator()) == (0, 4933, 100, 5066)


def test_random_crop_by_hand() -> None:
    """Every box of a picture of one colour has that colour; half of the crops of a ramp are mirrored."""
    assert random_crop(image.new("RGB", (30, 20), (1, 2, 3)), 8, generator()).getcolors() == [(64, (1, 2, 3))]
    ramp = image.linear_gradient("L").rotate(90)
    draws = generator()
    crops = [random_crop(ramp, 8, draws) for _ in range(200)]
    rising = sum(crop.getpixel((0, 0)) < crop.getpixel((7, 0)) for crop in crops)
    assert 70 < rising < 130


def test_middle_crop_by_hand() -> None:
    """7 pixels of an 8 x 12 image: the shorter side is 8 = 7 * 256 / 224 already; rows 2 to 8, columns 0 to 6."""
    picture = image.frombytes("L", (8, 12), bytes(range(96)))
    crop = middle_crop(picture, 7)
    assert list(crop.tobytes()) == [8 * (2 + i) + j for i in range(7) for j in range(7)]
    assert middle_crop(image.new("RGB", (3, 500)), 224).size == (224, 224)
