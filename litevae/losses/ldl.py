"""The locally discriminative learning (LDL) loss of Appendix D.1 (Liang et al., 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS = 3  # radius of the 7x7 window


def ldl_loss(image: Tensor, reconstruction: Tensor, ema_reconstruction: Tensor) -> Tensor:
    """Returns the mean of w·|x - x̂|, where the weight w marks likely artifacts of adversarial training.

    With the residual R = Σ_c |x - x̂| of a pixel, w = var(R)^(1/5) · var_7x7(R), the unbiased variances over
    the whole image and over the window around the pixel, with mirrored borders. w is 0 where R is smaller
    than the EMA model's residual. No gradient flows through w.

    Args:
        image, reconstruction: images (N, C, H, W) with H and W at least 4.
        ema_reconstruction: reconstruction by the exponential moving average of the model, in the same shape.

    Returns:
        A scalar, the mean over all elements. It is zero if the images are equal. The LDL paper's images are
        in [0, 1]; in [-1, 1] the residual is twice as large and the loss 2^3.4 = 10.6 times as large.
    """
    with torch.no_grad():
        residual = (image - reconstruction).abs().sum(1, keepdim=True)
        ema_residual = (image - ema_reconstruction).abs().sum(1, keepdim=True)
        window = 2 * RADIUS + 1
        windows = F.pad(residual, [RADIUS] * 4, mode="reflect").unfold(2, window, 1).unfold(3, window, 1)
        weight = residual.var(dim=(1, 2, 3), keepdim=True) ** 0.2 * windows.var(dim=(-1, -2))
        weight = weight.masked_fill(residual < ema_residual, 0)
    return (weight * (image - reconstruction).abs()).mean()
