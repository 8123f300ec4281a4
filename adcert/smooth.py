"""The allow-list of the audit: nodes of the graph that are analytic wherever their inputs are finite."""

from __future__ import annotations

from .normalization import BATCH_NORM

# Anything else unrecorded means UNDECIDED.
_NAMES = """
    Add Sub Rsub Mul Neg View UnsafeView ReshapeAlias Squeeze Unsqueeze Expand Permute Transpose T Slice
    Select Cat Stack Split SplitWithSizes Unbind ConstantPadNd Clone ToCopy Alias Flip Roll Repeat Narrow
    Diagonal AsStrided Convolution Addmm Mm Bmm Baddbmm Addbmm Mv Dot Linear Mean Sum Exp Expm1 Tanh
    Sigmoid LogSigmoid Gelu Silu Sin Cos Erf NativeLayerNorm NativeGroupNorm LogSoftmax Softmax NllLoss
    NllLoss2D MseLoss BinaryCrossEntropyWithLogits AvgPool2D AvgPool3D AvgPool1D AdaptiveAvgPool2D
    MkldnnAdaptiveAvgPool2D Index IndexSelect Gather Where MaskedFill NativeDropout UpsampleBilinear2D
    UpsampleNearest2D PixelShuffle ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention
    ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention SafeSoftmax Logsumexp
"""
ANALYTIC = frozenset(f"{name}Backward" for name in _NAMES.split()) | BATCH_NORM.keys()
