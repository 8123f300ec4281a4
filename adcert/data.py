"""The data of the training job; those that are embedded, for which nothing is downloaded, and :mod:`adcert.hub`'s.

`photos`: 32x32 crops of ten colour photographs that ship inside the scikit-learn and scikit-image wheels, one
class per photograph. `digits`: scikit-learn's 8x8 handwritten digits. Both need the extra `train`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .augment import normalise
from .errors import AdcertError

__all__ = ["DATA", "FILES", "PHOTOS", "Crops", "Images", "Loader", "Table", "load", "parse", "usual_size"]

PHOTOS: Final = (
    ("china", "sklearn.datasets.images", "china.jpg"),
    ("flower", "sklearn.datasets.images", "flower.jpg"),
    ("astronaut", "skimage.data", "astronaut.png"),
    ("cat", "skimage.data", "chelsea.png"),
    ("coffee", "skimage.data", "coffee.png"),
    ("rocket", "skimage.data", "rocket.jpg"),
    ("galaxies", "skimage.data", "hubble_deep_field.jpg"),
    ("retina", "skimage.data", "retina.jpg"),
    ("tissue", "skimage.data", "ihc.png"),
    ("motorcycle", "skimage.data", "motorcycle_left.png"),
)
DATA: Final = ("photos", "digits")
FILES: Final = ("cifar10", "mnist", "imagenet", "imagefolder")  # of `adcert.hub`
CROP: Final = 32
# ImageNet's channel means and deviations, a usual choice for photographs.
PHOTO_MEAN: Final = (0.485, 0.456, 0.406)
PHOTO_STD: Final = (0.229, 0.224, 0.225)
PHOTO_EPOCH: Final = 6400
TEST_TILES: Final = 48
DIGIT_MEAN: Final = 0.3
DIGIT_STD: Final = 0.375


class Source(Protocol):
    """Where training batches come from."""

    @property
    def length(self) -> int:
        """Samples that count as one epoch."""

    def batches(
        self, batch_size: int, generator: torch.Generator, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The `length // batch_size` batches of an epoch, without the first `start`: x float32, y int64 [B]."""


class Held(Protocol):
    """Test images that do not lie in memory as they are needed."""

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them, x float32 and y int64."""


@dataclass(frozen=True)
class Crops:
    """Random crops with horizontal flips from one photograph per class.

    Arguments:
        photos: per class a uint8 tensor [3, H, W].
        size: pixels a side of a crop.
        length: samples that count as one epoch.
    """

    photos: tuple[Tensor, ...]
    size: int
    length: int

    def batches(
        self, batch_size: int, generator: torch.Generator, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`length // batch_size` batches, x float32 [B, 3, size, size], y int64 [B], without the first `start`."""
        for k in range(self.length // batch_size):
            batch = self.draw(batch_size, generator)
            if k >= start:
                yield batch

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` samples: class, corner and flip uniform and independent."""
        y = torch.randint(len(self.photos), (count,), generator=generator)
        corners = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        flips = torch.rand(count, generator=generator) < 0.5
        x = torch.empty(count, 3, self.size, self.size, dtype=torch.uint8)
        for k, (label, (top, left)) in enumerate(zip(y.tolist(), corners.tolist(), strict=True)):
            photo = self.photos[label]
            i = int(top * (photo.shape[1] - self.size + 1))
            j = int(left * (photo.shape[2] - self.size + 1))
            x[k] = photo[:, i : i + self.size, j : j + self.size]
        x[flips] = x[flips].flip(-1)
        return _normalise(x), y


@dataclass(frozen=True)
class Table:
    """A fixed table of images, visited in a new random order every epoch.

    Arguments:
        x: float32 [N, C, H, W], normalised.
        y: int64 [N].
    """

    x: Tensor
    y: Tensor

    @property
    def length(self) -> int:
        """Samples in one epoch."""
        return len(self.y)

    def batches(
        self, batch_size: int, generator: torch.Generator, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`length // batch_size` full batches of a random permutation, without the first `start`; the incomplete rest
        is left out.
        """
        order = torch.randperm(self.length, generator=generator)
        for k in range(start, self.length // batch_size):
            chosen = order[k * batch_size : (k + 1) * batch_size]
            yield self.x[chosen], self.y[chosen]


@dataclass(frozen=True)
class Images:
    """A data set: where training batches come from, and a fixed test set that never overlaps with them.

    Arguments:
        name, classes: names for people.
        shape: (channels, height, width) of one image.
        train: a :class:`Crops`, a :class:`Table` or another source.
        test: (x, y), float32 [M, *shape] and int64 [M], or what gives them in batches.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Source
    test: tuple[Tensor, Tensor] | Held

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images, in order; the last batch may be smaller."""
        if not isinstance(self.test, tuple):
            return self.test.in_order(batch_size)
        x, y = self.test
        return zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)


@dataclass
class Loader:
    """Batches of `data.train`, the same ones for the same `seed` and epoch on every machine.

    Each iteration is one epoch; `epoch` counts them and may be set to continue a run. Batches come from a
    private torch.Generator: the random state of the program is neither used nor changed.

    Arguments:
        data: what to draw from.
        batch_size: samples in every batch.
        seed: any integer of at most 64 bits.
        steps: batches in one iteration; default one epoch. More than an epoch runs into the next.
        epoch: the epoch that comes next.
        start: batches of it that are left out, by a job that goes on in the middle of it.

    Errors:
        AdcertError: a batch size or number of steps below 1, or a batch larger than the data set.

    Example:
        >>> images = Images("two", ("a", "b"), (1, 1, 1), Table(torch.zeros(4, 1, 1, 1), torch.arange(4) % 2),
        ...                 (torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64)))
        >>> [tuple(y.shape) for _, y in Loader(images, batch_size=2)]
        [(2,), (2,)]
    """

    data: Images
    batch_size: int = 128
    seed: int = 0
    steps: int | None = None
    epoch: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.steps is not None and self.steps < 1):
            raise AdcertError(
                f"batch size and steps must be at least 1, got {self.batch_size} and {self.steps}"
            )
        if self.batch_size > self.data.train.length:
            raise AdcertError(
                f"batch size {self.batch_size} is larger than the {self.data.train.length} training samples "
                f"of {self.data.name!r}; choose a smaller one"
            )

    def __len__(self) -> int:
        return self.steps if self.steps is not None else self.data.train.length // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = len(self)
        while left:
            generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
            start, self.start = self.start, 0
            self.epoch += 1
            for batch in self.data.train.batches(self.batch_size, generator, start):
                yield batch
                left -= 1
                if not left:
                    return


def parse(name: str) -> tuple[str, str]:
    """(data set, directory) of `NAME` or `NAME:DIRECTORY`; the embedded ones have no directory.

    Errors:
        AdcertError: unknown name, a directory that is missing or has no use.

    Example:
        >>> parse("cifar10:/data/cifar"), parse("digits")
        (('cifar10', '/data/cifar'), ('digits', ''))
    """
    kind, colon, path = name.partition(":")
    if kind not in (*DATA, *FILES):
        raise AdcertError(f"unknown data {kind!r}; known: {', '.join((*DATA, *FILES))}")
    if kind in DATA and colon:
        raise AdcertError(f"{kind} comes with adcert's extra `train`, it has no directory: write {kind}")
    if not path and (colon or kind == "imagefolder"):
        raise AdcertError(f"where are the files? Write {kind}:DIRECTORY")
    return kind, path


def usual_size(name: str) -> int:
    """Pixels a side that a data set's images have if nobody says otherwise.

    Example:
        >>> usual_size("imagefolder:pictures"), usual_size("photos")
        (224, 32)
    """
    kind, _ = parse(name)
    if kind in DATA:
        return CROP
    from .hub import KINDS

    return KINDS[kind].size


def load(name: str, size: int | None = None, workers: int = 0) -> Images:
    """A data set with square images of `size` pixels; `workers` processes decode those that are decoded on the way.

    `photos`: values / 255, then (value - mean) / deviation per channel. Training crops lie in the left three
    quarters of each photograph, test crops (at most 48 cells of a fixed grid) in the right quarter.
    `digits`: 8x8, enlarged bilinearly to any other size; every fifth image is a test image.

    `cifar10`: padded by 4 pixels, cropped and flipped at random. `mnist`: as it is. Both enlarged bilinearly to any
    size but theirs. `imagenet`, `imagefolder:DIRECTORY`: random boxes resized to `size` (224) and flipped; for the
    test the middle of each image. All with the usual means and deviations, from Hugging Face's hub or from
    `NAME:DIRECTORY`, whose files are as on the hub (parquet) or a folder of images per class, in folders `train` and
    `test` or `validation`; without the latter every fifth image is a test image.

    Errors:
        AdcertError: unknown name, a size that does not fit, files that are not as they should be, or the extra
            `train` or `datasets` is not installed.
    """
    kind, path = parse(name)
    size = usual_size(name) if size is None else size
    if size < 1:
        raise AdcertError(f"images need at least one pixel a side, got size={size}")
    if kind in FILES:
        from . import hub

        return hub.load(kind, path, size, workers)
    return _photos(size) if kind == "photos" else _digits(size)


def _photos(size: int) -> Images:
    left, right = [], []
    for label, package, file in PHOTOS:
        photo = _read(package, file)
        cut = photo.shape[2] * 3 // 4
        if size > min(photo.shape[1], photo.shape[2] - cut):
            raise AdcertError(f"crops of {size} pixels do not fit the test region of photograph {label!r}")
        left.append(photo[:, :, :cut].contiguous())
        right.append(photo[:, :, cut:].contiguous())
    test = [photo.unfold(1, size, size).unfold(2, size, size) for photo in right]  # [3, R, S, size, size]
    tiles = [_spread(t.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size), TEST_TILES) for t in test]
    labels = torch.cat([torch.full((len(t),), k, dtype=torch.int64) for k, t in enumerate(tiles)])
    return Images(
        "photos",
        tuple(label for label, _, _ in PHOTOS),
        (3, size, size),
        Crops(tuple(left), size, PHOTO_EPOCH),
        (_normalise(torch.cat(tiles)), labels),
    )


def _spread(tiles: Tensor, limit: int) -> Tensor:
    """At most `limit` of the tiles, evenly spaced, so that large photographs do not dominate the accuracy."""
    count = min(limit, len(tiles))
    return tiles[torch.arange(count) * len(tiles) // count]


def _digits(size: int) -> Images:
    try:
        bunch = import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise AdcertError(_missing("scikit-learn")) from error
    x = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / np.float32(16)).unsqueeze(1)
    if size != x.shape[-1]:
        x = functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    x = (x - DIGIT_MEAN) / DIGIT_STD
    y = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    held = torch.arange(len(y)) % 5 == 4
    return Images(
        "digits",
        tuple(str(digit) for digit in range(10)),
        (1, size, size),
        Table(x[~held], y[~held]),
        (x[held], y[held]),
    )


def _read(package: str, file: str) -> Tensor:
    """One bundled photograph as uint8 [3, H, W]; a grey one is repeated in all three channels."""
    distribution = "scikit-learn" if package.startswith("sklearn") else "scikit-image"
    try:
        from PIL import Image

        path = files(package).joinpath(file)
    except ImportError as error:
        raise AdcertError(_missing(distribution)) from error
    if not path.is_file():
        raise AdcertError(
            f"the installed {distribution} does not ship {file}; install the versions of requirements/"
        )
    with path.open("rb") as stream, Image.open(stream) as image:
        pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _missing(distribution: str) -> str:
    return (
        f"the embedded data needs {distribution}, which is not installed; in a checkout of adcert run: "
        'pip install --no-build-isolation -e ".[train]"'
    )


def _normalise(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to float32, with the means and deviations of photographs."""
    return normalise(pixels, PHOTO_MEAN, PHOTO_STD)


def mix(seed: int, number: int) -> int:
    """One 63-bit generator seed for (seed, number), unrelated for neighbouring pairs."""
    state = np.random.SeedSequence([seed % 2**64, number]).generate_state(1, np.uint64)
    return int(state[0]) >> 1
