"""Small images in the files that data sets come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets", reason="it reads and writes the files")
image = pytest.importorskip("PIL.Image", reason="it decodes the images")

RNG = np.random.default_rng(0)


def noise(width: int, height: int, mode: str = "RGB") -> Any:
    return image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def write(path: Path, column: str, images: list[Any], labels: list[int], names: list[str] | None) -> None:
    """A parquet file as the hub has it."""
    features = datasets.Features(
        {column: datasets.Image(), "label": datasets.ClassLabel(names=names) if names else datasets.Value("int64")}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({column: images, "label": labels}, features=features).to_parquet(path)


def raw(images: list[Any]) -> torch.Tensor:
    """uint8 [N, C, H, W]."""
    arrays = [np.array(one).reshape(one.height, one.width, -1) for one in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's copies go there, and it shows no progress."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    datasets.disable_progress_bars()
