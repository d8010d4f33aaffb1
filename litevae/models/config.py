"""The typed configuration of a model."""

from dataclasses import dataclass
from typing import Literal

from litevae.errors import UserError
from litevae.settings import setting


@dataclass
class ModelConfig:
    """Configuration of LiteVAE, or of one of the paper's baselines with the same decoder.

    The baselines take only `kind`, `latent_channels`, `block_out_channels`, `layers_per_block`, `num_groups`,
    `use_1x1_conv` and `encoder_block_out_channels`; the other settings are LiteVAE's.
    """

    kind: Literal["litevae", "sd-vae", "vae-small"] = setting(
        "litevae", "LiteVAE, Stable Diffusion's VAE, or the latter with an encoder of LiteVAE-B's size."
    )
    preset: str = setting(
        "litevae-b", "Size of LiteVAE's encoder: litevae-s, litevae-b, litevae-m or litevae-l."
    )
    latent_channels: int = setting(4, "Channels of the latent, n_z in the paper.", minimum=1, maximum=4096)
    block_out_channels: list[int] = setting(
        [128, 256, 512, 512],
        "Widths of the decoder's blocks, from the image's side to the latent's; a baseline's encoder has them too.",
        minimum=1,
    )
    layers_per_block: int = setting(
        2, "Number of ResBlocks in each of the decoder's blocks, minus one, as in diffusers.", minimum=1
    )
    num_groups: int = setting(32, "Groups of the decoder's GroupNorms.", minimum=1)
    decoder_norm: Literal["group", "smc"] = setting(
        "group", "Normalisation in the decoder: GroupNorm or self-modulated convolution."
    )
    output_type: Literal["image", "wavelet"] = setting(
        "image", "What the decoder predicts: the image, or its sub-bands at half resolution."
    )
    use_1x1_conv: bool = setting(
        False,
        "A 1x1 convolution after the encoder and one before the decoder; in Stable Diffusion's VAE, quant_conv and "
        "post_quant_conv.",
    )
    encoder_type: Literal["learned", "dwt", "dwt-2"] = setting(
        "learned",
        "A learned encoder, or wavelet coefficients of the coarsest or the next finer level as the latent.",
    )
    extractor: Literal["unet", "nafnet"] = setting(
        "unet", "Network that extracts the features of each level."
    )
    shared_extractor: bool = setting(False, "One feature extractor for all levels instead of one per level.")
    aggregator: Literal["unet", "vit"] = setting(
        "unet", "Network that aggregates the features of all levels; vit takes only images of data.size."
    )
    finest_level: int = setting(
        1, "First wavelet level whose features are used; 2 leaves out the largest sub-bands.", minimum=1
    )
    encoder_norm: Literal["group", "smc"] = setting("group", "Normalisation in the encoder, as decoder_norm.")
    encoder_block_out_channels: list[int] = setting(
        [],
        "Widths of a baseline's encoder where they differ from the decoder's, as many as there. The encoder then "
        "does not use layers_per_block and num_groups, nor does vae-small's.",
        minimum=1,
    )


# The baselines have these values, which cannot be changed.
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


def check_model_config(config: ModelConfig, prefix: str = "") -> None:
    """Checks that the settings of a model fit together.

    Args:
        config: configuration whose values are in range.
        prefix: section that the settings belong to, such as "model.", for the message.

    Raises:
        UserError: a setting does not apply to this kind of model, or the decoder has no blocks.
    """
    if not config.block_out_channels:
        raise UserError(f"{prefix}block_out_channels is empty: give the width of each block")
    if config.kind == "litevae":
        if config.encoder_block_out_channels:
            raise UserError(
                f"{prefix}encoder_block_out_channels is for {prefix}kind=sd-vae and {prefix}kind=vae-small"
            )
        return
    for name, only in LITEVAE_ONLY.items():
        if getattr(config, name) != only:
            raise UserError(f"{prefix}{name} must be {str(only).lower()} for {prefix}kind={config.kind}")
