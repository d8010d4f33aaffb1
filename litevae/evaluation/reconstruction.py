"""Whole photographs through an autoencoder."""

import torch
from torch import Tensor

from litevae.images import Pixels, to_batch, to_pixels
from litevae.models.baseline import Autoencoder, spatial_compression


@torch.inference_mode()
def encode(model: Autoencoder, image: Pixels) -> Tensor:
    """The mode of the latent of an image.

    Args:
        model: of 3 channels; it runs on its own device and in its own dtype.
        image: (H, W, 3) uint8, of any size: padded by mirroring, see `to_batch`.

    Returns:
        (1, n_z, h, w) with h = max(⌈H/f⌉, 2) and w likewise, in the model's dtype and on its device.
    """
    batch = to_batch(image, spatial_compression(model)).to(model.device, model.dtype)
    return model.encode(batch).latent_dist.mode()


@torch.inference_mode()
def decode(model: Autoencoder, latent: Tensor, size: tuple[int, int]) -> Pixels:
    """The image of a latent that `encode` returned, (H, W, 3) uint8, with the padding cut off.

    Args:
        size: H and W of the image that was encoded.
    """
    decoded = to_pixels(model.decode(latent).sample)
    return decoded[0, :, : size[0], : size[1]].permute(1, 2, 0).contiguous().cpu().numpy()


def reconstruct(model: Autoencoder, image: Pixels) -> Pixels:
    """What is left of an (H, W, 3) uint8 image once it went through its latent; the same shape and type."""
    height, width = image.shape[:2]
    return decode(model, encode(model, image), (height, width))
