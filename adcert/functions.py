"""What torch's functions do, and what they and classes of tensors may hide from autograd: for :mod:`adcert.watch`."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import Parameter
from torch.nn import functional as F

# In C++, all they do is in the graph; in Python it may be anything.
_COMPILED = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
# In C++, with a clamp out of autograd's sight (below eps the function is not the one that is differentiated), or with
# branches on the values of their targets.
_HIDING = frozenset({"cosine_similarity", "poisson_nll_loss", "hinge_embedding_loss", "cosine_embedding_loss"})
# torch's functions written in Python run unseen inside; these hide no branch from the graph.
_TRANSPARENT = frozenset(
    """batch_norm group_norm instance_norm layer_norm rms_norm local_response_norm dropout dropout1d
    dropout2d dropout3d alpha_dropout feature_alpha_dropout softmax log_softmax softmin silu mish tanh
    sigmoid tanhshrink softsign glu gelu cross_entropy nll_loss mse_loss binary_cross_entropy
    binary_cross_entropy_with_logits kl_div l1_loss smooth_l1_loss huber_loss interpolate upsample embedding
    pad unfold fold multi_head_attention_forward scaled_dot_product_attention relu relu_ leaky_relu relu6
    hardtanh elu selu celu rrelu prelu hardswish hardsigmoid hardshrink softshrink threshold max_pool1d
    max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool2d
    adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d fractional_max_pool2d fractional_max_pool3d
    lp_pool1d lp_pool2d normalize linear bilinear einsum tensordot split norm meshgrid
    broadcast_tensors unflatten _max_pool1d _max_pool2d _max_pool3d __rsub__ __rdiv__ __rtruediv__ __rpow__
    __pow__ __ipow__ pow pow_ __rmatmul__ __iter__ __reversed__ atleast_1d atleast_2d atleast_3d block_diag
    cartesian_prod chain_matmul multilabel_soft_margin_loss""".split()
)
# In-place functions that are analytic in all they read; on a view autograd shows no more of them than CopySlices.
_ANALYTIC_WRITES = frozenset(
    getattr(Tensor, name)
    for name in """add_ sub_ subtract_ mul_ multiply_ neg_ negative_ copy_ zero_ fill_ masked_fill_ square_ exp_
    sin_ cos_ tanh_ sigmoid_ __iadd__ __isub__ __imul__""".split()
) | {torch.dropout_, torch.feature_dropout_, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.silu} | {
    F.pad  # circular padding copies into views
}

_DIVISIONS = frozenset({Tensor.div_, Tensor.divide_, Tensor.true_divide_, Tensor.__itruediv__})

# Their results depend on shapes, types and devices only, never on values.
VALUE_FREE = frozenset(
    """zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros new_ones new_empty size
    dim numel stride is_contiguous is_floating_point retain_grad requires_grad_ __repr__ __format__ __len__
    __hash__""".split()
)
GETTERS = frozenset(
    getattr(Tensor, name).__get__
    for name in """shape dtype device layout requires_grad is_leaf ndim itemsize nbytes grad_fn is_cuda is_cpu
    is_sparse is_quantized is_meta is_mkldnn is_nested _version output_nr""".split()
)
GRAD_FN = getattr(Tensor, "grad_fn").__get__  # noqa: B009 - the stubs know the value only
READS = frozenset(
    """item tolist numpy __bool__ __int__ __float__ __index__ __array__ __contains__ __dlpack__
    untyped_storage storage data_ptr""".split()
)
SWITCHES = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
# They hand out memory, or another tensor over it, that can be written to without a new version.
OPEN = frozenset(
    {
        getattr(Tensor, "data").__get__,  # noqa: B009 - the stubs know the value only
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.data_ptr,
        Tensor.storage,
        Tensor.untyped_storage,
    }
)
# They make ordinary numbers of infinite ones, which their nodes do not show.
SATURATING = frozenset("sigmoid sigmoid_ expit tanh tanh_ elu elu_ celu celu_".split())
HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook"})
# Their schemas do not say that they write running statistics, and autograd does not learn of it.
NORMS = frozenset(
    """batch_norm instance_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _batch_norm_impl_index""".split()
)
FUNCTIONAL_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training")
NATIVE_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training")
BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})
# They write in place, and leave the version of what they write as it is.
UNVERSIONED = frozenset("_fused_sgd_ _fused_adam_ _fused_adamw_ _fused_adagrad_ apply_ map_ map2_".split())


def opaque(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """May a call do what the graph does not show? True for every function that is not known."""
    if func is F.embedding:  # max_norm: it shortens rows of its weight, in place
        return (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None
    if isinstance(func, _COMPILED):
        return getattr(func, "__name__", "") in _HIDING
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        namespace, name = str(func).split(".")[:2]
        return namespace not in ("aten", "adcert", "prims") or name in _HIDING
    if isinstance(func, FunctionType) and func.__module__.split(".", 1)[0] == "torch":
        return func.__name__ not in _TRANSPARENT
    return True


def writes_analytically(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is the in-place function inside a CopySlices node of this call analytic, though the graph does not show it?"""
    if func is Tensor.__setitem__:  # a copy_ into a view; an index that is a tensor may name an element twice
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)
    if func in _DIVISIONS:
        by = args[1] if len(args) == 2 else None
        return not kwargs and type(by) in (int, float) and by != 0
    return func in _ANALYTIC_WRITES


_plain: dict[type, bool] = {Tensor: True, Parameter: True}


def plain(kind: type) -> bool:
    """Is a class of tensors torch's own in all it does with functions and operators?"""
    known = _plain.get(kind)
    if known is None:
        ours: Any = kind.__torch_function__  # type: ignore[attr-defined]
        usual: Any = Tensor.__torch_function__
        function = ours is torch._C._disabled_torch_function_impl or getattr(ours, "__func__", ours) is usual.__func__
        dispatch = kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
        known = _plain[kind] = function and dispatch
    return known


def named(value: object) -> str:
    """Module and name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def attribute_of(setter: Any) -> str:
    """Name of the attribute of tensors that a ``__set__`` belongs to, else ''."""
    return getattr(getattr(setter, "__self__", None), "__name__", "")
