"""The training objective: the weighted sum of the losses."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from litevae.losses.gaussian import gaussian_loss
from litevae.losses.kl import kl_loss
from litevae.losses.reconstruction import l1_loss
from litevae.losses.wavelet import wavelet_loss


@dataclass
class LossWeights:
    """Weight of each term. A term of weight 0 is neither computed nor reported.

    The paper does not print its weights. 0.01, 1.0 and 0.5 for kl, wavelet and gaussian are what the public
    re-implementation reports.
    """

    l1: float = 1.0
    kl: float = 0.01
    wavelet: float = 1.0
    gaussian: float = 0.5


@dataclass(frozen=True)
class Loss:
    """`total`: the weighted sum, a float32 scalar to differentiate. `terms`: each term by name, unweighted."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Computes `Loss` from a batch, its reconstruction and its posterior.

    Args:
        weights: weight of each term.
    """

    def __init__(self, weights: LossWeights) -> None:
        self.weights = {name: weight for name, weight in asdict(weights).items() if weight != 0}

    def __call__(self, image: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor) -> Loss:
        """The loss of one batch, in float32 whatever autocast does.

        Args:
            image, reconstruction: (N, C, H, W), the image in [-1, 1].
            mean, logvar: (N, n_z, h, w), the posterior's.
        """
        with torch.autocast(image.device.type, enabled=False):
            image, reconstruction = image.float(), reconstruction.float()
            mean, logvar = mean.float(), logvar.float()
            compute = {
                "l1": lambda: l1_loss(image, reconstruction),
                "kl": lambda: kl_loss(mean, logvar),
                "wavelet": lambda: wavelet_loss(image, reconstruction),
                "gaussian": lambda: gaussian_loss(image, reconstruction),
            }
            terms = {name: compute[name]() for name in self.weights}
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return Loss(total, {name: term.detach() for name, term in terms.items()})
