"""Models that ``torch.distributed.fsdp.fully_shard`` has sharded (FSDP2): the step's leaves are whole parameters.

Before a module runs, FSDP gathers its parameters into plain tensors of their full shapes, which autograd takes for
leaves, and afterwards it averages their gradients over the ranks and keeps a shard of each. So a step is one of data
parallel training, if the whole parameters are still there when a backward pass begins, equal to the shards, and if all
ranks gather and average the same things in the same order: collectives have no names. Everything else is a reason.

What torch promises of the collectives themselves is trusted; its private names are read here and nowhere else, and a
torch without them ends in an error, hence undecided.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gradients import Sample, sampled
from .layers import ACCUMULATE, Leaves
from .nodes import Links, Node
from .transfer import Arrival, follow
from .watch import Watch

_HOME = "torch.distributed.fsdp._fully_shard"
_SLOT: Any = getattr(Tensor, "grad")  # noqa: B009 - the stubs know the value only
_GRAD = frozenset({_SLOT.__get__, _SLOT.__set__, _SLOT.__delete__})


def is_sharded(model: torch.nn.Module) -> bool:
    """Did ``fully_shard`` see some module of the model?"""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and any(isinstance(each, kind) for each in model.modules())


class Shards:
    """What FSDP does with a model's parameters, as one step sees it.

    ``ranks``: those that certify together, if they are not just FSDP's.
    """

    def __init__(self, model: torch.nn.Module, ranks: list[int] | None = None) -> None:
        self._model = model
        self._ranks = ranks
        self._versions: list[tuple[int, int, int]] = []  # of the shards, before the first backward pass
        self._names: dict[str, Any] = {}  # FSDP's parameters by the model's names
        self._common: list[Tensor] = []
        self._outputs: set[int] = set()
        kind: Any = sys.modules["torch.distributed.fsdp"].FSDPModule
        states = [each._get_fsdp_state() for each in model.modules() if isinstance(each, kind)]
        self._states = list({id(state): state for state in states}.values())
        self._before = len(self._order()) if isinstance(model, kind) else 0

    def group(self) -> Any:
        """The process group that averages the gradients."""
        return self._groups()[0].mesh_info.shard_process_group

    def harmless(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Is a call FSDP's own hook, which gathers parameters and leaves the gradient alone, or access to ``.grad``?

        Or what makes room for gathered parameters, whose values are compared later.
        """
        if func in _GRAD:
            return bool(args) and type(args[0]) is sys.modules["torch.distributed.tensor"].DTensor
        if func is Tensor.untyped_storage:
            if id(args[0]) not in self._outputs:
                self._outputs = {id(t) for p in self._parameters() for t in p.all_gather_outputs}
            return id(args[0]) in self._outputs
        hook: Any = args[1] if func is Tensor.register_hook and len(args) == 2 else None
        if getattr(hook, "__func__", None) is not _private("_fsdp_state").FSDPState._pre_backward:
            return False
        return any(hook.__self__ is state for state in self._states)

    def enter(self, roots: Sequence[Tensor], inputs: Any, leaves: Leaves, watch: Watch) -> str:
        """Before a backward pass: why it is not certified, or "", and then the graph is one of whole parameters.

        They bear the model's names in ``leaves``, and edges lead past FSDP's own nodes, which are the identity.
        """
        reason = self.setting() or self._problem(inputs, watch)
        if reason:
            return reason
        self._names = {leaves.stand_in(p._unsharded_param, _forms(p)): p for p in self._parameters()}
        if "" in self._names:
            return "FSDP has gathered parameters that are not the model's: not supported"
        for name, p in self._names.items():
            if p.sharded_param._backward_hooks or p.sharded_param._post_accumulate_grad_hooks:
                watch.assumptions[f"hooks on {name} may change its gradient afterwards"] = None
        for text, flag in self._unequal():
            if flag is None:
                return text
            watch.flags.append((text, flag))
        nodes = [tensor.grad_fn for tensor in roots if tensor.grad_fn is not None]
        told = bytearray(self._unfold(leaves, watch.recorder.links, nodes).encode())
        follow(watch.recorder.streams)
        wholes = (p._unsharded_param for p in self._parameters())
        self._common += [torch.frombuffer(told, dtype=torch.uint8), *sampled(wholes)]
        return ""

    def sample(self) -> Sample:
        """What the ranks must have in common: the whole parameters, what was gathered and averaged, in which order."""
        return Sample("", Arrival(self._common, patient=True))

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """This rank's shards of the averaged gradients, by the parameters' names."""
        for name, p in self._names.items():
            grad = p.sharded_param.grad
            if p.sharded_param.requires_grad:
                yield name, None if grad is None else grad._local_tensor

    def left(self) -> str:
        """After all backward passes: why the shards' gradients are not those of the step, or ""."""
        if self._names and all(grad is None for _, grad in self.gradients()):
            return "no gradient was accumulated: FSDP averages none"
        return self._pending()

    def setting(self) -> str:
        """Why steps of a model that is sharded like this are not certified, or ""."""
        if not isinstance(self._model, sys.modules["torch.distributed.fsdp"].FSDPModule):
            return "FSDP shards parts of the model: call fully_shard on the whole model that the monitor gets, too"
        api, state = _private("_fsdp_api"), _private("_fsdp_state").FSDPState
        collectives, kind = _private("_fsdp_collectives"), _private("_fsdp_param_group").FSDPParamGroup
        if any(type(each) is not state for each in self._states):
            return "parameters are replicated by FSDP: not supported, use DistributedDataParallel"
        groups = self._groups()
        if not groups or not all(type(group) is kind and _whole_mesh(group) for group in groups):
            return "FSDP shards over more than one dimension of a mesh (HSDP, tensor parallel): not supported, use one"
        policies = (*(group.mp_policy for group in groups), *(each._mp_policy for each in self._states))
        if any(p.param_dtype or p.reduce_dtype or p.output_dtype for p in policies):
            return "FSDP has a MixedPrecisionPolicy: not supported, leave it out (autocast can be followed)"
        for group in groups:
            if type(group.offload_policy) is not api.OffloadPolicy:
                return "FSDP offloads parameters to the host: not supported, leave offload_policy out"
            comms = (type(group._all_gather_comm), type(group._reduce_scatter_comm))
            if comms != (collectives.DefaultAllGather, collectives.DefaultReduceScatter) or group._all_reduce_hook:
                return "FSDP has communication or a hook of its own, which may change the gradient: not supported"
            if group.gradient_divide_factor is not None:
                return "FSDP's set_gradient_divide_factor makes the gradient something else than the mean: leave it out"
            found = dist.get_process_group_ranks(group.mesh_info.shard_process_group)
            if found != dist.get_process_group_ranks(self.group()) or found != (self._ranks or found):
                return "FSDP shards over other ranks than those that certify together: not supported"
        parameters = list(self._parameters())
        if any(type(p._sharded_local_tensor) is not Tensor or p.is_dtensor for p in parameters):
            return "FSDP shards parameters of a class of their own, or distributed tensors: not supported"
        managed = {id(found) for each in parameters for found in _forms(each)}
        alone = [name for name, p in self._model.named_parameters() if p.requires_grad and id(p) not in managed]
        return f"FSDP does not average the gradient of {alone[0]} (ignored_params): freeze it" if alone else ""

    def _problem(self, inputs: Any, watch: Watch) -> str:
        """Why the whole parameters, or averages, of a backward pass that begins now are not to be had, or ""."""
        if inputs is not None:
            return "FSDP does not average what autograd.grad or backward(inputs=...) return: call backward()"
        if watch.dropped:
            return "torch.utils.checkpoint under FSDP runs modules again while gradients are averaged: not supported"
        if not all(_passes(node) for node, _ in watch.recorder.links):
            return "compiled programs under FSDP: not supported"
        groups = self._groups()
        if any(group.post_forward_mesh_info is not None for group in groups):
            return (
                "FSDP frees whole parameters after the forward pass, before the step's rows are made: "
                "call fully_shard(..., reshard_after_forward=False) on every module"
            )
        reducing = all(group.reduce_grads for group in groups)
        if not reducing or not self._model._get_fsdp_state()._state_ctx.is_last_backward:  # type: ignore[operator]
            return "FSDP does not average this backward pass's gradient (set_requires_gradient_sync): not supported"
        for group in groups:
            if not group.is_unsharded:
                return (
                    f"FSDP has not gathered the parameters of {group._module_fqn or 'the model'} when backward begins: "
                    "it did not run, or this is a second backward pass after one forward pass (add the losses up)"
                )
        ran = self._ran()
        again = next((name for name in ran if ran.count(name) > 1), None)
        if again is not None:
            return (
                f"FSDP would gather the parameters of {again or 'the model'} again while backward runs, as it has run "
                "more than once: call backward() after each forward pass, and no fully_shard on what is used twice"
            )
        if any(p._unsharded_param._version for p in self._parameters()):
            return "a parameter that FSDP has gathered was written to: write to the shards, between steps"
        both = [(p._sharded_local_tensor, p.sharded_param) for p in self._parameters()]
        versions = [(id(mine), mine._version, shard._version) for mine, shard in both]
        self._versions = self._versions or versions
        changed = "a parameter was modified after its first use in the step"
        return self._pending() or ("" if versions == self._versions else changed)

    def _pending(self) -> str:
        for p in self._parameters():
            whole = getattr(p, "_unsharded_param", None)
            if p.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
                return f"FSDP has not averaged a gradient of {p._param_fqn} (set_requires_gradient_sync): not supported"
        return ""

    def _unequal(self) -> Iterator[tuple[str, Tensor | None]]:
        """What was gathered from this rank is not its shard: a reason, on a device with a flag that says it is."""
        for name, p in self._names.items():
            mine, group = p._sharded_local_tensor.detach(), p.mesh_info.shard_process_group
            whole, dim = p._unsharded_param.detach(), p.fsdp_placement.dim
            size = -(-whole.size(dim) // dist.get_world_size(group))
            start = min(dist.get_rank(group) * size, whole.size(dim))
            good = (whole.narrow(dim, start, mine.size(dim)) == mine).all()
            if good.is_cuda or not bool(good):
                yield f"{name}, as FSDP has gathered it, is not what the ranks hold", good if good.is_cuda else None

    def _unfold(self, leaves: Leaves, links: Links, roots: Sequence[Node]) -> str:
        """Links around FSDP's nodes. Returns what was gathered and will be averaged, in which order."""
        passed: list[tuple[int, str]] = []
        reached: set[str] = set()
        seen = set(roots)
        stack = list(seen)
        while stack:
            node = stack.pop()
            sources = node.next_functions
            if node.name() == ACCUMULATE:
                reached.add(leaves.name(node.variable))
            elif _passes(node) and len(sources) == len(node._input_metadata):
                passed.append((node._sequence_nr(), str(node.param_group._module_fqn)))
                links.update({(node, number): edge for number, edge in enumerate(sources)})
            for source, _ in sources:
                if source is not None and source not in seen:
                    seen.add(source)
                    stack.append(source)
        return repr((self._ran(), [name for _, name in sorted(passed)], sorted(reached)))

    def _ran(self) -> list[str]:
        """The modules that have run since the step began, or the last backward pass, in their order."""
        self._before = min(self._before, len(self._order()))
        return [str(group._module_fqn) for group in self._order()[self._before :]]

    def _order(self) -> list[Any]:
        """FSDP's own list, which it makes in the first forward pass and clears when backward ends."""
        context = self._model._get_fsdp_state()._comm_ctx  # type: ignore[operator]
        return getattr(context, "post_forward_order", [])

    def _groups(self) -> list[Any]:
        return [group for state in self._states for group in state._fsdp_param_groups]

    def _parameters(self) -> Iterator[Any]:
        return (p for group in self._groups() for p in group.fsdp_params)


def _whole_mesh(group: Any) -> bool:
    """Is a group sharded over all of a mesh of one dimension?"""
    info = group.mesh_info
    return type(info) is _private("_fsdp_common").FSDPMeshInfo and info.mesh.ndim == 1 and not info.is_spmd_mesh


def _passes(node: Node) -> bool:
    """FSDP's node that averages a module's gradients when backward has come to its inputs: the identity."""
    return getattr(node, "_forward_cls", None) is _private("_fsdp_param_group").RegisterPostBackwardFunction


def _forms(p: Any) -> tuple[Tensor, ...]:
    """The parameters a module may hold at some time: the sharded one, and the whole one once it was gathered."""
    whole = getattr(p, "_unsharded_param", None)
    return (p.sharded_param,) if whole is None else (p.sharded_param, whole)


def _private(name: str) -> Any:
    return sys.modules[f"{_HOME}.{name}"]
