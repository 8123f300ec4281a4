"""Data sets in the formats of Hugging Face's hub, small: what comes out, that the seed alone decides, and refusals."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adcert import data
from adcert.augment import middle_crop, normalise
from adcert.data import Images, Loader
from adcert.errors import AdcertError

pytest.importorskip("datasets", reason="it reads the files")
from image_files import datasets, image, noise, raw, use_cache, write

from adcert import hub


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(tmp_path_factory.getbasetemp() / "cache", monkeypatch)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Twelve training and three test images."""
    folder = tmp_path_factory.mktemp("cifar") / "plain_text"
    images = [noise(32, 32) for _ in range(15)]
    names = ["airplane", "automobile", "bird"]
    write(folder / "train-00000-of-00001.parquet", "img", images[:12], [k % 3 for k in range(12)], names)
    write(folder / "test-00000-of-00001.parquet", "img", images[12:], [2, 1, 0], names)
    return folder.parent, images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """As ImageNet: JPEGs of any size, grey ones and one in CMYK among them; the test split has no labels."""
    folder = tmp_path_factory.mktemp("imagenet") / "data"
    modes = ["RGB", "L", "CMYK", "RGB"]
    images = [noise(40 + 9 * k, 60 - 5 * k, modes[k % 4]) for k in range(9)]
    files = [io.BytesIO() for _ in images]
    for one, file in zip(images, files, strict=True):
        one.save(file, "JPEG")
    stored = [{"bytes": file.getvalue(), "path": None} for file in files]
    names = ["tench", "goldfish"]
    write(folder / "train-00000-of-00002.parquet", "image", stored[:3], [0, 1, 0], names)
    write(folder / "train-00001-of-00002.parquet", "image", stored[3:6], [1, 1, 0], names)
    write(folder / "validation-00000-of-00001.parquet", "image", stored[6:], [0, 1, 1], names)
    write(folder / "test-00000-of-00001.parquet", "image", stored[:1], [-1], names)
    return folder.parent, [image.open(file) for file in files]


def collect(images: Images, batch: int = 2, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(Loader(images, batch, **options))


def test_the_names_are_known() -> None:
    assert set(hub.KINDS) == set(data.FILES)


def test_cifar10(cifar: tuple[Path, list[Any]]) -> None:
    """Each training image is its original, moved by at most four pixels in black, perhaps mirrored; each comes once."""
    path, images = cifar
    found = data.load(f"cifar10:{path}")
    assert (found.classes, found.shape) == (("airplane", "automobile", "bird"), (3, 32, 32))
    mean, deviation = hub.KINDS["cifar10"].mean, hub.KINDS["cifar10"].deviation
    padded = torch.nn.functional.pad(raw(images[:12]), (4, 4, 4, 4))
    padded = torch.cat([padded, padded.flip(-1)])
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5)  # [24, 9, 9, 3, 32, 32]
    windows = normalise(windows, mean, deviation)
    seen = []
    for x, y in collect(found):
        assert (x.dtype, y.dtype, x.shape) == (torch.float32, torch.int64, (2, 3, 32, 32))
        for crop, label in zip(x, y, strict=True):
            (place,) = (windows == crop).flatten(3).all(3).nonzero().tolist()
            assert place[0] % 12 % 3 == label
            seen.append(place)
    assert sorted(place[0] % 12 for place in seen) == list(range(12))
    assert len({tuple(place[1:]) for place in seen}) > 3 and {place[0] // 12 for place in seen} == {0, 1}
    ((x, y),) = found.test_batches(100)
    assert torch.equal(x, normalise(raw(images[12:]), mean, deviation)) and y.tolist() == [2, 1, 0]


def test_mnist(tmp_path: Path) -> None:
    images = [noise(28, 28, "L") for _ in range(10)]
    write(tmp_path / "mnist" / "train-00000-of-00001.parquet", "image", images[:8], list(range(8)), None)
    write(tmp_path / "mnist" / "test-00000-of-00001.parquet", "image", images[8:], [8, 9], None)
    found = data.load(f"mnist:{tmp_path}")
    assert (found.classes, found.shape) == (tuple("0123456789"), (1, 28, 28))
    batches = collect(found)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert sorted(y.tolist()) == list(range(8)) != y.tolist()
    assert torch.equal(x, normalise(raw(images), (0.1307,), (0.3081,))[y])
    large = data.load(f"mnist:{tmp_path}", 32)
    assert large.shape == (1, 32, 32) and collect(large)[0][0].shape == (2, 1, 32, 32)


def test_parquet_that_does_not_say_what_it_holds(tmp_path: Path) -> None:
    """Columns of bytes and numbers, without the metadata that Hugging Face adds."""
    import pyarrow.parquet

    buffers = [io.BytesIO() for _ in range(4)]
    images = [noise(32, 32) for _ in buffers]
    for one, buffer in zip(images, buffers, strict=True):
        one.save(buffer, "PNG")
    table = pyarrow.table({"img": [{"bytes": b.getvalue(), "path": None} for b in buffers], "labels": [0, 1, 1, 3]})
    for split in ("train", "test"):
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    found = data.load(f"cifar10:{tmp_path}")
    assert found.classes == ("0", "1", "2", "3")
    x, y = next(found.test_batches(4))
    kind = hub.KINDS["cifar10"]
    assert torch.equal(x, normalise(raw(images), kind.mean, kind.deviation)) and y.tolist() == [0, 1, 1, 3]


def test_imagenet(photos: tuple[Path, list[Any]]) -> None:
    path, stored = photos
    found = data.load(f"imagenet:{path}", 24)
    assert (found.classes, found.shape, found.train.length) == (("tench", "goldfish"), (3, 24, 24), 6)
    batches = collect(found)
    assert [x.shape for x, _ in batches] == [(2, 3, 24, 24)] * 3
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == [0, 0, 0, 1, 1, 1]
    tested = list(found.test_batches(2))
    assert [y.tolist() for _, y in tested] == [[0, 1], [1]]
    expected = raw([middle_crop(one.convert("RGB"), 24) for one in stored[6:]])
    assert torch.equal(torch.cat([x for x, _ in tested]), normalise(expected, data.PHOTO_MEAN, data.PHOTO_STD))
    assert data.usual_size("imagenet") == 224


@pytest.fixture(params=["cifar10", "imagenet"])
def loaded(request: pytest.FixtureRequest, cifar: tuple[Path, list[Any]], photos: tuple[Path, list[Any]]) -> Images:
    where = {"cifar10": cifar, "imagenet": photos}[request.param][0]
    return data.load(f"{request.param}:{where}", 32)


def equal(one: list[tuple[torch.Tensor, torch.Tensor]], two: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for p, q in zip(one, two, strict=True) for a, b in zip(p, q, strict=True))


def test_the_seed_decides_and_nothing_else_is_drawn(loaded: Images) -> None:
    state = torch.get_rng_state()
    whole = collect(loaded, seed=5, steps=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(whole, collect(loaded, seed=5, steps=7))
    assert not torch.equal(whole[0][0], collect(loaded, seed=6, steps=1)[0][0])
    per_epoch = loaded.train.length // 2
    assert not torch.equal(whole[0][0], whole[per_epoch][0] if per_epoch < 7 else whole[1][0])
    for done in range(1, 7):  # a job that goes on after so many batches
        rest = collect(loaded, seed=5, steps=7 - done, epoch=done // per_epoch, start=done % per_epoch)
        assert equal(whole[done:], rest)


def test_workers_change_nothing(photos: tuple[Path, list[Any]]) -> None:
    found, helped = (data.load(f"imagenet:{photos[0]}", 24, workers=count) for count in (0, 2))
    assert equal(collect(found, steps=4), collect(helped, steps=4))
    assert equal(list(found.test_batches(2)), list(helped.test_batches(2)))


@pytest.mark.parametrize("split", [True, False])
def test_a_folder_of_images(tmp_path: Path, split: bool) -> None:
    """A folder per class, PNG and JPEG; without a split every fifth image is a test image."""
    for part, count in (("train", 10), ("val", 5)) if split else (("", 10),):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                noise(30, 40).save(folder / f"{k:02}.{('png', 'jpg')[k % 2]}")
    found = data.load(f"imagefolder:{tmp_path}", 16)
    assert (found.classes, found.shape) == (("cat", "dog"), (3, 16, 16))
    labels = next(found.test_batches(100))[1].tolist()
    assert (found.train.length, sorted(labels)) == ((20, [0] * 5 + [1] * 5) if split else (16, [0, 0, 1, 1]))


def test_adcert_train(photos: tuple[Path, list[Any]], tmp_path: Path) -> None:
    from adcert.cli import app

    def trained(*options: str) -> dict[str, Any]:
        found = CliRunner().invoke(app, [*command, *options])
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)

    command = ["train", "--model", "fnn-relu", "--data", f"imagenet:{photos[0]}", "--size", "16", "--batch-size", "2"]
    command += ["--steps", "4", "--json", "--threads", "1"]
    certified = trained("--checkpoint", str(tmp_path / "checkpoint"))
    assert certified["report"]["steps"] == 4 and certified["report"]["undecided"] == 0
    assert certified["weights_sha256"] == trained("--plain", "--workers", "2")["weights_sha256"]
    assert certified["test_accuracy"] in (0, 1 / 3, 2 / 3, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10:/no/such/place", "no directory /no/such/place with files of cifar10"),
        ("cifar10:", "Write cifar10:DIRECTORY"),
        ("imagefolder", "Write imagefolder:DIRECTORY"),
        ("photos:/tmp", "has no directory"),
        ("cifar100", "unknown data 'cifar100'; known: photos, digits, cifar10"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(AdcertError, match=message):
        data.load(name)


def test_files_that_are_refused(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(AdcertError, match=message):
            data.load(f"{name}:{tmp_path / message.split()[0]}")

    def put(message: str, column: str, images: list[Any], labels: list[Any], split: str = "train") -> None:
        write(tmp_path / message.split()[0] / f"{split}.parquet", column, images, labels, None)

    (tmp_path / "holds").mkdir()
    refused("mnist", "holds no data set that Hugging Face datasets can read")
    put("have no split train, only test", "image", [noise(28, 28)] * 2, [0, 1], "test")
    refused("mnist", "have no split train, only test")
    put("no column image or img", "picture", [noise(28, 28)] * 5, [0] * 5)
    refused("mnist", "no column image or img with the images, only picture, label")
    put("has label -1", "image", [noise(28, 28)] * 5, [0, 1, -1, 0, 0])
    refused("mnist", "has label -1, which is none of the 2 classes")
    put("29 x 28 pixels", "image", [noise(28, 28)] * 4 + [noise(29, 28)], [0] * 5)
    refused("mnist", "29 x 28 pixels, expected were 28 x 28")


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(2):
            noise(20, 20).save(tmp_path / name / f"{k}.png")
    broken = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "0.png").write_bytes(broken[: len(broken) // 2])
    for workers in (0, 1):
        found = data.load(f"imagefolder:{tmp_path}", 16, workers)
        with pytest.raises(AdcertError, match=r"^image 0 cannot be decoded"):
            collect(found, 3)
    with pytest.raises(AdcertError, match="images from 0 on cannot be decoded"):
        data.load(f"cifar10:{tmp_path}")


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(AdcertError, match=r"Couldn't reach 'uoft-cs/cifar10'.*parquet as on the hub.*cifar10:DIR"):
        data.load("cifar10")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AdcertError, match=r'pip install --no-build-isolation -e "\.\[datasets\]"'):
        data.load("mnist")
