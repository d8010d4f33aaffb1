import pytest
import torch

from litevae.diffusion.config import UNetConfig
from litevae.diffusion.unet import build_unet
from litevae.errors import UserError


def test_ldm_ffhq_has_the_published_number_of_parameters():
    """Table 12 of Rombach et al. (2022) prints 274 M, for 3 latent channels."""
    config = UNetConfig([224, 448, 672, 896], layers_per_block=2)
    with torch.device("meta"):
        unet = build_unet(config, 3, 64)
    assert sum(p.numel() for p in unet.parameters()) == 274_056_163
    has_attention = [hasattr(block, "attentions") for block in unet.down_blocks]
    assert has_attention == [False, True, True, True]  # at resolutions 64, 32, 16 and 8
    assert unet.down_blocks[1].attentions[0].heads == 448 // 32


def test_begins_at_zero():
    unet = build_unet(UNetConfig([16, 16], head_channels=8, num_groups=4), 3, 8)
    assert not unet(torch.randn(1, 3, 8, 8), 5).sample.any()


def test_latents_that_cannot_be_halved_are_refused():
    with pytest.raises(UserError, match="latents of 6 x 6 cannot be halved 2 times"):
        build_unet(UNetConfig(), 4, 6)
