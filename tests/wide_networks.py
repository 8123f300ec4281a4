"""The second pinned generator: random tiny networks over every activation, pooling, selection and layer kind.

``tests/networks.py`` draws networks of ReLU and 2-D max pooling alone; here every kind of ``KINDS`` is the focus of an
equal share of the seeds (seed modulo the number of kinds), amid random others. The models are plain torch code: modules
and calls inside ``forward``, in place too. Data are small integers or dyadic numbers in float64, so zeros, repeated
values and inputs exactly on kinks are frequent on purpose. A network bears the labels of all the kinds in it.
``tests/test_wide_networks.py`` pins a digest.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from networks import BIASES, INPUTS, LOSS, OUTPUTS, WEIGHTS
from networks import _Source as Source
from torch import Tensor, nn
from torch.nn import functional as F
from wide_builder import Builder
from wide_parts import ACTIVATIONS, POOLINGS, SELECTIONS
from wide_scaffolds import SCAFFOLDS

STRUCTURES = tuple(kind for kind in SCAFFOLDS if kind not in ("vector", "image", "sequence"))
KINDS = (*ACTIVATIONS, *POOLINGS, *SELECTIONS, *STRUCTURES, "several_losses", "accumulation")
MAX_PARAMETERS = 48
ATTEMPTS = 12
BLUR = 1e-7

SLOPES = (-0.5, 0, 0.25, 0.5, 1, 2)
SCALES = (-1, 0.5, 1, 1, 1, 2, 0)
VARIANCES = (0.0, 1.0, 3.0)  # with eps = 1: square roots 1, sqrt 2, 2
LOSSES = (*("linear",) * 12, *("mse_loss",) * 3, *("cross_entropy",) * 3, "l1_loss")


@dataclass(frozen=True)
class WideNetwork:
    """A tiny network, its micro-batches and its loss.

    ``batches``: (inputs, weights or targets) of each micro-batch; ``loss``: how they become a scalar; ``twice``: two
    losses of one forward pass, two backward passes.

    >>> wide_network(0).closure().dim()
    0
    """

    seed: int
    focus: str
    labels: frozenset[str]
    model: nn.Module
    batches: tuple[tuple[Tensor, Tensor], ...]
    loss: str
    twice: bool

    def losses(self) -> Iterator[tuple[Tensor, bool]]:
        """Each scalar loss, and whether its graph is needed again; random numbers are the same each time."""
        for number, (inputs, weights) in enumerate(self.batches):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + number)
                output = self.model(inputs)
            yield _loss(self.loss, output, weights), self.twice
            if self.twice:
                yield _loss("linear", output, weights.flip(0)), False

    def closure(self) -> Tensor:
        """The sum of all losses: the function whose gradient is accumulated."""
        return torch.stack([loss for loss, _ in self.losses()]).sum() if self.several else next(self.losses())[0]

    def backward(self) -> None:
        """The backward passes of a step, each as soon as its loss is there."""
        for loss, again in self.losses():
            loss.backward(retain_graph=again)

    @property
    def several(self) -> bool:
        return self.twice or len(self.batches) > 1

    def gradient(self) -> Tensor:
        """Autodiff's gradient over the trainable parameters, float64 [P], by the backward passes of the step."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for p in parameters]
        for loss, again in self.losses():
            found = torch.autograd.grad(loss, parameters, retain_graph=again, allow_unused=True)
            for sum_, each in zip(total, found, strict=True):
                if each is not None:
                    sum_ += each
        return torch.cat([t.flatten() for t in total])

    def copy(self) -> WideNetwork:
        """The same network with a model of its own."""
        return replace(self, model=copy.deepcopy(self.model))


def _loss(kind: str, output: Tensor, weights: Tensor) -> Tensor:
    if kind == "linear":
        return (weights * output).sum()
    if kind == "mse_loss":
        return F.mse_loss(output, weights, reduction="sum")
    if kind == "l1_loss":
        return F.l1_loss(output, weights, reduction="sum")
    return F.cross_entropy(output, weights.argmax(dim=1), reduction="sum")


def wide_network(seed: int) -> WideNetwork:
    """Network number ``seed`` of the pinned distribution; its focus is ``KINDS[seed % len(KINDS)]``.

    Scaffolds (``wide_scaffolds.py``): vectors, images of one to three dimensions, sequences, and structures. Batch 1 to
    3; two times in three every later sample is the negation or mirror image of the first, and then mostly its loss
    weights are minus those of the first. Half of the layers with a bias before an activation have that bias moved so
    that one unit of a channel lies exactly on a kink. One layer in four has equal weight rows; one in four, and most
    first ones, a zero row; but not the last. Networks of more than 48 parameters are drawn again from the same stream;
    so is, some times, one whose gradient vanishes at w and at a generic point near it, and always one that misses a
    kink or a tie by rounding alone.

    >>> wide_network(7).batches[0][0].equal(wide_network(7).batches[0][0])
    True
    """
    draws = _draws(seed)
    for attempt, (source, network) in enumerate(draws, 1):
        if not _is_blurred(network) and (attempt >= ATTEMPTS or not _is_flat(source, network)):
            draws.close()
            return network
    raise AssertionError("draws do not end")


def first_draw(seed: int) -> WideNetwork:
    """What is drawn first, before anybody asks how its values round."""
    draws = _draws(seed)
    network = next(draws)[1]
    draws.close()
    return network


def _draws(seed: int) -> Generator[tuple[Source, WideNetwork]]:
    source = Source(seed + 10_000_000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while True:
            yield source, _draw(source, seed, KINDS[seed % len(KINDS)])


def _draw(source: Source, seed: int, focus: str) -> WideNetwork:
    while True:
        builder = _scaffold(source, focus)
        if builder is not None and sum(p.numel() for p in builder.model.parameters()) <= MAX_PARAMETERS:
            break
    model = builder.model.double()
    fill(source, model)
    count = source.choice((2, 2, 3)) if focus == "accumulation" else 1
    twice = focus == "several_losses" or (count == 1 and source.chance(1, 20))
    loss = source.choice(LOSSES)
    batches = tuple(_minibatch(source, builder) for _ in range(count))
    builder.centre(batches[0][0])
    with torch.no_grad():
        output = model(batches[0][0])
    shape = output.shape[1:]
    if loss == "cross_entropy" and (len(shape) != 1 or shape[0] < 2):
        loss = "linear"
    pairs = tuple((x, _weights(source, (len(x), *shape), disguised, loss)) for x, disguised in batches)
    if loss == "l1_loss":  # half of its units on the kink
        pairs[0][1].copy_(torch.where(source.table((0, 1), output.shape) > 0, output, pairs[0][1]))
    labels = {*builder.labels, *({loss} if loss != "linear" else ()), *({"several_losses"} if twice else ())}
    if count > 1:
        labels.add("accumulation")
    return WideNetwork(seed, focus, frozenset(labels), model, pairs, loss, twice)


def _scaffold(source: Source, focus: str) -> Builder | None:
    if focus in SCAFFOLDS:
        kind = focus
    elif focus in POOLINGS:
        kind = "image"
    elif focus in SELECTIONS or focus in ACTIVATIONS:
        kind = source.choice(("vector", "image"))
    else:
        kind = source.choice(("vector", "image", "image", "residual", "concat", "recurrent"))
    builder = Builder(source, focus)
    return builder if SCAFFOLDS[kind](builder) else None


def _minibatch(source: Source, builder: Builder) -> tuple[Tensor, bool]:
    """Inputs [B, *shape], and whether the later samples are the first one in disguise (two times in three)."""
    batch = source.choice((1, 2, 2, 2, 3)) if not builder.batched else source.integer(2, 3)
    if builder.words:
        return torch.randint(builder.words, (batch, *builder.first), generator=source.generator), False
    inputs = source.table(INPUTS, (batch, *builder.first))
    disguised = source.chance(2, 3)
    if disguised:
        for index in range(1, batch):
            inputs[index] = (-inputs[0], -inputs[0], -inputs[0], inputs[0].flip(-1))[source.integer(0, 3)]
    return inputs, disguised


def _weights(source: Source, shape: Sequence[int], disguised: bool, loss: str) -> Tensor:
    weights = source.table(LOSS, shape)
    if disguised and loss == "linear" and source.chance(4, 5):
        weights[1:] = -weights[:1]
    return weights


def fill(source: Source, model: nn.Module) -> None:
    """Integer or dyadic parameters and running statistics, module by module; rows repeated or zeroed."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor) and _is_linear(m)]
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                last = bool(layers) and module is layers[-1]
                parameter.copy_(source.table(_table(module, name, last), parameter.shape))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(source.table(BIASES, module.running_mean.shape))
                module.running_var.copy_(source.table(VARIANCES, module.running_var.shape))
        for module in layers[:-1]:
            _quirk(source, module, module is layers[0])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def _table(module: nn.Module, name: str, last: bool) -> Sequence[float]:
    if "bias" in name or name == "offset":
        return BIASES
    if isinstance(module, nn.PReLU) or type(module).__name__ == "FunctionalPReLU":
        return SLOPES
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return SCALES if isinstance(module, norms) else OUTPUTS if last else WEIGHTS


def _quirk(source: Source, module: nn.Module, first: bool) -> None:
    weight, bias = module.weight, module.bias
    quirk = source.integer(0, 3)
    if quirk == 0:
        weight.copy_(weight[:1].expand_as(weight).clone())
    elif quirk == 1 or (quirk > 1 and first):
        row = source.integer(0, len(weight) - 1)
        weight[row] = 0
        if bias is not None and row < len(bias):
            bias[row] = 0


def _is_blurred(network: WideNetwork) -> bool:
    """A unit misses a kink, or two of a selection each other, by rounding alone (after a normalisation, say).

    Such a network does not touch, but no perturbation that float64 resolves can tell.
    """
    seen: list[Tensor] = []
    network = network.copy()
    handles = []
    for module in network.model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            handles.append(module.linear1.register_forward_hook(lambda _, given, output: seen.append(output.clone())))
        elif not list(module.children()) and not _is_linear(module):
            handles.append(module.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone())))
    with torch.no_grad():
        outputs = [loss for loss, _ in network.losses()]
    assert outputs
    return any(_near(x.double().flatten()) for x in seen)


def _near(x: Tensor) -> bool:
    """Some entry is close to a multiple of 1/2, or to another entry, but not equal to it."""
    off = (2 * x - (2 * x).round()).abs()
    gaps = x.sort().values.diff()
    return any(bool(((d > 0) & (d < BLUR)).any()) for d in (off, gaps))


def _is_flat(source: Source, network: WideNetwork) -> bool:
    """The gradient vanishes, or is not finite, at w and at one generic point near w: most likely a dead network."""
    nearby = network.copy()
    with torch.no_grad():
        for parameter in nearby.model.parameters():
            noise = torch.rand(parameter.shape, generator=source.generator, dtype=torch.float64)
            parameter.add_(2.0**-10 * (noise - 0.5))
    gradients = [each.gradient() for each in (network.copy(), nearby)]
    if not all(bool(torch.isfinite(g).all()) and float(g.abs().max()) < 1e6 for g in gradients):
        return True
    return not any(bool(g.any()) for g in gradients)
