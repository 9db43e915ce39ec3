"""Environment variables by which a number could depend on where it was computed.

What a process sets through PyTorch, `daskcurv.estimators.precision` sets back for its computations.
The libraries below PyTorch read environment variables once, when they are loaded, and some of these
let float32 products be computed in less than float32 on processors that gain from it. The program
removes those before it loads them, and so from its workers' environment. Others only choose among
instructions, as another processor would: the last bits change, which moves a curvature by 1e-7 in
the median and by up to 1e-3 where a rounding decides a kink. Those are left alone, since they also
serve to make unlike machines agree, and named.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

LOWERS_PRECISION = (
    "DNNL_DEFAULT_FPMATH_MODE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCHINDUCTOR_USE_FAST_MATH",
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG",
    "TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG",
)
CHANGES_ROUNDING = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_CPU_ISA_HINTS",
    "ONEDNN_CPU_ISA_HINTS",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_DISABLE_FAST_MM",
    "MKL_ENABLE_INSTRUCTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "TORCH_CUDNN_V8_API_DISABLED",
    "TORCH_LINEAR_FLATTEN_3D",
    "TORCH_MKLDNN_MATMUL_MIN_DIM",
    "TORCH_MKLDNN_MATMUL_MIN_SIZE",
)

_removed: dict[str, str] = {}


def remove_from(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove the variables that lower the precision of float32.

    Parameters
    ----------
    environment : mapping, optional
        By default this process's. Libraries that are loaded already have read it; processes that
        are started from now on have not.
    """
    for name in LOWERS_PRECISION:
        if name in environment:
            _removed[name] = environment.pop(name)


def neutralised() -> list[str]:
    """Return a sentence for each variable that was removed."""
    return [
        f"{name}={value} would change the precision of float32; it is removed for this program and "
        "its workers, but not for other programs that call daskcurv.score_samples"
        for name, value in _removed.items()
    ]


def remaining() -> list[str]:
    """Return a sentence for each variable that is set and changes rounding."""
    return [
        f"{name}={os.environ[name]} changes the last bits of results, like a different processor; "
        "unset it, or use the same value for the whole store"
        for name in CHANGES_ROUNDING
        if name in os.environ
    ]


def suspects() -> str:
    """Return the variables that may explain why float32 is not computed as such."""
    found = [name for name in LOWERS_PRECISION if name in os.environ]
    return ", ".join(found or LOWERS_PRECISION[:3])
