"""The allow-list of the audit: nodes of the graph that are analytic wherever their inputs are finite."""

from __future__ import annotations

from .movement import PARTS
from .normalization import BATCH_NORM

# Anything else unrecorded means UNDECIDED.
_NAMES = """
    Add Sub Rsub Mul Neg View UnsafeView ReshapeAlias Squeeze Unsqueeze Expand Permute Transpose T Slice
    Select Cat Stack Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Unbind ConstantPadNd Clone ToCopy Alias
    Flip Roll Rot90 Repeat Narrow Diagonal DiagEmbed Unfold Tril Triu Trace Im2Col Col2Im
    ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
    PixelShuffle PixelUnshuffle ChannelShuffle Index IndexSelect Gather Take Where MaskedFill MaskedSelect ScatterAdd
    IndexAdd Cumsum Mean Sum Convolution Addmm Mm Bmm Baddbmm Addbmm Mv Addmv Addr Dot Vdot Linear Addcmul Lerp
    Trilinear Prod Cumprod Exp Exp2 Expm1 Tanh Sigmoid Gelu Silu Mish Sin Cos Sinh Cosh Asinh
    Deg2Rad Rad2Deg NativeLayerNorm NativeGroupNorm LogSoftmax Softmax SafeSoftmax Logsumexp
    Logcumsumexp NllLoss NllLoss2D BinaryCrossEntropyWithLogits Var VarMean AvgPool2D
    AvgPool3D AvgPool1D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D NativeDropout UpsampleLinear1D
    UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D ScaledDotProductFlashAttentionForCpu
    ScaledDotProductFlashAttention ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention
"""
ANALYTIC = frozenset(f"{name}Backward" for name in _NAMES.split()) | BATCH_NORM.keys() | {"DiagonalBackward0_copy"}

#: Nodes that differentiate all of their outputs. Of others (the mean of a group normalisation) it may be dropped.
SEVERAL = PARTS | {"VarMeanBackward", "StdMeanBackward", "MkldnnRnnLayerBackward"}
