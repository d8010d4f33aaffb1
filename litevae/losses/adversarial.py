"""The adversarial losses of Appendix D.1, and the adaptive weight of Equation 2."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AdversarialLoss = Literal["hinge", "logistic"]


def generator_loss(fake_logits: Sequence[Tensor], kind: AdversarialLoss) -> Tensor:
    """Returns the generator's loss: -f for hinge, softplus(-f) for logistic (non-saturating).

    Args:
        fake_logits: logits of the reconstruction, one tensor of any shape per head of the discriminator.
        kind: name of the loss.

    Returns:
        A scalar, the mean within each head, summed over the heads.
    """
    if kind == "hinge":
        return sum_over_heads(lambda fake: -fake, fake_logits)
    return sum_over_heads(lambda fake: F.softplus(-fake), fake_logits)


def discriminator_loss(
    real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor], kind: AdversarialLoss
) -> Tensor:
    """Returns the discriminator's loss.

    This is ½[relu(1 - r) + relu(1 + f)] for hinge and ½[softplus(-r) + softplus(f)] for logistic.

    Args:
        real_logits, fake_logits: logits of the image and of the detached reconstruction, one tensor of any
            shape per head.
        kind: name of the loss.

    Returns:
        A scalar, the mean within each head, summed over the heads.
    """
    if kind == "hinge":
        return sum_over_heads(
            lambda real, fake: 0.5 * (F.relu(1 - real) + F.relu(1 + fake)), real_logits, fake_logits
        )
    return sum_over_heads(
        lambda real, fake: 0.5 * (F.softplus(-real) + F.softplus(fake)), real_logits, fake_logits
    )


def sum_over_heads(loss: Callable[..., Tensor], *logits: Sequence[Tensor]) -> Tensor:
    """Returns the mean of `loss` within each head, summed over the heads."""
    return torch.stack([loss(*head).mean() for head in zip(*logits, strict=True)]).sum()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_weight: Tensor) -> Tensor:
    """Returns the weight of Equation 2 without its factor ½.

    This is |∇ reconstruction loss| / (|∇ adversarial loss| + 1e-4), at most 1e4. The bounds and the 1e-4 are
    those of VQGAN (Esser et al., 2021), which proposed the weight.

    Args:
        reconstruction_loss, adversarial_loss: scalars that depend on `last_weight`. Their graph is kept.
        last_weight: weight of the decoder's last convolution, with respect to which the gradients are taken.

    Returns:
        A scalar without a gradient.
    """
    norms = [
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].float().norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freezes the parameters of `module` in the block: what it computes there never gives them a gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
