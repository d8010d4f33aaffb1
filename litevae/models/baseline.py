"""The paper's baselines: Stable Diffusion's VAE (diffusers' `AutoencoderKL`), and one with a small encoder."""

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Encoder

from litevae.models.arguments import check_arguments
from litevae.models.pretrained import PretrainedMixin


class SmallEncoderVAE(PretrainedMixin, AutoencoderKL):
    """An `AutoencoderKL` whose encoder and decoder differ in width: VAE-Small of Table 2b.

    Whatever the decoder is, the rest of the encoder is Stable Diffusion's: two ResBlocks per block, and
    GroupNorms of 32 groups.

    The paper gives the number of the encoder's parameters, 6.75 M, but not its widths. The default widths
    give 6,793,032, with half of Stable Diffusion's width in the first block.

    Args:
        encoder_block_out_channels: widths of the encoder's blocks.
        in_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups, use_quant_conv,
            use_post_quant_conv, sample_size, scaling_factor, latents_mean, latents_std: arguments of
            `AutoencoderKL`.

    Raises:
        ValueError: encoder and decoder have different numbers of blocks.
    """

    @register_to_config
    def __init__(
        self,
        encoder_block_out_channels: Sequence[int] = (64, 128, 224, 224),
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        in_channels: int = 3,
    ) -> None:
        check_arguments(locals())
        blocks = len(block_out_channels)
        if len(encoder_block_out_channels) != blocks:
            raise ValueError(
                f"block_out_channels must have as many entries as the encoder's, {len(encoder_block_out_channels)}, "
                f"got {list(block_out_channels)}"
            )
        super().__init__(
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=False,
        )
        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(encoder_block_out_channels),
            block_out_channels=tuple(encoder_block_out_channels),
            layers_per_block=2,
            norm_num_groups=32,
            double_z=True,
        )

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Leaves out the settings of `AutoencoderKL` that are fixed here; diffusers would warn about them."""
        fixed = inspect.signature(AutoencoderKL).parameters.keys() - inspect.signature(cls).parameters.keys()
        own = {name: value for name, value in config_dict.items() if name not in fixed}
        return super().extract_init_dict(own, **kwargs)


SmallEncoderVAE.__module__ = "litevae.models"  # recorded in pipelines, as for LiteVAE
