"""The discriminator's part of a training step: when it learns, and the terms of its loss."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litevae.discriminators import UNetDiscriminator
from litevae.losses import LeCam, Loss, Objective, gradient_penalty, sum_terms
from litevae.training.config import Config, discriminator_start

Logits = tuple[Tensor, ...]


class Discriminate(nn.Module):
    """The forward pass of a discriminator's training step, which DDP and autocast wrap."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(
        self, real: Tensor, fake: Tensor, penalise: bool = False
    ) -> tuple[Logits, Logits, Tensor | None]:
        """Returns the logits of the real and of the generated images, and R1's penalty if it is asked for.

        Both kinds of images go through the network in one pass if the logits of an image do not depend on other
        images. PatchGAN normalises over the batch, and StyleGAN's discriminator takes the batch's standard deviation.
        """
        penalty = gradient_penalty(self.discriminator, real) if penalise else None
        if not isinstance(self.discriminator, UNetDiscriminator):
            return self.discriminator(real), self.discriminator(fake), penalty
        heads = self.discriminator(torch.cat([real, fake]))
        parts = (head.split([len(real), len(fake)]) for head in heads)
        real_logits, fake_logits = zip(*parts, strict=True)
        return real_logits, fake_logits, penalty


class Adversary:
    """When the discriminator learns, and what it minimises.

    Args:
        config: settings of the run.
        objective: losses, of which the discriminator's adversarial loss is used.
    """

    def __init__(self, config: Config, objective: Objective) -> None:
        self.objective = objective
        self.start = discriminator_start(config)
        settings = config.discriminator
        self.lecam = LeCam(settings.lecam_decay) if settings.lecam else None
        self.r1_every = settings.r1_every if settings.r1 else 0
        self.weights = {"lecam": settings.lecam, "r1": settings.r1 / 2 * settings.r1_every}

    def learns(self, step: int) -> bool:
        """Returns whether the discriminator is updated in `step`."""
        return "adversarial" in self.objective.weights and step >= self.start

    def penalises(self, step: int) -> bool:
        """Returns whether R1 is computed in `step`: in every `r1_every`-th, with a weight that makes up for it."""
        return self.r1_every > 0 and step % self.r1_every == 0

    def loss(
        self, real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor], penalty: Tensor | None
    ) -> Loss:
        """Returns the discriminator's loss: the terms "discriminator" and, if they are in use, "lecam" and "r1".

        Args:
            real_logits, fake_logits: logits of the image and of the detached reconstruction, one tensor per head.
            penalty: result of `gradient_penalty`, or None.
        """
        loss = self.objective.discriminator(real_logits, fake_logits)
        terms = dict(loss.parts)
        if self.lecam is not None:
            terms["lecam"] = self.lecam(
                *([head.float() for head in each] for each in (real_logits, fake_logits))
            )
        if penalty is not None:
            terms["r1"] = penalty
        return sum_terms(terms, {name: self.weights.get(name, 1.0) * term for name, term in terms.items()})

    def statistics(self, device: torch.device) -> Tensor:
        """Returns this process's means of a step, which `update` takes once they are averaged over the processes."""
        return torch.empty(0, device=device) if self.lecam is None else self.lecam.means()

    def update(self, statistics: Tensor) -> None:
        """Updates LeCam's averages with the result of `statistics`, flattened."""
        if self.lecam is not None and len(statistics):
            self.lecam.update(statistics.view(2, -1))

    def state(self) -> Tensor | None:
        """Returns what a checkpoint holds of this."""
        return None if self.lecam is None else self.lecam.averages

    def restore(self, state: Tensor | None, device: torch.device) -> None:
        """Restores the result of `state`; without one, the averages begin anew."""
        if self.lecam is not None and state is not None:
            self.lecam.averages = state.to(device)
