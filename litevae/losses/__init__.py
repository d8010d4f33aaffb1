"""Training losses: every term is a mean per element, so its weight means the same at every resolution."""

from litevae.losses.gaussian import gaussian_loss
from litevae.losses.kl import kl_loss
from litevae.losses.objective import Loss, LossWeights, Objective
from litevae.losses.reconstruction import l1_loss
from litevae.losses.wavelet import wavelet_loss

__all__ = ["Loss", "LossWeights", "Objective", "gaussian_loss", "kl_loss", "l1_loss", "wavelet_loss"]
