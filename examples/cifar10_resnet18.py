"""ResNet18 on CIFAR-10, every step certified: the lines marked with # + are all that adcert adds to a plain script.

    python examples/cifar10_resnet18.py [--data cifar10:DIRECTORY] [--epochs 20]
"""

import argparse

import torch
from torch import nn

import adcert  # +
from adcert import data, models  # any network and any loader do

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="cifar10", help="cifar10 from the hub, or cifar10:DIRECTORY")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--log", default="cifar10.jsonl", help="one line a step")  # +
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
images = data.load(arguments.data)
loader = data.Loader(images, arguments.batch_size)
model = models.build("resnet18", len(images.classes)).to(device)
model = adcert.convert(model)  # + same parameters, same results
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(loader))

with adcert.Monitor(model, log=arguments.log) as monitor:  # +
    for epoch in range(arguments.epochs):
        model.train()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            with monitor.step():  # +
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
            optimizer.step()
            schedule.step()

        model.eval()
        with torch.no_grad():
            right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in images.test_batches(256))
            total = sum(len(y) for _, y in images.test_batches(256))
        report = monitor.report()  # +
        print(f"epoch {epoch + 1}: test accuracy {right / total:.3f}")
        print(f"  {report.certified} of {report.steps} steps certified, {report.ties:,} ties")  # +
for reason, steps in report.reasons.items():  # +
    print(f"{steps} steps: {reason}")  # +
