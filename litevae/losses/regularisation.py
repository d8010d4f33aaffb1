"""Regularisation of a discriminator: LeCam (Tseng et al., 2021) and R1 (Mescheder et al., 2018)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeCam:
    """LeCam regularisation, which keeps the logits near their averages over the steps.

    With r and f the logits of images and of reconstructions, and R and F their averages, the term is

        mean relu(r - F)² + mean relu(R - f)²,

    summed over the heads of the discriminator. The relu is that of the authors' code; Tseng et al. (2021) print the
    formula without it. The averages begin with the means of the first step, in which the term is 0.

    Args:
        decay: decay of the averages per step.

    Attributes:
        averages: (2, number of heads), the averages R and F; None before the first update.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: Tensor | None = None
        self.seen: list[Tensor] = []

    def __call__(self, real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
        """Returns the term, a scalar, and notes the means of the logits for `means`.

        Args:
            real_logits, fake_logits: logits of the image and of the detached reconstruction, one float32 tensor per
                head.
        """
        means = [torch.stack([head.detach().mean() for head in each]) for each in (real_logits, fake_logits)]
        self.seen.append(torch.stack(means))
        if self.averages is None:
            return 0 * real_logits[0].mean()
        terms = [
            F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()
            for real, fake, average_real, average_fake in zip(
                real_logits, fake_logits, *self.averages, strict=True
            )
        ]
        return torch.stack(terms).sum()

    def means(self) -> Tensor:
        """Returns the means of the logits since the last call, (2, heads); each call of the module counts once."""
        means = torch.stack(self.seen).mean(dim=0)
        self.seen = []
        return means

    def update(self, means: Tensor) -> None:
        """Moves the averages towards the means of a step, (2, heads)."""
        self.averages = means if self.averages is None else means.lerp(self.averages, self.decay)


@torch.compiler.disable  # AOTAutograd does not differentiate twice
def gradient_penalty(discriminator: nn.Module, image: Tensor) -> Tensor:
    """Returns R1's mean over the images of |∇ D(x)|², without its factor γ/2, in float32 even under autocast.

    Args:
        discriminator: module that returns a tuple of logits.
        image: real images (N, 3, H, W).
    """
    with torch.autocast(image.device.type, enabled=False):
        image = image.detach().float().requires_grad_()
        logits = torch.stack([head.sum() for head in discriminator(image)]).sum()
        (gradient,) = torch.autograd.grad(logits, image, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()
