"""The modules and functions that difference propagation has rules for, by the kind of rule."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
LINEAR_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
)  # fmt: skip
POINTWISE_MODULES = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardshrink, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
SMOOTH_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

RECTIFY: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
NO_CHANGE: set[Any] = {"clone", "contiguous"}
DROPOUT: set[Any] = {F.alpha_dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
RESHAPE: set[Any] = {
    torch.flatten, torch.reshape, torch.squeeze, torch.unflatten, torch.unsqueeze,
    "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view",
}  # fmt: skip
LINEAR: set[Any] = {
    torch.mean, torch.sum, torch.neg, operator.neg, torch.permute, torch.transpose,
    torch.movedim, torch.swapaxes, torch.flip, torch.roll, torch.narrow, torch.select,
    torch.index_select, torch.repeat_interleave, F.pixel_shuffle, F.pixel_unshuffle,
    F.channel_shuffle, F.unfold, F.interpolate,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    "mean", "sum", "neg", "permute", "transpose", "movedim", "swapaxes", "flip", "roll", "narrow",
    "select", "index_select", "repeat_interleave",
}  # fmt: skip
SPLIT: set[Any] = {
    torch.chunk, torch.split, torch.tensor_split, torch.unbind,
    "chunk", "split", "tensor_split", "unbind",
}  # fmt: skip
JOIN: set[Any] = {torch.cat, torch.concat, torch.concatenate}
MATRIX_PRODUCT: set[Any] = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"}
SOFTMAX: set[Any] = {F.softmax, torch.softmax, "softmax"}
SMOOTH: set[Any] = {
    F.group_norm, F.instance_norm, F.layer_norm, F.local_response_norm, F.log_softmax,
    F.normalize, F.rms_norm, torch.log_softmax, "log_softmax",
}  # fmt: skip
POINTWISE: set[Any] = {
    F.celu, F.elu, F.gelu, F.hardshrink, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu,
    F.logsigmoid, F.mish, F.relu6, F.selu, F.silu, F.softplus, F.softshrink, F.softsign, F.tanh,
    F.tanhshrink, F.sigmoid, torch.tanh, torch.sigmoid, torch.exp, torch.sin, torch.cos,
    torch.erf, torch.abs, torch.clamp, torch.log, torch.pow, torch.reciprocal, torch.rsqrt,
    torch.sqrt, torch.square, operator.pow,
    "abs", "clamp", "exp", "log", "pow", "reciprocal", "rsqrt", "sigmoid", "sqrt", "square",
    "tanh",
}  # fmt: skip
ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "+"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "-"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "*"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "/"),
}
IN_PLACE: set[Any] = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
SIZE_ARITHMETIC: set[Any] = {operator.add, operator.sub, operator.mul, operator.floordiv}
FIXED_ATTRIBUTES = ("ndim", "dtype", "device")
FIXED_METHODS = ("dim", "ndimension")
