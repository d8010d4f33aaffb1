"""How large and how costly a model is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from litevae.models.baseline import Autoencoder


@dataclass(frozen=True)
class Complexity:
    """Parameters and multiply-accumulates (MACs) of one image's encoding and decoding.

    MACs count convolutions, matrix products and attention; one MAC is two floating-point operations.
    `latent_shape` is (n_z, h, w).
    """

    encoder_parameters: int
    decoder_parameters: int
    encoder_macs: int
    decoder_macs: int
    latent_shape: tuple[int, ...]


def measure_complexity(model: Autoencoder, size: int = 256) -> Complexity:
    """Counts for one image of `size` x `size` pixels. Nothing is computed: the tensors have shapes only.

    Raises:
        ValueError: a size that the model does not take.
    """
    # the 1x1 convolutions, where there are any, belong to the side they stand on
    sides = ((model.encoder, model.quant_conv), (model.decoder, model.post_quant_conv))
    encoder_parameters, decoder_parameters = (
        sum(p.numel() for part in side if part is not None for p in part.parameters()) for side in sides
    )
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        image = torch.empty(1, model.config.in_channels, size, size, device=model.device, dtype=model.dtype)
        with FlopCounterMode(display=False) as encoding:
            latent: Tensor = model.encode(image).latent_dist.mode()
        with FlopCounterMode(display=False) as decoding:
            model.decode(latent)
    return Complexity(
        encoder_parameters,
        decoder_parameters,
        encoding.get_total_flops() // 2,
        decoding.get_total_flops() // 2,
        tuple(latent.shape[1:]),
    )
