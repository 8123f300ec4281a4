"""The examples, as a user starts them, on a few small images."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Eight training images and two test images."""
    from image_files import noise, use_cache, write

    use_cache(tmp_path / "cache", monkeypatch)
    for split, count in (("train", 8), ("test", 2)):
        images = [noise(32, 32) for _ in range(count)]
        write(tmp_path / "cifar" / f"{split}.parquet", "img", images, [k % 2 for k in range(count)], ["cat", "dog"])
    return f"cifar10:{tmp_path / 'cifar'}"


def test_cifar10_resnet18(
    cifar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    options = ("--data", cifar, "--epochs", "2", "--batch-size", "4", "--log", str(log))
    run("cifar10_resnet18.py", *options, monkeypatch=monkeypatch)
    assert "4 of 4 steps certified" in capsys.readouterr().out
    assert [json.loads(line).get("verdict") for line in log.read_text().splitlines()] == ["certified"] * 4 + [None]


def test_adcert_adds_few_lines() -> None:
    """Without the marked lines nothing of adcert's is left but the network and the data."""
    lines = (EXAMPLES / "cifar10_resnet18.py").read_text().splitlines()
    marked = [line for line in lines if "# +" in line]
    assert 0 < len(marked) <= 20
    rest = "\n".join(line for line in lines[5:] if line not in marked)
    assert "monitor" not in rest.lower()
    assert rest.count("adcert") == 1  # where the network and the data come from


def test_imagenet_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes begin it; started again, with one, it goes on after step 2."""
    from image_files import noise, use_cache

    for name in ("cat", "dog"):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for k in range(5):
            noise(40, 30).save(folder / f"{k}.jpg")
    options = ["--data", f"imagefolder:{tmp_path / 'images'}", "--model", "vgg11", "--size", "32", "--every", "2"]
    options += ["--batch-size", "4", "--workers", "0", "--checkpoint", str(tmp_path / "run.pt")]
    options += ["--log-file", str(tmp_path / "log"), "--steps"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(EXAMPLES / "imagenet_ddp.py"), *options, "2"],
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 steps, 1 looked at" in done.stdout
    use_cache(tmp_path / "cache", monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    run("imagenet_ddp.py", *options, "4", monkeypatch=monkeypatch)
    assert "4 steps, 2 looked at" in capsys.readouterr().out
    numbers = [json.loads(line).get("step") for line in (tmp_path / "log").read_text().splitlines()]
    assert len(numbers) == 3 and [(number - 1) // 2 for number in numbers[:2]] == [0, 1]
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 4


def test_lightning_cnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning.pytorch", reason="the example is for Lightning")
    options = ("--data", "digits", "--epochs", "1", "--batch-size", "400", "--folder", str(tmp_path))
    run("lightning_cnn.py", *options, monkeypatch=monkeypatch)
    assert "steps=3, sampled=3" in capsys.readouterr().out
    assert len((tmp_path / "lightning.jsonl").read_text().splitlines()) == 4
