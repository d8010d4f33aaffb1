"""Training losses. Each is a mean per element, so that its weight means the same at every resolution."""

from litevae.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss
from litevae.losses.gaussian import gaussian_loss
from litevae.losses.kl import kl_loss
from litevae.losses.ldl import ldl_loss
from litevae.losses.objective import (
    RECONSTRUCTION_TERMS,
    RGB_TERMS,
    TEACHER_TERMS,
    TERMS,
    Loss,
    LossConfig,
    Objective,
    least_side,
    sum_terms,
)
from litevae.losses.perceptual import LPIPS, ESRGANLoss
from litevae.losses.reconstruction import l1_loss, l2_loss
from litevae.losses.regularisation import LeCam, gradient_penalty
from litevae.losses.st_lpips import STLPIPS
from litevae.losses.teacher import teacher_kl_loss
from litevae.losses.wavelet import wavelet_loss

__all__ = [
    "LPIPS",
    "RECONSTRUCTION_TERMS",
    "RGB_TERMS",
    "STLPIPS",
    "TEACHER_TERMS",
    "TERMS",
    "ESRGANLoss",
    "LeCam",
    "Loss",
    "LossConfig",
    "Objective",
    "adaptive_weight",
    "discriminator_loss",
    "gaussian_loss",
    "generator_loss",
    "gradient_penalty",
    "kl_loss",
    "l1_loss",
    "l2_loss",
    "ldl_loss",
    "least_side",
    "sum_terms",
    "teacher_kl_loss",
    "wavelet_loss",
]
