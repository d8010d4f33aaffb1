"""The training objective, the weighted sum of the losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from litevae.errors import UserError
from litevae.losses.adversarial import (
    AdversarialLoss,
    adaptive_weight,
    discriminator_loss,
    frozen,
    generator_loss,
)
from litevae.losses.gaussian import gaussian_loss
from litevae.losses.kl import kl_loss
from litevae.losses.ldl import ldl_loss
from litevae.losses.perceptual import LPIPS, ESRGANLoss
from litevae.losses.reconstruction import l1_loss, l2_loss
from litevae.losses.st_lpips import LEAST_SIDE, STLPIPS
from litevae.losses.teacher import teacher_kl_loss
from litevae.losses.wavelet import wavelet_loss
from litevae.settings import setting

RECONSTRUCTION_TERMS = ("l1", "l2", "lpips", "st_lpips", "esrgan", "wavelet", "gaussian", "ldl")
RGB_TERMS = ("lpips", "st_lpips", "esrgan")  # whose networks take images of 3 channels
TEACHER_TERMS = ("teacher_kl", "teacher_mean", "teacher_logvar")
TERMS = (*RECONSTRUCTION_TERMS, "kl", *TEACHER_TERMS, "adversarial")


T = TypeVar("T")


@dataclass
class LossConfig:
    """Weights and settings of the losses. A term of weight 0 is neither computed nor reported.

    The paper does not print its weights. For wavelet and gaussian, 1.0 and 0.5 are the weights that the README of
    RGenDiff/open-litevae reports. kl is LDM's 1e-6 on sums over an image, converted to means per element for n_z = 4
    and f = 8: see `litevae.losses.kl`. With the adaptive weight, adversarial=0.5 is Equation 2.
    """

    l1: float = setting(1.0, "Weight of the L1 loss.", minimum=0)
    l2: float = setting(0.0, "Weight of the L2 loss.", minimum=0)
    lpips: float = setting(0.0, "Weight of LPIPS, a perceptual loss.", minimum=0)
    st_lpips: float = setting(
        0.0, "Weight of ST-LPIPS, a perceptual loss other than LPIPS, which downloads nothing.", minimum=0
    )
    esrgan: float = setting(0.0, "Weight of ESRGAN's perceptual loss.", minimum=0)
    wavelet: float = setting(1.0, "Weight of the wavelet loss.", minimum=0)
    gaussian: float = setting(0.5, "Weight of the Gaussian loss.", minimum=0)
    ldl: float = setting(0.0, "Weight of the LDL loss, which needs ema_decay above 0.", minimum=0)
    kl: float = setting(
        2.083e-8,
        "Weight of the KL divergence of the posterior from a standard Gaussian, a mean per element. LDM's weight is "
        "1e-6 n_z / (3 f^2).",
        minimum=0,
    )
    teacher_kl: float = setting(
        0.0, "Weight of the KL divergence of the posterior from the teacher's, a mean per element.", minimum=0
    )
    teacher_mean: float = setting(
        0.0, "Weight of the L1 distance of the posterior's mean from the teacher's.", minimum=0
    )
    teacher_logvar: float = setting(
        0.0, "Weight of the L1 distance of the posterior's log-variance from the teacher's.", minimum=0
    )
    repeat_channels: bool = setting(
        False, "Repeat the channel of grey images for lpips, st_lpips and esrgan, whose networks take RGB."
    )
    adversarial: float = setting(0.0, "Weight of the adversarial loss; 0 trains no discriminator.", minimum=0)
    adversarial_loss: AdversarialLoss = setting("hinge", "Kind of the adversarial loss.")
    adversarial_weight: Literal["constant", "adaptive"] = setting(
        "constant",
        "Use the weight as it is, or scale it at each step to balance the gradients (Equation 2).",
    )
    adversarial_start: int = setting(
        0, "First step in which the adversarial loss counts for the autoencoder.", minimum=0
    )
    adversarial_ramp: int = setting(
        0, "Steps in which the weight of the adversarial loss rises linearly to its value.", minimum=0
    )
    pretrained: bool = setting(
        True, "Pretrained VGG weights for lpips and esrgan; random ones if false, for tests only."
    )


def least_side(config: LossConfig) -> int:
    """Returns the smallest side of images that the networks of the terms in use take, in pixels."""
    return LEAST_SIDE if config.st_lpips else 1


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms.

    Attributes:
        total: weighted sum, a differentiable float32 scalar.
        terms: terms by name, without their weights, detached.
        weighted: terms by name, times their weights, detached.
        parts: the same as `weighted`, but differentiable.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    parts: dict[str, Tensor]


class Objective(nn.Module):
    """Computes the `Loss` of the generator and of the discriminator.

    The module has no parameters and an empty state dict; `.to(device)` moves the networks of lpips,
    st_lpips and esrgan.

    Args:
        config: weights and settings of the terms.

    Raises:
        ValueError: no term that compares images or posteriors has a weight.
        UserError: the weights of a VGG network are missing and cannot be downloaded, or the package of st_lpips is
            missing.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.weights: dict[str, float] = {
            name: getattr(config, name) for name in TERMS if getattr(config, name)
        }
        comparing = (*RECONSTRUCTION_TERMS, *TEACHER_TERMS)
        if not any(name in self.weights for name in comparing):
            raise ValueError(f"one of {', '.join(comparing)} must have a weight other than 0")
        self.networks = nn.ModuleDict()
        networks: dict[str, Callable[[], nn.Module]] = {
            "lpips": lambda: LPIPS(config.pretrained),
            "st_lpips": STLPIPS,
            "esrgan": lambda: ESRGANLoss(config.pretrained),
        }
        for name, make in networks.items():
            if name in self.weights:
                try:
                    self.networks[name] = make()
                except UserError as error:
                    raise UserError(f"loss.{name}: {error}") from None

    def as_rgb(self, image: Tensor) -> Tensor:
        """Returns images (N, 3, H, W), or of one channel if it may be repeated, for a network that takes RGB."""
        return image.expand(-1, 3, -1, -1) if self.config.repeat_channels and image.shape[1] == 1 else image

    @property
    def needs_ema(self) -> bool:
        """Returns whether `generator` needs the EMA model's reconstruction."""
        return "ldl" in self.weights

    @property
    def needs_reconstruction(self) -> bool:
        """Returns whether `generator` needs the reconstruction, which terms of posteriors alone do not."""
        return any(name in self.weights for name in (*RECONSTRUCTION_TERMS, "adversarial"))

    def uses_discriminator(self, step: int) -> bool:
        """Returns whether the adversarial term is active at `step`."""
        return "adversarial" in self.weights and step >= self.config.adversarial_start

    def weight(self, name: str, step: int) -> float:
        """Returns the weight of a term at `step`, without the factor of the adaptive weight."""
        ramp = self.config.adversarial_ramp
        if name != "adversarial" or not ramp:
            return self.weights[name]
        done = step - max(1, self.config.adversarial_start) + 1
        return self.weights[name] * min(1.0, done / ramp)

    def generator(
        self,
        image: Tensor,
        reconstruction: Tensor | None,
        mean: Tensor,
        logvar: Tensor,
        *,
        step: int,
        teacher: tuple[Tensor, Tensor] | None = None,
        discriminator: nn.Module | None = None,
        last_weight: Tensor | None = None,
        ema_reconstruction: Tensor | None = None,
    ) -> Loss:
        """Returns the autoencoder's loss on one batch, computed in float32 even under autocast.

        Args:
            image, reconstruction: image in [-1, 1] and its reconstruction, (N, C, H, W); the latter is needed
                if `needs_reconstruction`.
            mean, logvar: mean and log-variance of the posterior, (N, n_z, h, w).
            step: number of the training step.
            teacher: mean and log-variance of the teacher's posterior, (N, n_z, h, w); needed for the terms in
                `TEACHER_TERMS`.
            discriminator: module that returns a tuple of logits, one tensor per head; needed if
                `uses_discriminator(step)`. Its parameters get no gradient. If it is a
                DistributedDataParallel, the wrapped module is called.
            last_weight: weight of the decoder's last convolution, a leaf of the reconstruction's graph;
                needed for the adaptive weight.
            ema_reconstruction: reconstruction by the EMA model, (N, C, H, W); needed if `needs_ema`.

        Raises:
            ValueError: `reconstruction`, `teacher`, `discriminator`, `last_weight` or `ema_reconstruction` is
                needed and missing.
            TypeError: the discriminator returns a tensor instead of a tuple.
        """
        # No active term reads a reconstruction that is not needed.
        restored = required(reconstruction, "reconstruction") if self.needs_reconstruction else image
        adversarial = self.uses_discriminator(step)
        adaptive = adversarial and self.config.adversarial_weight == "adaptive"
        logits: list[Tensor] = []
        if adversarial:
            inner = required(discriminator, "discriminator")
            if isinstance(inner, DistributedDataParallel):
                inner = inner.module  # DDP would wait for gradients that frozen parameters never get
            with frozen(inner):
                logits = to_float32(inner(restored.float()))

        def target() -> tuple[Tensor, Tensor]:
            teacher_mean, teacher_logvar = required(teacher, "teacher")
            return teacher_mean.float(), teacher_logvar.float()

        with torch.autocast(image.device.type, enabled=False):
            image, restored = image.float(), restored.float()
            compute: dict[str, Callable[[], Tensor]] = {
                "l1": lambda: l1_loss(image, restored),
                "l2": lambda: l2_loss(image, restored),
                "lpips": lambda: self.networks["lpips"](*map(self.as_rgb, (image, restored))),
                "st_lpips": lambda: self.networks["st_lpips"](*map(self.as_rgb, (image, restored))),
                "esrgan": lambda: self.networks["esrgan"](*map(self.as_rgb, (image, restored))),
                "wavelet": lambda: wavelet_loss(image, restored),
                "gaussian": lambda: gaussian_loss(image, restored),
                "ldl": lambda: ldl_loss(
                    image, restored, required(ema_reconstruction, "ema_reconstruction").float()
                ),
                "kl": lambda: kl_loss(mean.float(), logvar.float()),
                "teacher_kl": lambda: teacher_kl_loss(mean.float(), logvar.float(), *target()),
                "teacher_mean": lambda: l1_loss(target()[0], mean.float()),
                "teacher_logvar": lambda: l1_loss(target()[1], logvar.float()),
                "adversarial": lambda: generator_loss(logits, self.config.adversarial_loss),
            }
            active = [name for name in self.weights if name != "adversarial" or adversarial]
            terms = {name: compute[name]() for name in active}
            weighted = {name: self.weight(name, step) * term for name, term in terms.items()}
            if adaptive:
                reconstruction_loss = torch.stack(
                    [weighted[name] for name in RECONSTRUCTION_TERMS if name in weighted]
                ).sum()
                weighted["adversarial"] = weighted["adversarial"] * adaptive_weight(
                    reconstruction_loss, terms["adversarial"], required(last_weight, "last_weight")
                )
            return sum_terms(terms, weighted)

    def discriminator(self, real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Loss:
        """Returns the discriminator's loss, computed in float32 even under autocast.

        Its only term is "discriminator".

        Args:
            real_logits, fake_logits: logits of the image and of the detached reconstruction, one tensor per
                head.

        Raises:
            TypeError: the logits are a tensor instead of a tuple.
        """
        with torch.autocast(real_logits[0].device.type, enabled=False):
            loss = discriminator_loss(
                to_float32(real_logits), to_float32(fake_logits), self.config.adversarial_loss
            )
        return sum_terms({"discriminator": loss}, {"discriminator": loss})


def required(argument: T | None, name: str) -> T:
    if argument is None:
        raise ValueError(f"the losses in use need {name}, got None")
    return argument


def to_float32(logits: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(logits, Tensor):  # iterating over it would take each image for a head
        raise TypeError("a discriminator must return a tuple of logits, one tensor per head; got a tensor")
    return [head.float() for head in logits]


def sum_terms(terms: dict[str, Tensor], weighted: dict[str, Tensor]) -> Loss:
    """Returns the `Loss` of terms that are not detached yet."""
    return Loss(
        torch.stack(list(weighted.values())).sum(),
        {name: term.detach() for name, term in terms.items()},
        {name: term.detach() for name, term in weighted.items()},
        weighted,
    )
