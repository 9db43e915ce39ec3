"""Check this process's GPU. Print the problem and exit with 1, or exit with 0."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import torch

FREE_SHARE = 0.5
_SIZE = 512
_PATIENCE_SECONDS = 60


def find_problem() -> str:
    """Return the problem, empty if there is none."""
    node, visible = platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES")
    where = f"on {os.environ.get('SLURMD_NODENAME', node)}, CUDA_VISIBLE_DEVICES={visible}"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install a build with it"
    count = torch.cuda.device_count()
    if count == 0:
        hint = "is a GPU asked for (--gres)?" if visible is None else "is its driver well?"
        return (
            f"no GPU is visible to PyTorch (for CUDA {torch.version.cuda}) {where}; {hint} To "
            "compute on CPUs, add --device cpu"
        )
    if count > 1:
        return f"{count} GPUs are visible {where}; expected one for each worker (--gres gpu:1)"
    try:
        return _memory_problem() or _ecc_problem() or _arithmetic_problem()
    except RuntimeError as error:
        return f"the GPU fails {where}: {str(error).splitlines()[0]}"


def _memory_problem() -> str:
    free, total = torch.cuda.mem_get_info()
    if free < FREE_SHARE * total:
        return (
            f"only {free / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU's memory are free; "
            "another program is using it"
        )
    return ""


def _ecc_problem() -> str:
    """Ask the driver for memory errors that were not corrected since it was loaded."""
    if shutil.which("nvidia-smi") is None:
        return ""
    device = str(torch.cuda.get_device_properties(0).uuid)
    query = ["nvidia-smi", f"--id=GPU-{device.removeprefix('GPU-')}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            [*query, "--query-gpu=ecc.errors.uncorrected.volatile.total"],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"nvidia-smi does not answer within {_PATIENCE_SECONDS} s; the driver may hang"
    if answer.returncode:
        # Inside some containers it cannot see the device; arithmetic decides.
        return ""
    errors = answer.stdout.strip()
    if errors.isdigit() and int(errors) > 0:
        return f"the GPU had {errors} memory errors that could not be corrected (ECC)"
    return ""


def _arithmetic_problem() -> str:
    """Multiply matrices of small integers, whose product is exact in any precision."""
    left = (torch.arange(_SIZE * _SIZE) % 3 - 1).reshape(_SIZE, _SIZE).float()
    right = left.roll(1, dims=0).T.contiguous()
    if not torch.equal((left.cuda() @ right.cuda()).cpu(), left @ right):
        return "the GPU computes wrong products"
    return ""


if __name__ == "__main__":
    if problem := find_problem():
        print(problem)
        sys.exit(1)
