"""`adcert train`: train a network on the embedded data and certify every step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from ._console import console, error_console, print_json
from ._loop import Job, Outcome, Precision, StepResult, run
from ._ranks import launched
from ._show import Display, show_outcome

ModelName = Literal[
    "resnet18",
    "resnet18-nobias",
    "resnet50",
    "vgg11",
    "vgg11-bn",
    "fnn-relu",
    "fnn-relu6",
    "fnn-hardtanh",
    "fnn-hardsigmoid",
]
DeviceName = Literal["cpu", "cuda"]
INTERRUPTED = 130


def train(
    model: Annotated[
        ModelName, typer.Option(help="Network; the VGGs have half the usual channels.")
    ] = "resnet18",
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="photos: 32x32 crops of ten photographs, one class each. digits: 8x8 handwritten digits. "
            "cifar10, mnist, imagenet: from Hugging Face's hub, or NAME:DIRECTORY. imagefolder:DIRECTORY.",
        ),
    ] = "photos",
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels a side (default: the data's; 8 for a fully connected network on digits)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data (default 1).")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps; with --epochs, whichever ends first.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the batches.")] = 0,
    log: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write one JSON line a step and a report at the end.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Use the published Algorithm 1 only, without the sharper rules.")
    ] = False,
    every: Annotated[
        int,
        typer.Option(min=1, metavar="K", help="Certify one step, drawn at random, of each K; estimate the totals."),
    ] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with status 1 if a step is not certified, or none was drawn.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Train the unconverted network without a monitor, for comparison.")
    ] = False,
    certificates: Annotated[
        Path | None,
        typer.Option(file_okay=False, metavar="DIR", help="Save the certificate of every step here."),
    ] = None,
    only_failed: Annotated[
        bool, typer.Option("--only-failed", help="With --certificates: only of steps that are not certified.")
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(dir_okay=False, metavar="FILE", help="Keep all that --resume needs in this file."),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Save it after each N steps, and at the end.")
    ] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from --checkpoint FILE if it is there, to the same bits.")
    ] = False,
    device: Annotated[
        DeviceName | None, typer.Option(help="Where to train (default: cuda if there is one, else cpu).")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode photographs (imagenet, imagefolder); the run is the same.")
    ] = 0,
    precision: Annotated[
        Precision,
        typer.Option(help="bf16, fp16: autocast, fp16 with a GradScaler; weights stay float32."),
    ] = "fp32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch (default: PyTorch's own choice).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON document; progress goes to stderr.")
    ] = False,
) -> None:
    """Train a network on real pictures and certify the gradient of every step.

    SGD, momentum 0.9, learning rate 0.05 with a cosine, weight decay 1e-4. The data photos and digits come with
    scikit-learn and scikit-image (extra "train"), nothing is downloaded; the others need the extra "datasets".
    The run depends on the seed alone: with --plain the weights at the end are the same bit by bit, and so they are
    after a job was killed and resumed.

    Started by torchrun, each process trains on its part of every batch (gloo, or NCCL with CUDA), the certificates
    are those of the whole batch, and the first process alone prints and writes files. All of them read the checkpoint,
    and as many have to resume a job as began it.
    """
    if plain and (log or strict or check or certificates or every > 1):
        raise typer.BadParameter(
            "--plain does not certify: it excludes --log, --strict, --every, --check, --certificates"
        )
    if only_failed and certificates is None:
        raise typer.BadParameter("--only-failed needs --certificates DIR")
    if resume and checkpoint is None:
        raise typer.BadParameter("--resume needs --checkpoint FILE")
    if checkpoint is not None:
        _check_checkpoint(checkpoint, resume)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device", param_hint="--device")
    if log is not None and not log.absolute().parent.is_dir():
        raise typer.BadParameter(f"the directory of {log} does not exist", param_hint="--log")
    if certificates is not None:
        certificates.mkdir(parents=True, exist_ok=True)
    if threads is not None:
        torch.set_num_threads(threads)
    job = Job(
        model, data, epochs, steps, batch_size, seed, log, strict, plain, certificates, only_failed, place, size, every,
        checkpoint, checkpoint_every, resume, workers, precision,
    )
    with launched(place) as ranks:
        if ranks.first:
            with Display(error_console()) as display:
                outcome = run(job, display.update, ranks)
        else:
            outcome = run(job, _silent, ranks)
    if ranks.first and as_json:
        print_json(outcome.as_dict())
    elif ranks.first:
        show_outcome(console(), outcome)
    _exit(outcome, check)


def _silent(outcome: Outcome, result: StepResult) -> None:
    """The first process speaks for all."""


def _check_checkpoint(checkpoint: Path, resume: bool) -> None:
    if not checkpoint.absolute().parent.is_dir():
        raise typer.BadParameter(f"the directory of {checkpoint} does not exist", param_hint="--checkpoint")
    if checkpoint.exists() and not resume:
        raise typer.BadParameter(
            f"{checkpoint} exists: go on from it with --resume, or remove it", param_hint="--checkpoint"
        )


def _exit(outcome: Outcome, check: bool) -> None:
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    report = outcome.report
    if check and (report is None or not report["sampled"] or report["certified"] != report["sampled"]):
        raise typer.Exit(1)
