"""LiteVAE: a drop-in replacement for `diffusers.AutoencoderKL` with a light wavelet encoder."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self, get_args

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  (see the end of this file)
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from litevae.errors import shorten
from litevae.models.arguments import check_arguments
from litevae.models.checks import check_device, check_image, check_latent, without_tracer_warnings
from litevae.models.decoder import Decoder
from litevae.models.encoder import Aggregator, Encoder, Extractor, WaveletEncoder
from litevae.models.layers import NoConv2d, Norm, ResBlock, compute_dtype
from litevae.models.presets import get_preset
from litevae.models.pretrained import PretrainedMixin
from litevae.models.tiling import apply_by_tiles
from litevae_kernels import haar_idwt2d
from litevae_kernels.nn import Conv2d, SelfModulatedConv2d

OutputType = Literal["image", "wavelet"]
EncoderType = Literal["learned", "dwt", "dwt-2"]


class LiteVAE(PretrainedMixin, AutoencoderMixin, PeftAdapterMixin):
    """LiteVAE (Sadat et al., 2024): a Haar pyramid, light U-Nets and Stable Diffusion's decoder.

    Images are (N, in_channels, H, W) in [-1, 1], where H and W are multiples of
    f = 2^(len(block_out_channels) - 1), 8 by default, and at least 2 f; latents are
    (N, latent_channels, H / f, W / f). The defaults are LiteVAE-B; `from_preset` has all sizes of the paper.

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
        value_range: stored values that -1 and 1 stand for; None for pictures of 8 bits. The model does not apply it.

    Raises:
        ValueError: an argument has an unknown value, `block_out_channels` has fewer than two entries, a width
            is not divisible by its number of groups, `finest_level` does not exist, or arguments do not go
            together.
    """

    _supports_gradient_checkpointing = True
    # The encoder concatenates its U-Nets' outputs, so it stays on one device.
    _no_split_modules = ("Encoder", "ResBlock", "Attention")

    # The methods of AutoencoderKL that set the processors of the decoder's attention, and that blend tiles.
    attn_processors = AutoencoderKL.attn_processors
    set_attn_processor = AutoencoderKL.set_attn_processor
    set_default_attn_processor = AutoencoderKL.set_default_attn_processor
    fuse_qkv_projections = AutoencoderKL.fuse_qkv_projections
    unfuse_qkv_projections = AutoencoderKL.unfuse_qkv_projections
    blend_v = AutoencoderKL.blend_v
    blend_h = AutoencoderKL.blend_h

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
        value_range: Sequence[float] | None = None,
    ) -> None:
        check_arguments(locals())
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
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, allowed))}, got {shorten(value)}"
                )
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
        self.post_quant_conv: Conv2d | NoConv2d = (
            Conv2d(latent_channels, latent_channels, 1) if use_1x1_conv else NoConv2d()
        )

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
            TypeError: weights are stored in 8 bits (layerwise casting), or a self-modulated convolution has an adapter.
                Fold before enabling or adding it.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            raise RuntimeError("fold needs all weights in memory, and some are offloaded (on device 'meta')")
        folded = copy.deepcopy(self)
        for module in folded.modules():
            if isinstance(module, ResBlock):
                module.fold()
        for name, module in folded.named_modules():
            if isinstance(module, SelfModulatedConv2d):
                raise TypeError(
                    f"fold cannot reach {name}, which another library has wrapped: fold before adding adapters"
                )
        modulated = [name for name in ("encoder_norm", "decoder_norm") if self.config[name] == "smc"]
        folded.register_to_config(**dict.fromkeys(modulated, "none"))
        return folded

    @apply_forward_hook
    @without_tracer_warnings
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Returns the posterior distribution of the latent.

        Args:
            x: images (N, in_channels, H, W) in [-1, 1], in float64, float32, bfloat16 or float16, on the
                model's device, where H and W are multiples of f, at least 2 f (see the class).
            return_dict: whether to return an `AutoencoderKLOutput` with `latent_dist` instead of a tuple.

        Returns:
            A `DiagonalGaussianDistribution` over (N, latent_channels, H / f, W / f), in the dtype of the
            convolutions: the parameters', or autocast's.

        Raises:
            ValueError: the images are not 4-D, have another number of channels or size, or are on another device; tiles
                are smaller than 2 f; or with ``aggregator="vit"``, an image or a tile is not of `sample_size`.
            TypeError: the images are no dense tensor, or have another dtype.
        """
        check_image(x, self.config.in_channels, self.spatial_compression_ratio)
        check_device("image", x, self, self.encoder)
        moments = self._sliced(self._encode, x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    @without_tracer_warnings
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Returns the images that latents stand for.

        Args:
            z: latents (N, latent_channels, h, w) on the model's device, in float64, float32, bfloat16 or
                float16. They are converted to the dtype of the convolutions, as images are in `encode`.
            return_dict: whether to return a `DecoderOutput` with `sample` instead of a tuple.
            generator: unused; diffusers' pipelines pass it.

        Returns:
            Images (N, in_channels, f h, f w), roughly in [-1, 1] but not clamped.

        Raises:
            ValueError: the latents are not 4-D, have another number of channels or no pixels, or are on another device.
            TypeError: the latents are no dense tensor, or have another dtype.
        """
        check_latent(z, self.config.latent_channels)
        check_device("latent", z, self, self.decoder)
        z = z.to(compute_dtype(self.decoder.conv_in, z.device, self.decoder))
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

    def tiled_encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Returns what `encode` does with tiling enabled, for this call alone."""
        with self._tiling():
            return self.encode(x, return_dict)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Returns what `decode` does with tiling enabled, for this call alone."""
        with self._tiling():
            return self.decode(z, return_dict)

    @contextlib.contextmanager
    def _tiling(self) -> Iterator[None]:
        before, self.use_tiling = self.use_tiling, True
        try:
            yield
        finally:
            self.use_tiling = before

    def _encode(self, image: Tensor) -> Tensor:
        """Returns the moments (N, 2 latent_channels, h, w) of an image, by tiles if enabled and it is large."""
        if self.use_tiling and max(image.shape[-2:]) > self.tile_sample_min_size:
            factor, side = self.spatial_compression_ratio, self.tile_sample_min_size
            if side < 2 * factor:  # as in `check_image`
                raise ValueError(f"tile_sample_min_size must be at least {2 * factor}, got {side}")
            return self._tiled(self._encode_tile, image, side // factor, factor, 1)
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
        decoded = self.decoder(self.post_quant_conv(z))
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


# A pipeline's model_index.json records where its parts are defined: LiteVAE in litevae, and in this module in pipelines
# that litevae 0.1.0 saved.
LiteVAE.__module__ = "litevae"
if not hasattr(diffusers, LiteVAE.__name__):
    diffusers.LiteVAE = LiteVAE  # where `diffusers.AutoModel` looks for the class that a config.json names
# Diffusers downloads pipelines only if the parts are from libraries that it knows. From a folder, it also loads parts
# that are from other modules, if these are imported.
for library in ("litevae", "litevae.models"):
    LOADABLE_CLASSES.setdefault(library, {"ModelMixin": ["save_pretrained", "from_pretrained"]})
