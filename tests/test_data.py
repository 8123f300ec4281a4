"""The embedded data: ranges, the split, determinism, and what happens without the extra."""

from __future__ import annotations

import sys

import pytest
import torch

from adcert import data
from adcert.data import Crops, Images, Loader, Table
from adcert.errors import AdcertError


@pytest.fixture(scope="module")
def photos() -> Images:
    return data.load("photos")


@pytest.fixture
def table() -> Images:
    """Ten 1x1 images with the values 0..9."""
    x, y = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)
    return Images("ten", tuple("0123456789"), (1, 1, 1), Table(x, y), (x[:0], y[:0]))


def first(loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(loader))


def test_photos_shapes_and_types(photos: Images) -> None:
    x, y = first(Loader(photos, 64))
    assert (x.shape, x.dtype) == ((64, 3, 32, 32), torch.float32)
    assert (y.shape, y.dtype) == ((64,), torch.int64)
    assert photos.classes == tuple(name for name, _, _ in data.PHOTOS)
    assert set(photos.test[1].tolist()) == set(range(10))


def test_photos_undone_normalisation_gives_bytes(photos: Images) -> None:
    """x * deviation + mean is a multiple of 1/255 between 0 and 1: the pixels of the photograph."""
    x, _ = first(Loader(photos, 16))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.PHOTO_MEAN, data.PHOTO_STD))
    levels = (x * std + mean) * 255
    assert float((levels - levels.round()).abs().max()) < 1e-3
    assert float(levels.min()) > -0.1
    assert float(levels.max()) < 255.1


def test_normalise_by_hand() -> None:
    pixels = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    pixels[..., 1] = 255
    x = data._normalise(pixels)
    expected = [
        [[-0.485 / 0.229, 0.515 / 0.229]],
        [[-0.456 / 0.224, 0.544 / 0.224]],
        [[-0.406 / 0.225, 0.594 / 0.225]],
    ]
    torch.testing.assert_close(x, torch.tensor([expected]))


def test_crops_by_hand() -> None:
    """A photograph of width 3 and crop 2: four corners, each with its mirror image, nothing else."""
    photo = torch.arange(9, dtype=torch.uint8).view(1, 3, 3).expand(3, 3, 3)
    x, y = Crops((photo,), 2, 400).draw(400, torch.Generator().manual_seed(0))
    corners = [photo[:, i : i + 2, j : j + 2] for i in (0, 1) for j in (0, 1)]
    possible = data._normalise(torch.stack(corners + [c.flip(-1) for c in corners]))
    seen = {next(k for k, p in enumerate(possible) if torch.equal(p, crop)) for crop in x}
    assert seen == set(range(8))
    assert torch.equal(y, torch.zeros(400, dtype=torch.int64))


def test_test_region_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every photograph replaced by one whose value is its column: the two sides share no column."""
    ramp = torch.arange(200, dtype=torch.uint8).view(1, 1, 200).expand(3, 40, 200)
    monkeypatch.setattr(data, "_read", lambda package, file: ramp)
    images = data.load("photos", 32)
    assert isinstance(images.train, Crops)
    assert {int(p.max()) for p in images.train.photos} == {149}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.PHOTO_MEAN, data.PHOTO_STD))
    assert round(float(((images.test[0] * std + mean) * 255).min())) == 150


def test_spread_takes_evenly_spaced_tiles() -> None:
    tiles = torch.arange(10)
    assert data._spread(tiles, 4).tolist() == [0, 2, 5, 7]
    assert data._spread(tiles, 99).tolist() == list(range(10))


def test_digits_shapes_split_and_values() -> None:
    images = data.load("digits", 8)
    assert isinstance(images.train, Table)
    assert (images.train.length, len(images.test[1])) == (1438, 359)
    levels = (images.train.x * data.DIGIT_STD + data.DIGIT_MEAN) * 16
    assert float((levels - levels.round()).abs().max()) < 1e-3
    assert images.train.y[:6].tolist() == [0, 1, 2, 3, 5, 6]  # the fifth image, a 4, is held out


def test_digits_enlarged() -> None:
    assert data.load("digits", 32).test[0].shape == (359, 1, 32, 32)


@pytest.mark.parametrize("name", data.DATA)
def test_same_seed_same_batches_and_random_state_untouched(name: str) -> None:
    images = data.load(name)
    state = torch.get_rng_state()
    one, two, other = (list(Loader(images, 32, seed=s, steps=3)) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for p, q in zip(one, two, strict=True) for a, b in zip(p, q, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    assert not torch.equal(one[0][0], one[1][0])


def test_table_epoch_is_a_permutation_without_the_rest(table: Images) -> None:
    loader = Loader(table, 3)
    assert len(loader) == 3
    seen = torch.cat([y for _, y in loader])
    assert (len(seen), len(set(seen.tolist()))) == (9, 9)
    assert all(float(v) == int(k) for x, y in Loader(table, 3) for v, k in zip(x.view(-1), y, strict=True))


def test_epochs_differ_and_can_be_resumed(table: Images) -> None:
    loader = Loader(table, 5)
    epochs = [torch.cat([y for _, y in loader]).tolist() for _ in range(3)]
    assert epochs[0] != epochs[1]
    resumed = Loader(table, 5, epoch=2)
    assert torch.cat([y for _, y in resumed]).tolist() == epochs[2]


def test_steps_run_into_the_next_epoch(table: Images) -> None:
    long = [y.tolist() for _, y in Loader(table, 5, steps=3)]
    loader = Loader(table, 5)
    short = [y.tolist() for _ in range(2) for _, y in loader]
    assert long == short[:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"batch_size": 2, "steps": 0}, "at least 1, got 2 and 0"),
        ({"batch_size": 11}, "larger than the 10 training samples of 'ten'"),
    ],
)
def test_bad_loader(table: Images, options: dict[str, int], message: str) -> None:
    with pytest.raises(AdcertError, match=message):
        Loader(table, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("coco", 32, "unknown data 'coco'"), ("digits", 0, "size=0"), ("photos", 200, "do not fit")],
)
def test_bad_load(name: str, size: int, message: str) -> None:
    with pytest.raises(AdcertError, match=message):
        data.load(name, size)


@pytest.mark.parametrize(
    ("name", "module", "distribution"),
    [("digits", "sklearn.datasets", "scikit-learn"), ("photos", "skimage.data", "scikit-image")],
)
def test_missing_extra_names_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, distribution: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        AdcertError, match=rf'{distribution}.*pip install --no-build-isolation -e "\.\[train\]"'
    ):
        data.load(name)


def test_photograph_that_is_not_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PHOTOS", (("none", "skimage.data", "none.png"),))
    with pytest.raises(AdcertError, match=r"does not ship none\.png"):
        data.load("photos")
