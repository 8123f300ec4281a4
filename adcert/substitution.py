"""One call of a compiled program, replayed for its structure: autograd nodes, records and audit of an eager step.

The captured graph runs under the step's function mode, node by node, with the compiled program's values where it has
shown them. Smooth operations in between are computed again where somebody reads their values, and filled with NaN where
nobody does. A replay may run nothing that a second evaluation could decide in another way (:data:`SMOOTH`): other
operations are named, and make the step undecided. See :mod:`adcert.compiled`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from . import ops, routes
from .captured import Overflow, Refused, Region, Site, function_of, unrecorded
from .errors import AdcertError
from .nodes import linked
from .recomputed import dropping
from .recorder import Recorder

_VIEWS = """view _unsafe_view reshape _reshape_alias expand permute transpose t squeeze unsqueeze slice select split
    split_with_sizes unbind alias detach"""
_ARITHMETIC = """convolution native_batch_norm cudnn_batch_norm miopen_batch_norm addmm mm bmm baddbmm linear dot mv
    add sub rsub mul neg mean sum cat stack clone _to_copy constant_pad_nd native_layer_norm native_group_norm
    _softmax _log_softmax gelu silu mish tanh sigmoid exp avg_pool2d _adaptive_avg_pool2d mkldnn_adaptive_avg_pool2d
    embedding nll_loss_forward nll_loss2d_forward mse_loss upsample_bilinear2d lerp addcmul where masked_fill
    index_select gather tril triu _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"""
_CREATED = """empty zeros ones full empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full
    arange scalar_tensor"""
#: Operators that a replay runs: none chooses by computed values, draws numbers, writes or has a pole.
SMOOTH = frozenset(f"aten::{name}" for name in f"{_VIEWS} {_ARITHMETIC} {_CREATED}".split())
_NORMS = frozenset({"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"})
_ROOM_AT = {"adcert::relu": 1, "adcert::max_pool2d": 7}  # which argument of a recording operator is its lists' room


class Replay:
    """One call of a compiled program in a step: ``account()`` tells the step's recorder and function mode of it."""

    def __init__(self, region: Region, recorder: Recorder, args: Sequence[Any], results: Sequence[Any]) -> None:
        self.region, self.recorder = region, recorder
        self.args, self.outputs = args, results[: region.outputs]
        values = iter(results[region.outputs :])
        self.shown: dict[fx.Node, list[Tensor]] = {}
        for node, count, own in region.shown:
            first = [] if own is None else [self.outputs[own].detach()]
            self.shown[node] = first + [next(values) for _ in range(count - len(first))]

    def account(self) -> None:
        """Whatever happens here, the user's program goes on: an edge that is not linked makes the step undecided."""
        if not any(isinstance(out, Tensor) and out.requires_grad for out in self.outputs):
            return
        assert self.recorder.witness is not None
        problem = self.region.problem
        if dropping():
            problem = "compiled code under saved-tensor hooks (activation checkpointing or offloading)"
        found: Sequence[Any] = ()
        if not problem:
            grad, number = torch.is_grad_enabled(), len(self.recorder.records)
            try:
                with self.recorder.witness.substituting():
                    found = self._run()
            except Refused as error:
                problem = str(error)
            except Exception as error:
                problem = f"the replay of compiled code failed with {type(error).__name__}: {error}"
            finally:
                torch.set_grad_enabled(grad)
            if problem:
                del self.recorder.records[number:]
        with torch._C.DisableTorchFunction():
            for out, twin in zip(self.outputs, found or [None] * len(self.outputs), strict=True):
                if isinstance(out, Tensor) and out.requires_grad and not any(out is given for given in self.args):
                    self._link(out, twin, problem)

    def _link(self, out: Tensor, twin: Any, problem: str) -> None:
        if out.grad_fn is None:
            raise AdcertError(
                "the compiler has lost the graph of an output, whose gradient would reach no parameter: please report "
                "this with the model; outside of monitored steps the program is compiled without adcert"
            )
        links, edge = self.recorder.links, (out.grad_fn, out.output_nr)
        if isinstance(twin, Tensor) and twin.grad_fn is not None and twin.shape == out.shape:
            ends = linked(links, (twin.grad_fn, twin.output_nr))
            if ends != linked(links, edge):
                links[edge] = ends
        else:
            self.recorder.refused[out.grad_fn] = problem or "an output of compiled code that its replay lacks"

    def _run(self) -> Sequence[Any]:
        """The outputs of the replay."""
        values: dict[fx.Node, Any] = {}
        given = iter(self.args)
        mode = _Substitute(self.args)
        for node in self.region.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return args[0]  # type: ignore[no-any-return]
            if node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(self.region.module)
                continue
            mode.known, mode.skip = self.shown.get(node), node in self.region.unread
            try:
                with mode:
                    values[node] = self._step(node, args, kwargs)
            except Overflow as error:
                if self.region.dynamic:
                    raise Refused(f"{error}: its sizes are symbols, try torch.compile(..., dynamic=False)") from error
                self.region.rooms[node] = 1 << (2 * error.needed - 1).bit_length()
                self.region.outgrown = True
                raise Refused(f"{error}; the next step has more") from error
        raise Refused("compiled code without an output")

    def _step(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        site: Site | None = node.meta.get("site")
        if site is not None:
            return self._record(site, args[0])
        function, witness = function_of(node), self.recorder.witness
        assert witness is not None
        if routes.known(function):
            raise Refused(unrecorded(function.__name__))
        before = witness.calls
        result = function(*args, **kwargs)
        unpacked = function is operator.getitem and not isinstance(args[0], Tensor)
        if witness.calls == before and not unpacked and _tensors((*args, *kwargs.values())):
            raise Refused(unrecorded(getattr(function, "__name__", str(function))))  # the function mode has not seen it
        return result

    def _record(self, site: Site, x: Tensor) -> Tensor:
        recorder = self.recorder
        assert recorder.witness is not None
        source = recorder.witness.source_of(x)
        if source is not None:
            raise Refused(f"{site.kind} in compiled code reads what {source[0]} has hidden from autograd")
        name = recorder.name_at(site.module, site.kind)
        if site.window is None:
            return recorder.relu(x, name)
        return recorder.max_pool2d(x, name, site.window, ceil_mode=site.ceil_mode, relu=site.relu)


class _Substitute(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators of a replay, below autograd: values the program has shown, NaN for what nobody reads, else computed.

    ``known``: the tensors of the node that runs, or None. ``skip``: nobody reads what it computes.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs = inputs
        self.known: list[Tensor] | None = None
        self.skip = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _ROOM_AT and self.known is not None:
            room = args[_ROOM_AT[name]] if len(args) > _ROOM_AT[name] else -1
            return _recorded([self._own(args[0]), *self.known[1:]], room)
        if name == "aten::relu" and self.known is not None:  # of a constant: nothing is recorded
            return self._own(args[0]) if len(self.known) == 3 else args[0].detach()
        if name == "aten::max_pool2d_with_indices" and self.known is not None:
            return self._own(args[0]), torch.empty_like(self.known[1], dtype=torch.int64)
        if name == "aten::convolution" and self.known is not None and self.known[0].dim() == args[0].dim():
            return self.known[0].detach()  # a convolution of one image has a batch dimension inside
        if name == "aten::add_" and any(args[0] is given for given in self.inputs) and not args[0].is_floating_point():
            return args[0]  # a counter, which the program has advanced already
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if func._schema.is_mutable or given.get("dropout_p"):
            raise Refused(unrecorded(name.removeprefix("aten::")))
        exact = name == "aten::div" and "rounding_mode" not in kwargs and self._exact(args[1])
        if name not in SMOOTH and not exact:
            raise Refused(unrecorded(name.removeprefix("aten::")))
        if name in _NORMS and args[5]:  # statistics of the batch: the program has written the running ones already
            args = (*args[:3], None, None, *args[5:])
        if self.skip and _tensors(args) and not _is_view(func):
            return _nothing(func, args, kwargs)
        result = func(*args, **kwargs)
        reads, makes = ([t.is_floating_point() for t in _tensors(each)] for each in (args, result))
        if any(reads) and not all(makes):
            raise Refused(f"{name.removeprefix('aten::')} in compiled code makes integers of computed numbers")
        return result

    def _own(self, x: Tensor) -> Tensor:
        """The result of the recorded node that reads x, which may have been returned in another shape."""
        assert self.known is not None
        return self.known[0].detach().reshape(x.shape if len(self.known) == 3 else self.known[1].shape)

    def _exact(self, value: Any) -> bool:
        """Is it a number, or a tensor that the program was given: the same for both, to the last bit?"""
        return not isinstance(value, Tensor) or any(value is given for given in self.inputs)


def _recorded(known: list[Tensor], room: int) -> tuple[Tensor, ...]:
    """What a recording operator returns, from what it has returned in the program; ``room``: -1 for exact lists."""
    output, *lists, counts = known  # a pooling's lists begin with the offsets
    space = len(lists[0] if len(lists) == 1 else lists[1])
    if room > space:
        raise Overflow(f"{room} entries were asked for", room)
    windows, touches = 0, 0
    if room < 0:
        windows, touches, _ = counts.tolist()
        if max(windows, touches) > space:
            raise Overflow(f"{windows} ties and {touches} touches", max(windows, touches))
    if len(known) == 3:
        relu = ops.ReluResult._make((output, *lists, counts))
        return tuple(relu if room >= 0 else ops.ordered(relu, windows, touches))
    pool = ops.PoolResult._make((output, *lists, counts))
    routes = counts.new_empty(0)  # only backward reads them, and this graph has none
    return (*(pool if room >= 0 else ops.ordered(pool, windows, touches)), routes)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [t for each in value for t in _tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None for each in func._schema.returns)


def _nothing(func: Any, args: Any, kwargs: Any) -> Any:
    """Results of the right shapes that say so loudly if somebody reads them after all."""

    def shape_only(value: Any) -> Any:
        return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value

    shapes = func(*tree_map(shape_only, args), **tree_map(shape_only, kwargs))
    device = _tensors(args)[0].device

    def filled(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return torch.full((), math.nan, dtype=t.dtype, device=device).expand(t.shape)

    return tree_map(filled, shapes)
