"""What happens to latents in training between the encoder and the decoder, besides sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.models.interface import MIN_SIZE
from litevae.training.sections import LatentConfig


@dataclass(frozen=True)
class Change:
    """A change of a batch's latents (N, n_z, h, h): noise is added, then they are resized, then turned.

    Attributes:
        noise: (N, n_z, h, h), or None to add nothing.
        side: side after resizing, or None to keep h.
        turns: number of quarter turns to the left.
    """

    noise: Tensor | None = None
    side: int | None = None
    turns: int = 0

    def latent(self, latent: Tensor) -> Tensor:
        """Returns the changed latents."""
        return self.picture(latent if self.noise is None else latent + self.noise, 1)

    def picture(self, picture: Tensor, factor: int) -> Tensor:
        """Returns pictures that are resized to `factor` times `side`, if it is given, and turned."""
        if self.side is not None:
            size = (factor * self.side, factor * self.side)
            picture = F.interpolate(picture, size, mode="bilinear", antialias=True)
        return torch.rot90(picture, self.turns, (2, 3)) if self.turns else picture

    def chunk(self, parts: int) -> Sequence["Change"]:
        """Splits the change of a batch into those of its parts."""
        noises = [None] * parts if self.noise is None else self.noise.chunk(parts)
        return [Change(noise, self.side, self.turns) for noise in noises]


def draw_change(config: LatentConfig, like: Tensor, count: int, index: int, sides: Sequence[int]) -> Change:
    """Draws the change of this process's share of a batch from the global generators.

    Every process draws for the whole batch, so that a run does not depend on their number.

    Args:
        config: settings; nothing is drawn for what is off.
        like: tensor of the shape of the share's latents, on their device.
        count: number of processes.
        index: number of this process.
        sides: sides that latents may be resized to.
    """
    noise, side, turns = None, None, 0
    if config.noise:
        whole = (count * len(like), *like.shape[1:])
        strength = draw_strength(config, whole[0], like.device).view(-1, 1, 1, 1)
        noise = (strength * torch.randn(whole, device=like.device)).chunk(count)[index]
    # The decision is drawn on the CPU, because it changes shapes.
    if config.equivariance and torch.rand(()).item() < config.equivariance:
        side = sides[int(torch.randint(len(sides), ()))]
        turns = int(torch.randint(4, ()))
    return Change(noise, side, turns)


def draw_strength(config: LatentConfig, count: int, device: torch.device) -> Tensor:
    """Returns the standard deviation of the noise of each image, (count,)."""
    match config.noise_strength:
        case "half_normal":
            factor = torch.randn(count, device=device).abs()
        case "uniform":
            factor = torch.rand(count, device=device)
        case _:
            factor = torch.ones(count, device=device)
    return config.noise * factor


def sides_to_draw(
    side: int, factor: int, smallest: float, discriminator: nn.Module | None, least: int = MIN_SIZE
) -> list[int]:
    """Returns the sides of latents that may stand for those of a stage, from `smallest` times their side on.

    Args:
        side: side of the stage's latents.
        factor: pixels per latent pixel along a side.
        smallest: smallest factor of the scaling.
        discriminator: network whose `check_size` must accept the images, or None.
        least: smallest side in pixels of images that the losses take.
    """

    def fits(pixels: int) -> bool:
        if pixels < max(least, MIN_SIZE):
            return False
        try:
            if discriminator is not None:
                discriminator.check_size(pixels, pixels)  # type: ignore[operator]
        except ValueError:
            return False
        return True

    return [each for each in range(1, side + 1) if smallest * side <= each and fits(factor * each)]
