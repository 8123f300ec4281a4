"""A small convolutional network in Lightning, every step certified: the callback is all that adcert needs.

    python examples/lightning_cnn.py [--data mnist:DIRECTORY] [--epochs 3]
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import adcert
from adcert import data
from adcert.integrations.lightning import Certify


class Classifier(pl.LightningModule):
    """Convolution, ReLU, pooling, twice; then a linear layer. For images of 28 pixels a side, or so."""

    def __init__(self, channels: int, pixels: int, classes: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (pixels // 4) ** 2, classes),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="mnist", help="mnist from the hub, or mnist:DIRECTORY; digits needs neither")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--folder", default=".", help="for logs and checkpoints")
arguments = parser.parse_args()

pl.seed_everything(0)
images = data.load(arguments.data)
channels, pixels, _ = images.shape
module = adcert.convert(Classifier(channels, pixels, len(images.classes)))
certify = Certify(log=f"{arguments.folder}/lightning.jsonl")
trainer = pl.Trainer(max_epochs=arguments.epochs, callbacks=[certify], default_root_dir=arguments.folder)
trainer.fit(module, data.Loader(images, arguments.batch_size))
print(certify.monitor.report())
