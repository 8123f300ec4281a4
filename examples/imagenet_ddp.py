"""ResNet50 on ImageNet over several processes, one step of each 20 certified, checkpoints to go on from after a kill.

    torchrun --nproc-per-node 8 examples/imagenet_ddp.py --data imagefolder:/data/imagenet --checkpoint run.pt

Each process trains on its part of every batch. The first one writes the log and the checkpoint; started again with the
same command, the job goes on from there.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adcert
from adcert import data, models


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="imagenet", help="imagenet[:DIRECTORY] or imagefolder:DIRECTORY")
    parser.add_argument("--model", default="resnet50", choices=models.MODELS)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--steps", type=int, default=450_000)
    parser.add_argument("--every", type=int, default=20, help="certify one step of so many")
    parser.add_argument("--workers", type=int, default=4, help="that decode images, a process")
    parser.add_argument("--checkpoint", type=Path, default=Path("imagenet.pt"))
    parser.add_argument("--checkpoint-every", type=int, default=1000)
    parser.add_argument("--log-file", default="imagenet.jsonl", help="torchrun wants --log for itself")
    return parser.parse_args()


def main() -> None:
    options = parse()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    images = data.load(options.data, options.size, options.workers)
    loader = data.Loader(images, options.batch_size, steps=options.steps)
    network = adcert.convert(models.build(options.model, len(images.classes), size=options.size).to(device))
    model = DistributedDataParallel(network, [device] if on_gpu else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    monitor = adcert.Monitor(model, every=options.every, log=options.log_file if rank == 0 else None)

    done = 0
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, map_location=device, weights_only=True)
        done = saved["step"]
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        monitor.load_state_dict(saved["monitor"])
    per_epoch = images.train.length // options.batch_size
    loader.steps, loader.epoch, loader.start = options.steps - done, done // per_epoch, done % per_epoch

    with monitor:
        for step, (x, y) in enumerate(loader if done < options.steps else (), done + 1):
            x, y = (part.tensor_split(ranks)[rank].to(device) for part in (x, y))
            optimizer.zero_grad()
            with monitor.step():
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            if step % options.checkpoint_every == 0 or step == options.steps:
                saved = {
                    "step": step,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "monitor": monitor.state_dict(),
                }
                if rank == 0:
                    new = options.checkpoint.with_suffix(".new")
                    torch.save(saved, new)
                    new.replace(options.checkpoint)
    report = monitor.report()
    if rank == 0:
        print(f"{report.steps} steps, {report.sampled} looked at: {report.certified} certified")
        print(f"estimates for all steps: {report.estimates}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
