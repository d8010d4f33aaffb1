"""The adversarial losses of Appendix D.1, and the weight of Equation 2."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AdversarialLoss = Literal["hinge", "logistic"]


def generator_loss(fake_logits: Sequence[Tensor], kind: AdversarialLoss) -> Tensor:
    """-f for hinge, softplus(-f) for logistic (non-saturating): the mean within a head, summed over heads.

    Args:
        fake_logits: a discriminator's logits of the reconstruction, one tensor of any shape a head.

    Returns:
        A scalar.
    """
    if kind == "hinge":
        return over_heads(lambda fake: -fake, fake_logits)
    return over_heads(lambda fake: F.softplus(-fake), fake_logits)


def discriminator_loss(
    real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor], kind: AdversarialLoss
) -> Tensor:
    """½[relu(1 - r) + relu(1 + f)] for hinge, ½[softplus(-r) + softplus(f)] for logistic.

    Args:
        real_logits, fake_logits: logits of the image and of the detached reconstruction, one tensor of any
            shape a head.

    Returns:
        A scalar, the mean within a head, summed over heads.
    """
    if kind == "hinge":
        return over_heads(
            lambda real, fake: 0.5 * (F.relu(1 - real) + F.relu(1 + fake)), real_logits, fake_logits
        )
    return over_heads(
        lambda real, fake: 0.5 * (F.softplus(-real) + F.softplus(fake)), real_logits, fake_logits
    )


def over_heads(loss: Callable[..., Tensor], *logits: Sequence[Tensor]) -> Tensor:
    """The mean of `loss` within each head, summed over the heads."""
    return torch.stack([loss(*head).mean() for head in zip(*logits, strict=True)]).sum()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_weight: Tensor) -> Tensor:
    """|∇ reconstruction loss| / (|∇ adversarial loss| + 1e-4), at most 1e4: Equation 2 without its ½.

    The bounds and the 1e-4 are those of VQGAN (Esser et al., 2021), on which the paper builds.

    Args:
        reconstruction_loss, adversarial_loss: scalars whose graph holds `last_weight`, and is kept.
        last_weight: what the gradients are of, the weight of the decoder's last convolution.

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
    """What `module` computes inside gives its parameters no gradient, whenever backward runs."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
