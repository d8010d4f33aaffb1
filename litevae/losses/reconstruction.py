"""Pixel-wise reconstruction losses."""

import torch.nn.functional as F
from torch import Tensor


def l1_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """mean |reconstruction - image|: two (N, C, H, W) tensors to a scalar. Zero where they are equal."""
    return F.l1_loss(reconstruction, image)


def l2_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """mean (reconstruction - image)²: two (N, C, H, W) tensors to a scalar. Zero where they are equal."""
    return F.mse_loss(reconstruction, image)
