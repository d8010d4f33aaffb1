"""LiteVAE: a drop-in replacement for `diffusers.AutoencoderKL` with a light wavelet encoder."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin, get_parameter_device
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from litevae.models.decoder import Decoder
from litevae.models.encoder import Aggregator, Encoder, Extractor, WaveletEncoder
from litevae.models.layers import Norm, ResBlock, autocast_enabled, compute_dtype
from litevae.models.presets import get_preset
from litevae.models.tiling import apply_by_tiles
from litevae_kernels import haar_idwt2d
from litevae_kernels.nn import Conv2d

OutputType = Literal["image", "wavelet"]
EncoderType = Literal["learned", "dwt", "dwt-2"]


class LiteVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """LiteVAE (Sadat et al., 2024): a Haar pyramid, light U-Nets and Stable Diffusion's decoder.

    Images are (N, in_channels, H, W) in [-1, 1], where H and W are multiples of
    f = 2^(len(block_out_channels) - 1), 8 by default; latents are (N, latent_channels, H / f, W / f). The
    defaults are LiteVAE-B; `from_preset` has all sizes of the paper.

    Args:
        in_channels: number of image channels.
        latent_channels: number of latent channels, n_z in the paper.
        extractor_channels, extractor_multipliers: base width of the feature-extraction U-Nets, and each
            level's multiple of it (Table 23).
        aggregator_channels, aggregator_multipliers: the same for the feature-aggregation U-Net (Table 24).
        encoder_num_groups: number of groups in the encoder's GroupNorms.
        block_out_channels: widths of the decoder's blocks, from the image's side to the latent's: one more
            than there are wavelet levels.
        layers_per_block: number of ResBlocks in each decoder block minus one, as in diffusers.
        num_groups: number of groups in the decoder's GroupNorms.
        decoder_norm: "group" for Stable Diffusion's decoder; "smc" for self-modulated convolutions
            (Section 4.2); "none" for plain convolutions, which `fold` makes of "smc".
        output_type: "image"; or "wavelet", where the decoder ends at half resolution with the image's
            sub-bands, scaled like the encoder's first level, and the inverse transform produces the image
            (Appendix G).
        use_1x1_conv: whether a 1x1 convolution follows the encoder and another precedes the decoder
            (Appendix D.2).
        encoder_type: "learned"; or, without parameters and with a deterministic posterior (Appendix B),
            "dwt", which keeps the coarsest sub-bands and needs latent_channels = 4 in_channels, or "dwt-2",
            which rearranges those of the next finer level by space-to-depth and needs 16 in_channels.
        extractor: network that extracts each level's features, "unet" or "nafnet" (Appendix D.3, `NAFNet`).
        shared_extractor: whether one extractor serves all levels (Appendix D.4).
        aggregator: network that combines the levels' features, "unet" or "vit" (Appendix D.5, `ViT`). The
            latter takes only images of sample_size x sample_size.
        finest_level: first level whose features are used (Appendix D.6); 2 leaves out the largest sub-bands.
        encoder_norm: normalisation in the encoder's U-Nets, with the values of `decoder_norm`.
        sample_size: side of the training images in pixels, which is also the default size of tiles.
        scaling_factor, shift_factor: constants by which diffusion pipelines normalise latents,
            (latent - shift_factor) * scaling_factor. The model does not apply them.
        latents_mean, latents_std: statistics of each latent channel, as in diffusers. The model does not
            apply them.
        force_upcast: whether the SDXL pipelines run the model in float32 when the rest is float16.

    Raises:
        ValueError: an argument has an unknown value, `block_out_channels` has fewer than two entries, a width
            is not divisible by its number of groups, `finest_level` does not exist, or arguments do not go
            together.
    """

    _supports_gradient_checkpointing = True
    # The encoder concatenates its U-Nets' outputs, so it stays on one device.
    _no_split_modules = ("Encoder", "ResBlock", "Attention")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        extractor_channels: int = 32,
        extractor_multipliers: Sequence[int] = (1, 2, 3),
        aggregator_channels: int = 32,
        aggregator_multipliers: Sequence[int] = (1, 2, 3),
        encoder_num_groups: int = 32,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        num_groups: int = 32,
        decoder_norm: Norm = "group",
        output_type: OutputType = "image",
        use_1x1_conv: bool = False,
        encoder_type: EncoderType = "learned",
        extractor: Extractor = "unet",
        shared_extractor: bool = False,
        aggregator: Aggregator = "unet",
        finest_level: int = 1,
        encoder_norm: Norm = "group",
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("decoder_norm", decoder_norm, get_args(Norm)),
            ("output_type", output_type, get_args(OutputType)),
            ("encoder_type", encoder_type, get_args(EncoderType)),
            ("extractor", extractor, get_args(Extractor)),
            ("aggregator", aggregator, get_args(Aggregator)),
            ("encoder_norm", encoder_norm, get_args(Norm)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        levels = len(block_out_channels) - 1
        if levels < 1:
            raise ValueError(f"block_out_channels must have at least two entries, got {block_out_channels}")
        if not 1 <= finest_level <= levels:
            raise ValueError(f"finest_level must be from 1 to {levels}, got {finest_level}")

        moments = 2 * latent_channels  # mean and log-variance
        wavelet = output_type == "wavelet"
        self.encoder: Encoder | WaveletEncoder
        if encoder_type == "learned":
            if encoder_norm != "group" and (extractor, aggregator) == ("nafnet", "vit"):
                raise ValueError(
                    f"encoder_norm={encoder_norm!r} needs a U-Net: extractor='nafnet' and aggregator='vit' leave none"
                )
            if aggregator == "vit" and (sample_size < 1 or sample_size % 2**levels):
                raise ValueError(
                    f"sample_size must be a multiple of {2**levels} for aggregator='vit', got {sample_size}"
                )
            self.encoder = Encoder(
                in_channels,
                moments,
                levels,
                extractor_channels,
                extractor_multipliers,
                aggregator_channels,
                aggregator_multipliers,
                encoder_num_groups,
                extractor=extractor,
                shared_extractor=shared_extractor,
                aggregator=aggregator,
                finest_level=finest_level,
                norm=encoder_norm,
                image_size=sample_size,
            )
        else:
            factor = 1 if encoder_type == "dwt" else 2  # factor of space-to-depth
            if factor == 2 and levels < 2:
                raise ValueError(
                    "block_out_channels must have at least three entries for encoder_type='dwt-2'"
                )
            for name, given, only in (
                ("latent_channels", latent_channels, 4 * in_channels * factor**2),
                ("use_1x1_conv", use_1x1_conv, False),  # it would mix the mean with the log-variance
                ("extractor", extractor, "unet"),
                ("shared_extractor", shared_extractor, False),
                ("aggregator", aggregator, "unet"),
                ("finest_level", finest_level, 1),
                ("encoder_norm", encoder_norm, "group"),
            ):
                if given != only:
                    raise ValueError(
                        f"{name} must be {only!r} for encoder_type={encoder_type!r}, got {given!r}"
                    )
            self.encoder = WaveletEncoder(levels + 1 - factor, factor)
        self.decoder = Decoder(
            latent_channels,
            4 * in_channels if wavelet else in_channels,
            block_out_channels,
            layers_per_block,
            num_groups,
            decoder_norm,
            num_upsamplers=levels - 1 if wavelet else levels,
        )
        self.quant_conv = Conv2d(moments, moments, 1) if use_1x1_conv else None
        self.post_quant_conv = Conv2d(latent_channels, latent_channels, 1) if use_1x1_conv else None

        self.spatial_compression_ratio = 2**levels
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_latent_min_size = max(sample_size // self.spatial_compression_ratio, 1)
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_preset(cls, name: str, latent_channels: int = 4, **overrides: Any) -> Self:
        """Returns a new model with random weights, in one of the paper's sizes (Tables 23 and 24).

        Args:
            name: preset: "litevae-s", "litevae-b", "litevae-m" or "litevae-l".
            latent_channels: number of latent channels, n_z in the paper.
            overrides: other constructor arguments.

        Raises:
            ValueError: there is no such preset. The message names the nearest one.
        """
        return cls(**{**get_preset(name), "latent_channels": latent_channels, **overrides})

    def fold(self) -> Self:
        """Returns a copy for inference and export with plain instead of self-modulated convolutions.

        The copy's outputs are the same. The modulation does not depend on the image, so the normalised
        weights are computed once, in float32, and stored in their dtype. In the copy's configuration the norm
        "smc" becomes "none"; it is saved, loaded, compiled and exported like any other model. It shares no
        memory with this model, which stays unchanged. It is not meant for training, which needs the
        normalisation. A model without self-modulated convolutions gives a plain copy.

        Raises:
            RuntimeError: weights are offloaded. Fold before `enable_model_cpu_offload` and the like.
            TypeError: weights are stored in 8 bits (layerwise casting). Fold before enabling it.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            raise RuntimeError("fold needs all weights in memory, and some are offloaded (on device 'meta')")
        folded = copy.deepcopy(self)
        for module in folded.modules():
            if isinstance(module, ResBlock):
                module.fold()
        modulated = [name for name in ("encoder_norm", "decoder_norm") if self.config[name] == "smc"]
        folded.register_to_config(**dict.fromkeys(modulated, "none"))
        return folded

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Returns the posterior distribution of the latent.

        Args:
            x: images (N, in_channels, H, W) in [-1, 1], of any floating dtype, on the model's device, where H
                and W are multiples of f (see the class).
            return_dict: whether to return an `AutoencoderKLOutput` with `latent_dist` instead of a tuple.

        Returns:
            A `DiagonalGaussianDistribution` over (N, latent_channels, H / f, W / f), in the dtype of the
            convolutions: the parameters', or autocast's.

        Raises:
            ValueError: the images are not 4-D, have another number of channels, a size that is not a multiple
                of f or are on another device; or, with ``aggregator="vit"``, an image or a tile does not have
                the size `sample_size`.
            TypeError: the images are not floating point.
        """
        self._check_image(x)
        moments = self._sliced(self._encode, x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Returns the images that latents stand for.

        Args:
            z: latents (N, latent_channels, h, w) on the model's device, in the parameters' dtype, or in any
                floating dtype under autocast.
            return_dict: whether to return a `DecoderOutput` with `sample` instead of a tuple.
            generator: unused; diffusers' pipelines pass it.

        Returns:
            Images (N, in_channels, f h, f w), roughly in [-1, 1] but not clamped.

        Raises:
            ValueError: the latents are not 4-D, have another number of channels or are on another device.
            TypeError: the latents have another dtype.
        """
        self._check_latent(z)
        image = self._sliced(self._decode, z)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Returns reconstructions of images (N, in_channels, H, W) in [-1, 1], in the same shape.

        Args:
            sample: images, as `encode` takes them.
            sample_posterior: whether to decode a sample of the posterior instead of its mode.
            return_dict: whether to return a `DecoderOutput` with `sample` instead of a tuple.
            generator: source of randomness for the posterior's sample.

        Raises:
            ValueError, TypeError: as in `encode`.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _encode(self, image: Tensor) -> Tensor:
        """Returns the moments (N, 2 latent_channels, h, w) of an image, by tiles if enabled and it is large."""
        if self.use_tiling and max(image.shape[-2:]) > self.tile_sample_min_size:
            tile = max(self.tile_sample_min_size // self.spatial_compression_ratio, 1)
            return self._tiled(self._encode_tile, image, tile, self.spatial_compression_ratio, 1)
        return self._encode_tile(image)

    def _encode_tile(self, image: Tensor) -> Tensor:
        moments = self.encoder(image)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: Tensor) -> Tensor:
        """Returns the image of a latent, by tiles if they are enabled and it is large."""
        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            return self._tiled(
                self._decode_tile, z, self.tile_latent_min_size, 1, self.spatial_compression_ratio
            )
        return self._decode_tile(z)

    def _decode_tile(self, z: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        decoded = self.decoder(z)
        # The wavelet decoder's sub-bands are scaled by 1/2, like haar_pyramid's first level.
        return haar_idwt2d(2 * decoded) if self.config.output_type == "wavelet" else decoded

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Returns `function(x)`, computed one sample at a time if slicing is enabled."""
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([function(sample) for sample in x.split(1)])
        return function(x)

    def _tiled(
        self, function: Callable[[Tensor], Tensor], x: Tensor, tile: int, input_scale: int, output_scale: int
    ) -> Tensor:
        overlap = int(tile * self.tile_overlap_factor)
        return apply_by_tiles(function, x, tile, overlap, input_scale, output_scale)

    def _check_image(self, x: Tensor) -> None:
        channels, factor = self.config.in_channels, self.spatial_compression_ratio
        check_channels("image", x, channels)
        if not x.is_floating_point():
            raise TypeError(
                f"image must be floating point in [-1, 1], got {x.dtype}; "
                "convert bytes with image.float() / 127.5 - 1"
            )
        height, width = x.shape[-2:]
        if height % factor or width % factor or height < factor or width < factor:
            raise ValueError(
                f"image height and width must be multiples of {factor}, got {height}x{width}; nearest "
                f"heights: {nearest_multiples(height, factor)}, widths: {nearest_multiples(width, factor)}"
            )
        check_device("image", x, self, self.encoder.device)

    def _check_latent(self, z: Tensor) -> None:
        check_channels("latent", z, self.config.latent_channels)
        conv = self.decoder.conv_in
        check_device("latent", z, self, conv.weight.device)
        dtype = compute_dtype(conv, z.device)
        # Autocast converts any floating dtype.
        if z.dtype != dtype and not (autocast_enabled(z.device) and z.is_floating_point()):
            raise TypeError(f"latent must have the model's dtype {dtype}, got {z.dtype}")


def check_channels(name: str, x: Tensor, channels: int) -> None:
    """Raises ValueError unless `x` is (N, channels, H, W)."""
    if x.ndim != 4:
        raise ValueError(f"{name} must be 4-D, (N, {channels}, H, W), got shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {x.shape[1]} in {tuple(x.shape)}")


def check_device(name: str, x: Tensor, model: nn.Module, device: torch.device) -> None:
    """Raises ValueError unless `x` is on `device`, a weight's, or on the device that `model` will run on."""
    if device == x.device or device.type == "meta":  # accelerate's offloading loads weights on "meta" later
        return
    device = get_parameter_device(model)  # this accounts for diffusers' group offloading
    if device != x.device:
        raise ValueError(f"{name} must be on the model's device {device}, got {x.device}")


def nearest_multiples(size: int, factor: int) -> str:
    """Returns the positive multiples of `factor` around `size` as text."""
    below, above = size // factor * factor, math.ceil(size / factor) * factor
    return " and ".join(str(multiple) for multiple in sorted({below or factor, above or factor}))
