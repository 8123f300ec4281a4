"""From a closure to a program: run it once and follow the parameters through memory.

Every float in memory is either a constant (whatever it holds) or a node of the graph. The memory is followed by
storage and place, so that views, slices, in-place operations, tied weights and functional calls need no care: an
operation reads nodes at the places of its arguments and writes nodes at those of its results. What an operation
computes is said by ``rules`` (sums, moves), ``layers``, ``kinks`` (maxima) and ``smooth``; another operation on values
that depend on parameters is an OracleError with its name.

Values are taken as computed: where torch's result differs from the exact one, the difference is added as a constant,
and the program says that it is not exact. What is read into Python, computed under ``no_grad`` or detached, is a
constant; integers and booleans computed from parameters may exist, but not be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from . import kinks as kinks
from . import layers as layers
from . import smooth as smooth
from .program import ONE, Array, Graph, OracleError, Program
from .rules import RULES, Arg, Call

__all__ = ["trace", "trainable"]

CONSTANT, OPAQUE = -2, -3  # places in memory: the value it holds; an integer or boolean made of parameters

# Their results do not depend on the values of their arguments.
_BLIND = frozenset(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full "
    "new_empty_strided bernoulli bernoulli_ uniform_ normal_ random_ zero_ fill_ is_same_size sym_size sym_numel "
    "sym_stride sym_storage_offset resize_ exponential_".split()
)
_TURNS = frozenset("transpose_ t_ squeeze_ unsqueeze_ swapdims_ swapaxes_ as_strided_".split())  # in place, views only
_FILLS = frozenset(("zero_", "uniform_", "normal_", "random_", "exponential_"))

Parameters = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]


def trainable(parameters: Parameters) -> dict[str, Tensor]:
    """The trainable parameters by name, each once: of a module, a mapping, or a sequence (named "0", "1", ...)."""
    named: dict[str, Tensor]
    if isinstance(parameters, nn.Module):
        named = dict(parameters.named_parameters())
    elif isinstance(parameters, Mapping):
        named = dict(parameters)
    else:
        named = {str(k): p for k, p in enumerate(parameters)}
    return {name: p for name, p in named.items() if p.requires_grad}


def trace(closure: Callable[[], Tensor], parameters: Parameters) -> Program:
    """The program of ``closure()``, a scalar, as a function of the trainable parameters.

    Raises :class:`OracleError` for an operation it does not know, for values that are not finite and at points where
    the function is not continuous.

    >>> w = torch.zeros(1, requires_grad=True)
    >>> program = trace(lambda: (w.relu() - (-w).relu()).sum(), [w])
    >>> len(program.ops), float(program.value(program.output))
    (4, 0.0)
    """
    named = trainable(parameters)
    tracer = _Tracer()
    nodes, slices, total = [], {}, 0
    for name, parameter in named.items():
        nodes.append(tracer.adopt(parameter).ravel())
        slices[name] = slice(total, total + parameter.numel())
        total += parameter.numel()
    with torch.enable_grad(), tracer:
        loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise OracleError("the closure has to return a scalar tensor")
    output = int(tracer.read(loss, "the loss").ravel()[0])
    flat = np.concatenate(nodes) if nodes else np.zeros(0, dtype=np.int64)
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    return tracer.graph.program(flat, slices, shapes, output)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.memory: dict[int, tuple[Any, Array]] = {}  # storage -> itself (kept alive) and its places
        self.detached: dict[int, Any] = {}

    # ---- memory ----------------------------------------------------------------------------------

    def adopt(self, parameter: Tensor) -> Array:
        known = self.places(parameter)
        if known is not None and (known != CONSTANT).any():
            raise OracleError("two parameters share their memory")
        values = parameter.detach().to(torch.float64).numpy()
        if not np.isfinite(values).all():
            raise OracleError("the oracle needs finite parameters")
        nodes = self.graph.parameter(values)
        self.write(parameter, nodes)
        return nodes

    def _index(self, tensor: Tensor) -> Array:
        index = np.full((), tensor.storage_offset(), dtype=np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            index = index[..., None] + np.arange(size) * stride
        return index

    def places(self, tensor: Tensor) -> Array | None:
        """What is at the tensor's places; None where the whole storage is constant."""
        entry = self.memory.get(tensor.untyped_storage()._cdata)
        return None if entry is None else np.asarray(entry[1][self._index(tensor)])

    def depends(self, tensor: Tensor) -> bool:
        places = self.places(tensor)
        return places is not None and bool((places != CONSTANT).any())

    def read(self, tensor: Tensor, what: str) -> Array:
        places = self.places(tensor)
        if places is not None and (places == OPAQUE).any():
            raise OracleError(f"the oracle does not follow integers or comparisons of computed values ({what})")
        if places is not None and (places != CONSTANT).all():
            return places
        values = tensor.detach().to(torch.float64).numpy()
        if places is None:
            return self.graph.numbers(values)
        nodes = places.copy()
        nodes[places == CONSTANT] = self.graph.numbers(values[places == CONSTANT])
        return nodes

    def write(self, tensor: Tensor, nodes: Array) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.memory:
            size = storage.nbytes() // max(tensor.element_size(), 1)
            self.memory[storage._cdata] = storage, np.full(size, CONSTANT, dtype=np.int64)
        stored = np.where(self.graph.constant[np.maximum(nodes, 0)] & (nodes >= 0), CONSTANT, nodes)
        self.memory[storage._cdata][1][self._index(tensor)] = stored

    # ---- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        tensors = _tensors((args, kwargs))
        dependent = any(map(self.depends, tensors))
        written = _written(func, args, kwargs)
        self._guard(name, written)
        if not dependent:
            result = func(*args, **kwargs)
            for tensor in written:
                self._forget(tensor)
            return result
        if not torch.is_grad_enabled() or name == "detach":
            return self._constant(func, name, args, kwargs, written)
        if name in _BLIND:
            result = func(*args, **kwargs)
            if name in _FILLS or name == "fill_":
                source = args[1] if name == "fill_" else 0.0
                if isinstance(source, Tensor) and self.depends(source):
                    raise OracleError("the oracle does not know fill_ with a computed value")
                for tensor in written:
                    self._forget(tensor)
            return result
        if name in _TURNS or name in ("_local_scalar_dense", "item", "equal"):
            return func(*args, **kwargs)
        return self._follow(func, name, args, kwargs, written)

    def _guard(self, name: str, written: list[Tensor]) -> None:
        if any(t.untyped_storage()._cdata in self.detached for t in written):
            raise OracleError(f"the oracle does not follow {name} on a detached tensor")

    def _forget(self, tensor: Tensor) -> None:
        if self.places(tensor) is not None:
            self.write(tensor, np.full(tensor.shape, CONSTANT, dtype=np.int64))

    def _constant(self, func: Any, name: str, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """An operation whose result is a constant: a copy of its own, if it would have been a view."""
        changed = [t for t in written if self.depends(t)]
        before = [t.detach().clone() for t in changed]
        result = func(*args, **kwargs)
        if not all(torch.equal(t, old) for t, old in zip(changed, before, strict=True)):
            raise OracleError(f"the oracle does not follow {name} on a computed value under no_grad")
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        inplace = {t.untyped_storage()._cdata for t in written}

        def copied(x: Any) -> Any:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata in known - inplace:
                x = x.clone(memory_format=torch.preserve_format)
                self.detached[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        return tree_map(copied, result)

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        if _is_view(func):
            result = func(*args, **kwargs)
            if all(t.untyped_storage()._cdata in known for t in _tensors(result)):
                return result
        rule = RULES.get(name if name in RULES else name.rstrip("_"))
        if rule is None:
            return self._opaque(func, name, args, kwargs, written)
        call = Call(self.graph, func, name, self._arguments(func, name, args, kwargs))
        result = func(*args, **kwargs)
        outputs = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        call.outputs = [t.detach() for t in outputs]
        call.written = [t.detach() for t in written]
        nodes = rule(call)
        nodes = nodes if isinstance(nodes, list) else [nodes]
        for k, tensor in enumerate(outputs):
            found = nodes[k] if k < len(nodes) else None
            self.write(tensor, np.full(tensor.shape, OPAQUE) if found is None else self.settle(found, tensor, name))
        for tensor in written:
            if all(tensor is not t for t in outputs):
                self._forget(tensor)  # a buffer: the noise of rrelu
        return result

    def _opaque(self, func: Any, name: str, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """An operation without a rule: its result may exist if it is not differentiable, but not be used."""
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        if written or any(t.is_floating_point() or t.is_complex() for t in outputs) or not outputs:
            raise OracleError(f"the oracle does not know {func}")
        for tensor in outputs:
            self.write(tensor, np.full(tensor.shape, OPAQUE))
        return result

    def _arguments(self, func: Any, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        """All arguments by name, defaults included; tensors as Arg."""

        kinds = {t.dtype for t in _tensors((args, kwargs)) if t.is_floating_point() and (t.dim() or t.requires_grad)}
        single = bool(kinds) and torch.float64 not in kinds

        def argument(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if single and x.dtype == torch.float64 and not x.dim():
                x = x.to(torch.float32)  # a Python number in the company of singles
            if x.is_complex():
                raise OracleError(f"the oracle does not know complex numbers ({name})")
            nodes = self.read(x, name) if x.is_floating_point() else None
            if nodes is None and self.depends(x):
                raise OracleError(f"the oracle does not follow integers or comparisons of computed values ({name})")
            return Arg(x.detach().clone(), nodes)

        named = {}
        for k, declared in enumerate(func._schema.arguments):
            if k < len(args) and not declared.kwarg_only:
                value = args[k]
            else:
                value = kwargs.get(declared.name, declared.default_value)
            if declared.name != "noise":  # of rrelu: not initialised yet
                named[declared.name] = tree_map(argument, value)
        return named

    def settle(self, nodes: Array, tensor: Tensor, name: str) -> Array:
        """The nodes of a result, with the rounding of torch's kernel as constant offsets."""
        if not tensor.is_floating_point():
            raise OracleError(f"the oracle does not know {name} with a result of type {tensor.dtype}")
        nodes = np.asarray(nodes).reshape(tuple(tensor.shape))
        got = tensor.detach().to(torch.float64).numpy()
        if not np.isfinite(got).all():
            raise OracleError(f"the oracle needs finite values ({name})")
        graph = self.graph
        values = graph.values[nodes]
        off = (values != got) | (np.isin(nodes, list(graph.fractions)) if graph.fractions else False)
        if not off.any():
            return nodes
        graph.eps = max(graph.eps, torch.finfo(tensor.dtype).eps)
        room = 64 * torch.finfo(tensor.dtype).eps * (1.0 + float(np.abs(got).max()) + float(np.abs(values).max()))
        if not (np.abs(values - got) <= room * max(1, nodes.size)).all():
            raise RuntimeError(f"the oracle's values of {name} are not torch's: a mistake in the oracle")
        graph.exact = False
        result = nodes.copy()
        targets = got[off].tolist()
        if graph.loose:
            deltas = [graph.number(float(x)) for x in got[off] - values[off]]
        else:
            targets = [Fraction(x) for x in targets]
            deltas = [graph.number(x - graph.value(n)) for x, n in zip(targets, nodes[off], strict=True)]
        terms = np.stack([nodes[off], np.array(deltas)], axis=-1)
        result[off] = graph.poly(terms, np.full(terms.shape, ONE), targets)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def visit(x: Any) -> None:
        if isinstance(x, Tensor):
            found.append(x)

    tree_map(visit, tree)
    return found


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes."""
    values = list(args) + [None] * (len(func._schema.arguments) - len(args))
    found = []
    for value, declared in zip(values, func._schema.arguments, strict=True):
        if declared.alias_info is not None and declared.alias_info.is_write:
            found += _tensors(kwargs.get(declared.name, value))
    return found


def _is_view(func: Any) -> bool:
    """Whether its results may share their memory with an argument, which is not changed."""
    written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    aliased = any(r.alias_info is not None for r in func._schema.returns)
    return not written and (aliased or func._schema.name == "aten::_unsafe_view")
