"""CIFAR-10, MNIST, ImageNet and folders of images, through Hugging Face ``datasets``: local files or its hub.

Small images are held in memory as bytes; photographs are decoded when they are needed. What is drawn depends on the
seed alone: neither on the number of worker processes nor on the random state of the program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from .augment import crop_and_flip, middle_crop, normalise, random_crop
from .data import PHOTO_MEAN, PHOTO_STD, Images, mix
from .errors import AdcertError

IMAGE_COLUMNS: Final = ("image", "img")
LABEL_COLUMNS: Final = ("label", "labels")
HELD_SPLITS: Final = ("validation", "test")
HELD: Final = 5  # without such a split each fifth image is a test image
_BLOCK: Final = 1000  # images decoded at once


@dataclass(frozen=True)
class Kind:
    """What is known about a data set: its name on the hub, pixels a side (``fixed``: of each image as it is stored),
    channels with their means and deviations, and the augmentation of small images.
    """

    hub: str
    size: int
    fixed: bool
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    padding: int = 0
    flip: bool = False

    @property
    def mode(self) -> str:
        """PIL's name for these channels."""
        return "L" if len(self.mean) == 1 else "RGB"


KINDS: Final = MappingProxyType(
    {
        "cifar10": Kind(
            "uoft-cs/cifar10", 32, True, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), padding=4, flip=True
        ),
        "mnist": Kind("ylecun/mnist", 28, True, (0.1307,), (0.3081,)),
        "imagenet": Kind("ILSVRC/imagenet-1k", 224, False, PHOTO_MEAN, PHOTO_STD),
        "imagefolder": Kind("", 224, False, PHOTO_MEAN, PHOTO_STD),
    }
)


@dataclass(frozen=True, eq=False)
class Pixels:
    """Small images in memory.

    Arguments:
        kind: how they are augmented and normalised.
        x: uint8 [N, C, H, W].
        y: int64 [N].
        size: pixels a side that come out; the images are enlarged bilinearly if it is not theirs.
    """

    kind: Kind
    x: Tensor
    y: Tensor
    size: int

    @property
    def length(self) -> int:
        """Samples in one epoch."""
        return len(self.y)

    def batches(
        self, batch_size: int, generator: torch.Generator, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches of a random permutation, augmented, without the first `start`."""
        order = torch.randperm(self.length, generator=generator)
        seed = _seed(generator)
        for k in range(start, self.length // batch_size):
            chosen = order[k * batch_size : (k + 1) * batch_size]
            x = self.x[chosen]
            if self.kind.flip:
                x = crop_and_flip(x, self.kind.padding, torch.Generator().manual_seed(mix(seed, k)))
            yield self._finished(x), self.y[chosen]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images as they are; the last batch may be smaller."""
        for x, y in zip(torch.split(self.x, batch_size), torch.split(self.y, batch_size), strict=True):
            yield self._finished(x), y

    def _finished(self, x: Tensor) -> Tensor:
        x = normalise(x, self.kind.mean, self.kind.deviation)
        if self.size == self.kind.size:
            return x
        return functional.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)


@dataclass(frozen=True, eq=False)
class Photos:
    """Photographs that are decoded when they are needed, by ``workers`` processes, or here if there are none.

    ``rows``: a table of ``datasets``; ``image``: the column of the pictures; ``y``: int64 [N]. Each worker holds two
    batches ready.
    """

    kind: Kind
    rows: Any
    image: str
    y: Tensor
    size: int
    workers: int

    @property
    def length(self) -> int:
        """Samples in one epoch."""
        return len(self.y)

    def batches(
        self, batch_size: int, generator: torch.Generator, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches of a random permutation, cropped and flipped, without the first `start`."""
        order = torch.randperm(self.length, generator=generator).tolist()
        places = [order[k * batch_size : (k + 1) * batch_size] for k in range(start, self.length // batch_size)]
        return self._load(places, _seed(generator))

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The middle of each image; the last batch may be smaller."""
        stop = self.length
        return self._load([list(range(k, min(k + batch_size, stop))) for k in range(0, stop, batch_size)], None)

    def _load(self, places: list[list[int]], seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self, seed),  # type: ignore[arg-type]  # anything with a length and items is a data set
            batch_sampler=places,
            num_workers=self.workers,
            collate_fn=_batch,
            generator=torch.Generator().manual_seed(0),  # without one the loader draws from the program's
        )
        for batch in loader:
            if isinstance(batch, str):
                raise AdcertError(batch)
            yield batch


@dataclass(frozen=True, eq=False)
class _Decoder:
    """(float32 [C, size, size], label) by number; with a seed augmented, each number by draws of its own.

    What is wrong with an image comes as a text, which leaves a worker process as it is.
    """

    photos: Photos
    seed: int | None

    def __len__(self) -> int:
        return self.photos.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | str:
        photos = self.photos
        try:
            image = photos.rows[index][photos.image].convert(photos.kind.mode)
        except (OSError, ValueError, SyntaxError, AttributeError) as error:
            return f"image {index} cannot be decoded: {error}"
        if self.seed is None:
            image = middle_crop(image, photos.size)
        else:
            image = random_crop(image, photos.size, torch.Generator().manual_seed(mix(self.seed, index)))
        return normalise(_bytes(image), photos.kind.mean, photos.kind.deviation), photos.y[index]


def _batch(samples: list[tuple[Tensor, Tensor] | str]) -> tuple[Tensor, Tensor] | str:
    """x [B, C, H, W] and y [B], or the first thing that is wrong."""
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return torch.stack(images), torch.stack(labels)


def load(name: str, path: str, size: int, workers: int) -> Images:
    """The data set ``name``, of the directory ``path`` or, if that is empty, of the hub.

    Errors:
        AdcertError: the extra `datasets` is not installed; files, columns or labels that are missing or not as they
            should be; no network.
    """
    kind = KINDS[name]
    train, held = _splits(_open(name, kind, path))
    image = _column(train, IMAGE_COLUMNS, "images")
    label = _column(train, LABEL_COLUMNS, "labels")
    classes = _classes(train, held, label)
    parts: list[Pixels | Photos] = []
    for rows in (train, held):
        y = torch.from_numpy(_labels(rows, label, len(classes)))
        photos = Photos(kind, _pictures(rows, image), image, y, size, workers)
        parts.append(_in_memory(photos) if kind.fixed else photos)
    return Images(name, classes, (len(kind.mean), size, size), parts[0], parts[1])


def _open(name: str, kind: Kind, path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise AdcertError(
            f"--data {name} needs Hugging Face datasets, which is not installed; in a checkout of adcert run: "
            'pip install --no-build-isolation -e ".[datasets]"'
        ) from error
    if path and not Path(path).is_dir():
        raise AdcertError(f"there is no directory {path} with files of {name}")
    try:
        return datasets.load_dataset(str(Path(path).absolute()) if path else kind.hub)
    except Exception as error:  # of whatever the library met: files, formats, the network, permissions
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if path:
            raise AdcertError(f"{path} holds no data set that Hugging Face datasets can read: {first}") from error
        raise AdcertError(
            f"{name} cannot be had from the hub ({kind.hub}): {first}. Without a network, or a permission it asks for, "
            f"give a directory with its files, parquet as on the hub or a folder of images per class: {name}:DIRECTORY"
        ) from error


def _splits(found: Any) -> tuple[Any, Any]:
    """Training and test rows."""
    names = list(found)
    if "train" not in names:
        raise AdcertError(f"the data have no split train, only {', '.join(map(str, names))}: name a file or folder so")
    train = found["train"]
    held = next((found[name] for name in HELD_SPLITS if name in names), None)
    if held is None:
        numbers = np.arange(len(train))
        train, held = (train.select(numbers[(numbers % HELD == HELD - 1) == tested]) for tested in (False, True))
    return train, held


def _column(rows: Any, names: Sequence[str], what: str) -> str:
    found = next((name for name in names if name in rows.column_names), None)
    if found is None:
        raise AdcertError(f"no column {' or '.join(names)} with the {what}, only {', '.join(rows.column_names)}")
    return found


def _classes(train: Any, held: Any, label: str) -> tuple[str, ...]:
    """Their names, or numbers if the files do not name them."""
    names = [getattr(rows.features.get(label), "names", None) for rows in (train, held)]
    if names[0] != names[1]:
        raise AdcertError("the classes of the training images are not those of the test images")
    if names[0]:
        return tuple(map(str, names[0]))
    return tuple(str(k) for k in range(1 + max(_raw_labels(rows, label).max(initial=0) for rows in (train, held))))


def _raw_labels(rows: Any, label: str) -> np.ndarray[Any, Any]:
    found = np.asarray(rows.select_columns([label]).with_format("numpy")[:][label])
    if len(found) and (found.dtype.kind not in "iu" or found.ndim != 1):
        raise AdcertError(f"the labels in column {label} should be integers, they are {found.dtype}")
    return found.astype(np.int64)


def _labels(rows: Any, label: str, classes: int) -> np.ndarray[Any, Any]:
    found = _raw_labels(rows, label)
    wrong = np.flatnonzero((found < 0) | (found >= classes))
    if len(wrong):
        raise AdcertError(f"image {wrong[0]} has label {found[wrong[0]]}, which is none of the {classes} classes")
    return found


def _pictures(rows: Any, image: str) -> Any:
    """The rows with a column of decoded images, also where the files do not say that it holds some."""
    import datasets

    if not isinstance(rows.features[image], datasets.Image):
        try:
            rows = rows.cast_column(image, datasets.Image())
        except Exception as error:  # of pyarrow's many
            raise AdcertError(f"column {image} holds no images: {error}") from error
    return rows.with_format(None)


def _in_memory(photos: Photos) -> Pixels:
    kind = photos.kind
    x = torch.empty(photos.length, len(kind.mean), kind.size, kind.size, dtype=torch.uint8)
    for first in range(0, photos.length, _BLOCK):
        try:
            images = [image.convert(kind.mode) for image in photos.rows[first : first + _BLOCK][photos.image]]
        except (OSError, ValueError, SyntaxError, AttributeError) as error:
            raise AdcertError(f"one of the {_BLOCK} images from {first} on cannot be decoded: {error}") from error
        for k, image in enumerate(images, first):
            if image.size != (kind.size, kind.size):
                raise AdcertError(
                    f"image {k} has {image.size[0]} x {image.size[1]} pixels, expected were {kind.size} x {kind.size}"
                )
            x[k] = _bytes(image)
    return Pixels(kind, x, photos.y, photos.size)


def _bytes(image: Any) -> Tensor:
    """uint8 [C, H, W]."""
    pixels = np.array(image, dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))
