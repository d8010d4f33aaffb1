"""Self-modulated weights in plain PyTorch: the oracle, and the fallback. Autograd differentiates it as it stands."""

import torch
from torch import Tensor

from litevae_kernels.tensors import accumulate_dtype, to_format


def modulate(
    weight: Tensor, scale: Tensor, gain: Tensor | None, eps: float, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Returns the weight of Equation 3, in the shape (C_out, C_in / groups, K_h, K_w) of `weight`."""
    # In half precision, squares of small weights would underflow and their reciprocals overflow.
    wide = accumulate_dtype(weight.dtype, dtype)
    groups = scale.shape[0] // weight.shape[1]
    # (C_in) -> (C_out, C_in / groups, 1, 1): a filter only sees the input channels of its group.
    scales = scale.to(wide).view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    scaled = weight.to(wide) * scales[:, :, None, None]
    # At zero, vector_norm has the subgradient zero, while the derivative of sqrt is infinite.
    norm = torch.linalg.vector_norm(scaled, dim=(1, 2, 3), keepdim=True)
    factor = (norm + eps).reciprocal() if gain is None else gain.to(wide) / (norm + eps)
    return to_format(scaled * factor, dtype, channels_last)
