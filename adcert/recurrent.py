"""torch's recurrent networks of ReLUs, step by step: the same operations in the same order, each ReLU recorded.

``nn.RNN(nonlinearity="relu")`` and ``nn.RNNCell`` are one call of C++, which shows its ReLUs to nobody. On a CPU it is
made of linear layers, sums and ReLUs; the results and gradients of this file are equal to its own, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Relu = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """Of one layer and direction: of its input, of its state, and their biases."""

    inputs: Tensor
    state: Tensor
    inputs_bias: Tensor | None
    state_bias: Tensor | None

    def read(self, x: Tensor) -> Tensor:
        """What the input adds."""
        return F.linear(x, self.inputs, self.inputs_bias)

    def step(self, state: Tensor, added: Callable[[], Tensor], relu: Relu) -> Tensor:
        """The next state; ``added()`` is what the input adds, computed after what the state does."""
        return relu(F.linear(state, self.state, self.state_bias).add_(added()))


def grouped(params: Sequence[Tensor], biased: bool) -> list[Weights]:
    """The flat list of a module's weights, one entry for each layer and direction."""
    size = 4 if biased else 2
    found = []
    for start in range(0, len(params), size):
        inputs, state, *biases = params[start : start + size]
        found.append(Weights(inputs, state, *(biases or (None, None))))
    return found


def network(
    x: Tensor, initial: Tensor, layers: Sequence[Sequence[Weights]], dropout: float, relu: Relu
) -> tuple[Tensor, Tensor]:
    """Outputs [T, B, D H] and last states [L D, B, H] of L layers of D directions, for inputs [T, B, I].

    ``dropout``: the probability that an output of a layer is left out of the next one's input.
    """
    states, last = initial.unbind(0), []
    for number, directions in enumerate(layers):
        outputs = []
        for way, weights in enumerate(directions):
            steps = list(weights.read(x).unbind(0))
            state, seen = states[number * len(directions) + way], []
            for added in reversed(steps) if way else steps:
                state = weights.step(state, lambda added=added: added, relu)  # type: ignore[misc]
                seen.append(state)
            outputs.append(torch.stack(seen[::-1] if way else seen))
            last.append(state)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if dropout and number < len(layers) - 1:
            x = torch.dropout(x, dropout, True)
    return x, torch.stack(last)
