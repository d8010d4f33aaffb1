"""Pixel-wise reconstruction losses."""

import torch.nn.functional as F
from torch import Tensor


def l1_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Returns mean |reconstruction - image| over two (N, C, H, W) tensors, a scalar."""
    return F.l1_loss(reconstruction, image)


def l2_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Returns mean (reconstruction - image)² over two (N, C, H, W) tensors, a scalar."""
    return F.mse_loss(reconstruction, image)
