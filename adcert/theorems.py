"""Static analysis: which theorems of Park, Chun, Lee (ICLR 2024) hold for a network, and what is left for each step.

One forward pass of an example is recorded; what follows looks at its graph alone (:mod:`adcert.coverage`), at no value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import Activation
from .audit import audit_graph
from .bias import bias_of, partly_biased
from .choices import Ties
from .convert import convert
from .coverage import STATIC, Facts, Failure, Kink, claim_of, facts_of, failing, shifted
from .errors import AdcertError
from .guards import KINKS
from .layers import Graph, Leaves, Order, kind_of, order_layers
from .recorder import Recorder, recording, running
from .records import OpRecord
from .watch import Watch

ALWAYS, PER_STEP, NO = "always", "per step", "no"


@dataclass(frozen=True)
class Theorem:
    """One theorem on this network: it holds "always", "per step" (``left`` says what a step has to check), or "no".

    ``claim``: the set AD's gradient lies in where it holds; ``failing``: the conditions that do not.
    """

    name: str
    holds: str
    claim: str = ""
    left: str = ""
    failing: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Operation:
    """One nonsmooth operation: its bias structure, the kinks of its rho with AD's proxies, and what decides it.

    ``bias``: "none", "distinct", "shared", or "partial" (added to some units only); ``parameter``: the one that is
    added. ``weights``: per kink lambda with proxy = lambda D- + (1 - lambda) D+, None outside [0, 1]. ``left``: what a
    step has to check, "touches", "ties", or neither; ``theorem``: the one that does, or that makes it needless.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bias: str
    parameter: str
    kinks: tuple[Kink, ...]
    weights: tuple[float | None, ...]
    theorem: str
    left: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """Its line in a table under :data:`HEADER`."""
        bias = f"{self.bias} ({self.parameter})" if self.parameter else self.bias
        kinks = ", ".join(
            f"{kink.at:g}: {self._proxy(kink)} ({'outside' if weight is None else f'{weight:g}'})"
            for kink, weight in zip(self.kinks, self.weights, strict=True)
        )
        return self.name, self.kind, bias, kinks or "-", self.theorem or "-", ", ".join(self.left) or "nothing"


    def _proxy(self, kink: Kink) -> str:
        """Each unit has a slope of its own in PReLU and RReLU."""
        return "its slope" if self.kind.startswith(("prelu", "rrelu")) else f"{kink.proxy:g}"


HEADER = ("operation", "kind", "bias", "kink: proxy (lambda)", "theorem", "left to check")


@dataclass(frozen=True)
class Analysis:
    """What holds for a network whatever its values are, and what a step has to check.

    ``theorem``: the first of Theorems 1, 4 and 6 that holds, "" if every step has to be checked; ``claim``: the set
    that then holds AD's gradient at every step. ``problems``: operations nobody records, or other reasons for which no
    step can be certified. ``assumptions``: what all of this takes for granted.
    """

    theorem: str
    claim: str
    operations: tuple[Operation, ...]
    theorems: tuple[Theorem, ...]
    problems: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def conclusion(self) -> str:
        """One line: what holds at every step."""
        if self.theorem:
            return f"{self.theorem} holds at every step: AD's gradient is always a {self.claim.title()} subgradient"
        if self.problems:
            return f"no step can be certified: {self.problems[0]}"
        return "no theorem holds at every step: each has to be checked"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data that ``json.dumps`` takes."""
        return {"conclusion": self.conclusion} | asdict(self)

    def __str__(self) -> str:
        lines = [self.conclusion, "", *_table([HEADER, *(operation.cells() for operation in self.operations)]), ""]
        for theorem in self.theorems:
            lines.append(describe(theorem))
            lines += [f"  fails: {text}" for text in reasons_of(theorem)]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines += [f"assumed: {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)


def describe(theorem: Theorem) -> str:
    """One line: whether it holds, what it claims, what is left."""
    claim = f", {theorem.claim}" if theorem.claim else ""
    return f"{theorem.name}: {theorem.holds}{claim}" + (f" ({theorem.left})" if theorem.left else "")


def reasons_of(theorem: Theorem) -> list[str]:
    """Each failing condition once, with the operations it fails for (the first three by name)."""
    found: dict[str, list[str]] = {}
    for failure in theorem.failing:
        found.setdefault(failure.reason, []).append(failure.operation)
    lines = []
    for reason, names in found.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{', '.join(names[:3])}{more}: {reason}" if any(names) else reason)
    return lines


def analyze(model: torch.nn.Module, example_input: Any, loss: Callable[[Any], Tensor] | None = None) -> Analysis:
    """Settle whatever can be settled from the architecture alone (Theorems 1, 4, 5, 6 and 8, and E4).

    Runs one forward pass on a copy of the model, in its present mode and with its present choice of trainable
    parameters; proxies are measured in the running torch. What it says about all steps holds for every input that leads
    to the same graph (batch size included).

    Args:
        model: any module, converted or not.
        example_input: a tensor, a sequence of positional arguments, or a mapping of keyword arguments.
        loss: from the model's output to the scalar loss; without it a smooth loss is assumed.

    Raises:
        AdcertError: if the model cannot be copied or run, or if its output does not depend on a trainable parameter.

    Example:
        >>> import torch, adcert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> adcert.analyze(model, torch.zeros(8, 4)).theorem
        'Theorem 4'
    """
    graph, watch = _look(model, example_input, loss)
    ops = [graph.record_of[node] for node in reversed(graph.nodes) if node in graph.record_of]
    order = order_layers({record: graph.tau(record) for record in ops})
    facts = {record: _facts(graph, order, record) for record in ops}
    problems = _problems(graph, watch)
    theorems = _theorems(order, facts, [Failure(problem) for problem in problems])
    always = next((theorem for theorem in theorems if theorem.holds == ALWAYS), None)
    settled = shifted(order, facts) if not problems else frozenset()
    operations = tuple(_operation(graph, order, record, facts[record], theorems, record in settled) for record in ops)
    same = "every step has the graph of this example: control flow, batch size, mode and trainable parameters"
    smooth = [] if loss is not None else ["the loss is smooth in the model's output"]
    return Analysis(
        always.name if always else "",
        always.claim if always else "",
        operations,
        theorems,
        tuple(problems),
        (same, *smooth, *watch.assumptions),
    )


def _look(model: torch.nn.Module, example: Any, loss: Callable[[Any], Tensor] | None) -> tuple[Graph, Watch]:
    """The recorded graph of one forward pass of a converted copy; the model and the random state stay as they are."""
    if not isinstance(model, torch.nn.Module):
        raise AdcertError(f"analyze needs a torch.nn.Module, got {type(model).__name__}")
    if running():
        raise AdcertError("a monitored step is running on this thread: analyze before it, or after")
    try:
        clone = copy.deepcopy(model)
    except Exception as error:
        raise AdcertError(f"the model cannot be copied ({type(error).__name__}: {error})") from error
    clone = convert(clone)
    args, kwargs = _arguments(example)
    recorder = Recorder({id(module): name for name, module in clone.named_modules()})
    watch = Watch(recorder, lambda roots, inputs, keep: None)
    devices = sorted({p.device.index for p in clone.parameters() if p.is_cuda})
    try:
        with (
            torch.random.fork_rng(devices, device_type="cuda"),
            torch.enable_grad(),
            recording(recorder),
            watch,
        ):
            output = clone(*args, **kwargs)
            output = output if loss is None else loss(output)
    except Exception as error:
        raise AdcertError(f"the model does not run on this example ({type(error).__name__}: {error})") from error
    roots = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    if not roots:
        raise AdcertError("the output depends on no trainable parameter: there is no gradient to speak of")
    return Graph(roots, recorder.records, Leaves(clone)), watch


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, Sequence) and not isinstance(example, str) else (example,)), {}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _facts(graph: Graph, order: Order[OpRecord], record: OpRecord) -> Facts:
    own = order.own[record]
    return facts_of(graph, record, own, bias_of(graph, record, own))


def _problems(graph: Graph, watch: Watch) -> list[str]:
    """What the audit says. Points where a smooth operation is singular depend on values: not here.

    A kink that nobody records can be touched on other data, whatever the guards say of this example.
    """
    problems = [text for text, flag in audit_graph(graph, watch) if flag is None or not bool(flag)]
    unseen = [node for node in graph.nodes if kind_of(node) in KINKS and node not in graph.record_of]
    problems += [f"{node.name()}{watch.origin(node)} has a kink that is not recorded" for node in unseen]
    problems += [
        f"{text}: autograd does not see this dependence" for node, text in watch.mixed if node in graph.position
    ]
    return list(dict.fromkeys([*problems, *watch.problems]))


def _theorems(order: Order[OpRecord], facts: dict[OpRecord, Facts], problems: list[Failure]) -> tuple[Theorem, ...]:
    conditions = failing(order, facts)
    claim = claim_of(facts.values())
    sides = [Failure("a proxy that is no one-sided derivative", f.name) for f in facts.values() if not _sided(f)]
    sides += [Failure("autodiff splits the gradient among tied units", f.name) for f in facts.values() if f.even]
    tied = [Failure(order.problem)] if order.problem else []
    rank = "where a layer touches a kink, its input's columns over the batch have to be independent"
    cases = [(name, "", claim, [*problems, *conditions[name]]) for name in STATIC]
    cases.insert(2, ("Theorem 5", rank, claim, [*problems, *conditions["Theorem 5"], *_columns(facts)]))
    cases.append(
        ("Theorem 8", "Algorithm 1: P_l of every layer must not be empty", "bouligand", problems + tied + sides)
    )
    cases.append(("Theorem E4", "one direction has to satisfy every touch and tie", "bouligand", problems + sides))
    if sides and not all(_sided(fact) for fact in facts.values()):
        even = [failure for failure in sides if "splits" in failure.reason]
        rows = "rows of touches with proxies between the one-sided derivatives have to be independent"
        cases.append(("Theorem E5", rows, "clarke", problems + tied + even + _outsiders(facts)))
    found = []
    for name, left, claimed, fails in cases:
        holds = PER_STEP if left else ALWAYS
        found.append(Theorem(name, NO, failing=tuple(fails)) if fails else Theorem(name, holds, claimed, left))
    return tuple(found)


def _sided(fact: Facts) -> bool:
    return all(kink.side for kink in fact.kinks)


def _outsiders(facts: dict[OpRecord, Facts]) -> list[Failure]:
    beyond = [fact for fact in facts.values() if any(kink.weight is None for kink in fact.kinks)]
    return [Failure("a proxy outside [D-, D+]", fact.name) for fact in beyond]


def _columns(facts: dict[OpRecord, Facts]) -> Iterator[Failure]:
    for fact in facts.values():
        if fact.matrix is not None and fact.matrix[1] > fact.matrix[2]:
            _, columns, features = fact.matrix
            yield Failure(f"{columns} columns of {features} entries are never independent", fact.name)


def _operation(
    graph: Graph, order: Order[OpRecord], record: OpRecord, fact: Facts, theorems: tuple[Theorem, ...], settled: bool
) -> Operation:
    names = [] if record.rho is None else [_activation(record.rho)]
    names += [] if record.ties is None else [_choice(record)]
    if fact.bias is not None:
        bias, leaf = fact.bias.kind, fact.bias.leaf
    else:
        bias, leaf = "partial" if partly_biased(graph, record, order.own[record]) else "none", ""
    first = next((theorem for theorem in theorems if theorem.holds != NO), None)
    theorem = first.name if first is not None else ""
    left: list[str] = []
    if first is None or first.holds != ALWAYS:
        left = (["touches"] if fact.kinks and not settled else []) + (["ties"] if fact.pooled else [])
        if first is not None and not left:  # its touches are settled all the same
            theorem = "Theorem 4" if bias == "distinct" else "Theorem 6"
    weights = tuple(None if kink.weight is None else float(kink.weight) for kink in fact.kinks)
    shape = record.input_shape
    return Operation(record.name, " + ".join(names), shape, bias, leaf, fact.kinks, weights, theorem, tuple(left))


def _activation(rho: Activation) -> str:
    return rho.name + (f"({', '.join(f'{value:g}' for value in rho.arguments)})" if rho.arguments else "")


def _choice(record: OpRecord) -> str:
    """ "max pooling", or the name of the node that chose: "max", "sort", ..."""
    return "max pooling" if isinstance(record.ties, Ties) else kind_of(record.node).removesuffix("Backward").lower()


def _table(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
