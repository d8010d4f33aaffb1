"""GroupNorm+SiLU in plain PyTorch: the oracle, and the fallback. Autograd differentiates it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.tensors import accumulate_dtype, is_channels_last, to_format


def forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    offset: Tensor | None = None,
) -> Tensor:
    """Returns (N, C + C_skip, H, W) for `x` (N, C, H, W) and `skip` (N, C_skip, H, W)."""
    wide = accumulate_dtype(x.dtype)
    joined = x if skip is None else torch.cat([x, skip], 1)
    if offset is not None:
        joined = joined.to(wide) + offset.to(wide)[:, None, None]
    if joined.numel() == 0:
        z = joined.to(wide)
    else:
        # not F.group_norm, which refuses groups of one value and loses digits at a large mean
        groups = joined.to(wide).reshape(x.shape[0], num_groups, -1)
        centred = groups - groups.mean(2, keepdim=True)
        z = (centred * torch.rsqrt(centred.square().mean(2, keepdim=True) + eps)).view(joined.shape)
    if weight is not None:
        z = z * weight.to(wide)[:, None, None]
    if bias is not None:
        z = z + bias.to(wide)[:, None, None]
    return to_format(F.silu(z), x.dtype, is_channels_last(x))
