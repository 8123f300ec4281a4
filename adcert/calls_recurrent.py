"""Calls of recurrent networks of ReLUs: run step by step, so that every ReLU is recorded."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import recurrent
from .calls import Call
from .recorder import Recorder, recordable


def rnn(recorder: Recorder, call: Call) -> Any:
    """``rnn_relu`` on the host, but not of packed sequences."""
    given = call.given
    x: Tensor = given["input"]
    hx, params = given.get("hx"), given.get("params")
    if not isinstance(params, (list, tuple)) or not isinstance(hx, Tensor) or x.dim() != 3:
        return NotImplemented  # packed sequences
    if x.is_cuda or not any(recordable(t) for t in (x, hx, *params)):
        return NotImplemented
    weights = recurrent.grouped(params, bool(given["has_biases"]))
    ways = 2 if given["bidirectional"] else 1
    if not len(weights) == ways * given["num_layers"] == len(hx):
        return NotImplemented  # torch says why
    layers = [weights[start : start + ways] for start in range(0, len(weights), ways)]
    with torch._C.DisableTorchFunction():
        first = x.transpose(0, 1) if given["batch_first"] else x
        relu = functools.partial(recorder.relu, name=call.name)
        output, last = recurrent.network(first, hx, layers, given["dropout"] if given["train"] else 0.0, relu)
        return output.transpose(0, 1) if given["batch_first"] else output, last


def rnn_cell(recorder: Recorder, call: Call) -> Any:
    """``rnn_relu_cell`` on the host."""
    given = call.given
    x, state, *tensors = (given.get(name) for name in ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"))
    if not isinstance(x, Tensor) or not isinstance(state, Tensor) or x.is_cuda:
        return NotImplemented
    if not any(recordable(t) for t in (x, state, *tensors) if isinstance(t, Tensor)):
        return NotImplemented
    with torch._C.DisableTorchFunction():
        weights = recurrent.Weights(*tensors)  # type: ignore[arg-type]
        return weights.step(state, lambda: weights.read(x), functools.partial(recorder.relu, name=call.name))
