"""Self-modulated weights in plain PyTorch: the oracle, and the fallback. Differentiable as it stands."""

import torch
from torch import Tensor

from litevae_kernels.tensors import accumulate_dtype, to_format


def modulate(
    weight: Tensor, scale: Tensor, gain: Tensor | None, eps: float, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Equation 3; shape of `weight` (C_out, C_in / groups, K_h, K_w)."""
    # squares of small half-precision weights underflow, and their reciprocals overflow
    wide = accumulate_dtype(weight.dtype, dtype)
    groups = scale.shape[0] // weight.shape[1]
    # (C_in) -> (C_out, C_in / groups, 1, 1): a filter sees the input channels of its group only
    scales = scale.to(wide).view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    scaled = weight.to(wide) * scales[:, :, None, None]
    # vector_norm has subgradient zero at zero, where the derivative of sqrt is infinite
    norm = torch.linalg.vector_norm(scaled, dim=(1, 2, 3), keepdim=True)
    factor = (norm + eps).reciprocal() if gain is None else gain.to(wide) / (norm + eps)
    return to_format(scaled * factor, dtype, channels_last)
