"""Which torch functions a step records, and how their arguments are read: the routing table of the function mode.

A call that is not recorded here runs as it is, and the audit names its node if it is not smooth where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import activations
from .calls import ALIKE, Arguments, Call, Handler
from .calls_activations import activation, clamp, elu, hardtanh, leaky, prelu, relu, rrelu, softshrink, threshold
from .calls_pooling import adaptive, fractional, max_pool1d, max_pool2d, pool_of
from .calls_recurrent import rnn, rnn_cell
from .calls_selections import amax, extremum, greater, msort, running, sort, statistic, topk
from .recomputed import dropping
from .recorder import Recorder

_NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # torch's functions take numpy's names, too
_Entry = tuple[tuple[str, ...], Arguments, bool, Handler]
_TABLE: dict[Any, _Entry] = {}


def record(recorder: Recorder, func: Any, args: Sequence[Any], kwargs: Arguments, where: Callable[[], str]) -> Any:
    """The recorded result of a call, or NotImplemented; ``where()``: its place in somebody's program."""
    found = _TABLE.get(func)
    if found is None:
        return NotImplemented
    names, defaults, inplace, handler = found
    if dropping() and handler not in ALIKE:
        return NotImplemented
    spelt = {_NUMPY.get(key, key): value for key, value in kwargs.items()}
    given = {**defaults, **dict(zip(names, args, strict=False)), **spelt}
    unknown = spelt.keys() - {*names, "out"}
    if unknown or spelt.get("out") is not None or len(args) > len(names) or not isinstance(given.get("input"), Tensor):
        return NotImplemented
    name = recorder.named or f"{func.__name__.strip('_')}{where()}"
    call = Call(name, given, lambda: func(*args, **kwargs), inplace or bool(given.get("inplace")))
    return handler(recorder, call)


def known(func: Any) -> bool:
    """Is there an entry for a function?"""
    return func in _TABLE


def _enter(
    functions: Sequence[Any], names: str, defaults: Arguments, handler: Handler, inplace: Sequence[Any] = ()
) -> None:
    for written, group in ((False, functions), (True, inplace)):
        for function in group:
            _TABLE[function] = ("input", *names.split()), defaults, written, handler


_NO = {"inplace": False}
_BOUNDS: Arguments = {"min": None, "max": None}
_KEEP: Arguments = {"keepdim": False}
_POOL = "kernel_size stride padding dilation ceil_mode return_indices"
_POOLED: Arguments = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}

_enter([F.relu, torch.relu, Tensor.relu], "inplace", _NO, relu, [F.relu_, torch.relu_, Tensor.relu_])
_enter([F.relu6], "inplace", _NO, activation(lambda given: activations.hardtanh(0.0, 6.0)))
_enter(
    [F.hardtanh],
    "min_val max_val inplace",
    {"min_val": -1.0, "max_val": 1.0} | _NO,
    activation(hardtanh),
    [F.hardtanh_],
)
_enter([F.leaky_relu], "negative_slope inplace", {"negative_slope": 0.01} | _NO, activation(leaky), [F.leaky_relu_])
_enter([F.hardsigmoid], "inplace", _NO, activation(lambda given: activations.hardsigmoid()))
_enter([F.hardswish], "inplace", _NO, activation(lambda given: activations.hardswish()))
_enter([F.softshrink], "lambd", {"lambd": 0.5}, activation(softshrink))
_enter([F.elu], "alpha inplace", {"alpha": 1.0} | _NO, activation(elu))
_enter([], "alpha", {"alpha": 1.0}, activation(elu), [F.elu_])  # a scale after alpha is another function
_enter(
    [F.selu, torch.selu], "inplace", _NO, activation(lambda given: activations.elu(*activations.SELU)), [torch.selu_]
)
_enter([F.threshold], "threshold value inplace", _NO, activation(threshold), [torch.threshold_])
_enter([F.prelu, torch.prelu, Tensor.prelu], "weight", {}, prelu)
_enter([F.rrelu], "lower upper training inplace", {"lower": 1 / 8, "upper": 1 / 3, "training": False} | _NO, rrelu)
_enter([torch.clamp, Tensor.clamp, torch.clip, Tensor.clip], "min max", _BOUNDS, activation(clamp))
_enter([], "min max", _BOUNDS, activation(clamp), [torch.clamp_, Tensor.clamp_, Tensor.clip_])
_enter([torch.clamp_min, Tensor.clamp_min], "min", {}, activation(clamp), [torch.clamp_min_, Tensor.clamp_min_])
_enter([torch.clamp_max, Tensor.clamp_max], "max", {}, activation(clamp), [torch.clamp_max_, Tensor.clamp_max_])
_enter(
    [torch.abs, Tensor.abs, torch.absolute, Tensor.absolute, Tensor.__abs__],
    "",
    {},
    activation(lambda given: activations.magnitude()),
    [torch.abs_, Tensor.abs_],
)
_enter([F.max_pool2d, torch.max_pool2d], _POOL, _POOLED, max_pool2d)
_enter([F.max_pool1d, torch.max_pool1d], _POOL, _POOLED, max_pool1d)
_enter([F.max_pool3d, torch.max_pool3d], _POOL, _POOLED, pool_of(3))
_INDICES = {"return_indices": False}
for _spatial in (1, 2, 3):
    _both = (getattr(F, f"max_pool{_spatial}d_with_indices"), getattr(F, f"adaptive_max_pool{_spatial}d_with_indices"))
    _enter([_both[0]], _POOL, _POOLED | {"return_indices": True}, pool_of(_spatial))
    _enter(
        [getattr(F, f"adaptive_max_pool{_spatial}d"), _both[1]],
        "output_size return_indices",
        _INDICES,
        adaptive(_spatial),
    )
for _spatial in (2, 3):
    for _name in (f"fractional_max_pool{_spatial}d", f"fractional_max_pool{_spatial}d_with_indices"):
        _enter(
            [getattr(F, _name)],
            "kernel_size output_size output_ratio return_indices _random_samples",
            {"output_size": None, "output_ratio": None, "_random_samples": None} | _INDICES,
            fractional(_spatial, getattr(F, _name)),
        )
for _largest, _names in ((True, ("max", "amax")), (False, ("min", "amin"))):
    _enter([getattr(torch, _names[0]), getattr(Tensor, _names[0])], "dim keepdim other", _KEEP, extremum(_largest))
    _enter(
        [getattr(torch, _names[1]), getattr(Tensor, _names[1])],
        "dim keepdim",
        {"dim": (), "keepdim": False},
        amax(_largest),
    )
for _largest, _name in ((True, "maximum"), (False, "minimum")):
    _enter([getattr(torch, _name), getattr(Tensor, _name)], "other", {}, greater(_largest))
for _largest, _name in ((True, "fmax"), (False, "fmin")):
    _enter([getattr(torch, _name), getattr(Tensor, _name)], "other", {}, greater(_largest, even=False))
_enter([torch.sort, Tensor.sort], "dim descending stable", {"dim": -1, "descending": False}, sort)
_enter([torch.msort, Tensor.msort], "", {}, msort)
_enter([torch.cummax, Tensor.cummax], "dim", {}, running(True))
_enter([torch.cummin, Tensor.cummin], "dim", {}, running(False))
_enter([torch.topk, Tensor.topk], "k dim largest sorted", {"dim": -1, "largest": True, "sorted": True}, topk)
_enter([torch.rnn_relu], "hx params has_biases num_layers dropout train bidirectional batch_first", {}, rnn)
_enter([torch.rnn_relu_cell], "hx w_ih w_hh b_ih b_hh", {"b_ih": None, "b_hh": None}, rnn_cell)
_enter([torch.median, Tensor.median], "dim keepdim", _KEEP, statistic(lambda given, size: (size - 1) // 2))
_enter(
    [torch.kthvalue, Tensor.kthvalue],
    "k dim keepdim",
    {"dim": -1, "keepdim": False},
    statistic(lambda given, size: given["k"] - 1),
)
