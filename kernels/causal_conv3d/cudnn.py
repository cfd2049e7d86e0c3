"""Which versions of cuDNN must not be asked for 3D convolutions; sources in docs/kernels.md."""

import torch
from torch import Tensor

# As torch.backends.cudnn.version() counts: from 9.8 on, mended in 9.15.
_FIRST_WRONG, _FIRST_RIGHT = 90800, 91500
_HALVES = (torch.bfloat16, torch.float16)


def objection(x: Tensor, weight: Tensor) -> str | None:
    """Why cuDNN must not convolve x (B, C, T, H, W) with weight; None when it may."""
    if x.device.type != "cuda" or x.dtype not in _HALVES or weight.shape[2:].numel() == 1:
        return None
    version = torch.backends.cudnn.version()
    # On other makers' GPUs the number is that of another library.
    if torch.version.cuda is None or version is None:
        return None
    if not _FIRST_WRONG <= version < _FIRST_RIGHT:
        return None
    name = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    package = f"nvidia-cudnn-cu{torch.version.cuda.split('.')[0]}"
    return (
        f"cuDNN {name} returns wrong values for some large 3D convolutions in {x.dtype}: install "
        f"9.15 or later (pip install '{package}>=9.15')"
    )
