"""The typed configuration of a model."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelConfig:
    """LiteVAE, or one of the paper's baselines with the same decoder.

    All but `kind`, `latent_channels`, `block_out_channels`, `layers_per_block`, `num_groups` and `use_1x1_conv`,
    which is quant_conv and post_quant_conv in Stable Diffusion's VAE, are LiteVAE's alone;
    `encoder_block_out_channels` is the baselines', for an encoder with other widths than the decoder's: then, as
    with vae-small, `layers_per_block` and `num_groups` are the decoder's alone.
    """

    kind: Literal["litevae", "sd-vae", "vae-small"] = "litevae"
    preset: str = "litevae-b"
    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    num_groups: int = 32
    decoder_norm: Literal["group", "smc"] = "group"
    output_type: Literal["image", "wavelet"] = "image"
    use_1x1_conv: bool = False
    encoder_type: Literal["learned", "dwt", "dwt-2"] = "learned"
    extractor: Literal["unet", "nafnet"] = "unet"
    shared_extractor: bool = False
    aggregator: Literal["unet", "vit"] = "unet"  # vit: for images of data.size alone
    finest_level: int = 1
    encoder_norm: Literal["group", "smc"] = "group"
    encoder_block_out_channels: list[int] = field(default_factory=list)  # as many as the decoder's


# what the other kinds of models have, and cannot change
LITEVAE_ONLY = {
    name: getattr(ModelConfig, name)
    for name in (
        "decoder_norm",
        "output_type",
        "encoder_type",
        "extractor",
        "shared_extractor",
        "aggregator",
        "finest_level",
        "encoder_norm",
    )
}
