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
from litevae_kernels import haar_idwt2d

OutputType = Literal["image", "wavelet"]
EncoderType = Literal["learned", "dwt", "dwt-2"]


class LiteVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """LiteVAE (Sadat et al., 2024): a Haar pyramid, light U-Nets, and Stable Diffusion's decoder.

    Images are (N, in_channels, H, W) in [-1, 1], with H and W multiples of
    f = 2^(len(block_out_channels) - 1), 8 by default; latents are (N, latent_channels, H / f, W / f). The
    defaults are LiteVAE-B; `from_preset` has all sizes of the paper.

    Args:
        in_channels: channels of the image.
        latent_channels: channels of the latent, n_z in the paper.
        extractor_channels, extractor_multipliers: width of the feature-extraction U-Nets, and each of their
            levels' multiple of it (Table 23).
        aggregator_channels, aggregator_multipliers: the same for the feature-aggregation U-Net (Table 24).
        encoder_num_groups: groups of the encoder's GroupNorms.
        block_out_channels: widths of the decoder's blocks, from the image's side to the latent's. There is
            one more of them than there are wavelet levels.
        layers_per_block: one less than the ResBlocks in each of the decoder's blocks, as in diffusers.
        num_groups: groups of the decoder's GroupNorms.
        decoder_norm: "group", Stable Diffusion's decoder; "smc", self-modulated convolutions (Section 4.2);
            "none", plain convolutions, what `fold` makes of "smc".
        output_type: "image"; "wavelet": the decoder ends at half resolution with the image's sub-bands,
            scaled like the encoder's first level, and the inverse transform makes the image (Appendix G).
        use_1x1_conv: a 1x1 convolution after the encoder and one before the decoder (Section D.2).
        encoder_type: "learned"; or without parameters (Appendix B), for a deterministic posterior: "dwt", the
            coarsest sub-bands alone, for latent_channels = 4 in_channels, "dwt-2", those of the level before it
            and space-to-depth, for 16 in_channels.
        extractor: of the features of each level, "unet" or "nafnet" (Section D.3, `NAFNet`).
        shared_extractor: one extractor for all levels (Section D.4).
        aggregator: of the levels' features, "unet" or "vit" (Section D.5, `ViT`), which takes images of
            sample_size x sample_size alone.
        finest_level: the first level whose features are used (Section D.6): with 2, not the largest sub-bands.
        encoder_norm: of the encoder's U-Nets, as `decoder_norm`.
        sample_size: side of the images it is trained on; the default size of tiles.
        scaling_factor, shift_factor: what diffusion pipelines normalise latents with,
            (latent - shift_factor) * scaling_factor. Not applied here.
        latents_mean, latents_std: of each latent channel, as in diffusers. Not applied here.
        force_upcast: read by the SDXL pipelines: run the model in float32 where the rest is float16.

    Raises:
        ValueError: an unknown value of an argument that has names for values, fewer than two
            `block_out_channels`, a width that its number of groups does not divide, a `finest_level` that does not
            exist, or arguments that do not go together.
    """

    _supports_gradient_checkpointing = True
    # the encoder concatenates its U-Nets' outputs, so it stays on one device
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
            side = 1 if encoder_type == "dwt" else 2  # of the squares that become channels
            if side == 2 and levels < 2:
                raise ValueError(
                    "block_out_channels must have at least three entries for encoder_type='dwt-2'"
                )
            for name, given, only in (
                ("latent_channels", latent_channels, 4 * in_channels * side**2),
                ("use_1x1_conv", use_1x1_conv, False),  # would mix the mean with the log-variance
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
            self.encoder = WaveletEncoder(levels + 1 - side, side)
        self.decoder = Decoder(
            latent_channels,
            4 * in_channels if wavelet else in_channels,
            block_out_channels,
            layers_per_block,
            num_groups,
            decoder_norm,
            num_upsamplers=levels - 1 if wavelet else levels,
        )
        self.quant_conv = nn.Conv2d(moments, moments, 1) if use_1x1_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_1x1_conv else None

        self.spatial_compression_ratio = 2**levels
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_latent_min_size = max(sample_size // self.spatial_compression_ratio, 1)
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_preset(cls, name: str, latent_channels: int = 4, **overrides: Any) -> Self:
        """A freshly initialised model of the paper's size `name`: litevae-s, -b, -m or -l (Tables 23 and 24).

        `overrides` are any other constructor arguments. Raises ValueError, naming the nearest, for an
        unknown preset.
        """
        return cls(**{**get_preset(name), "latent_channels": latent_channels, **overrides})

    def fold(self) -> Self:
        """A copy for inference and export, whose self-modulated convolutions are plain ones of equal outputs.

        Their scales and gains are part of the model and not of the image, so the weights need no normalising
        at each call: they are computed here once, in float32, and stored in their dtype. The copy's
        configuration has "none" for a norm of "smc": it is saved, loaded, compiled and exported like any other.
        It shares no memory with this model, which stays as it is, and is not for training, which needs the
        normalisation. A model without self-modulated convolutions, a folded one too, gives a plain copy.

        Raises:
            RuntimeError: weights are offloaded; fold before `enable_model_cpu_offload` and the like.
            TypeError: weights are stored in 8 bits (layerwise casting); fold before enabling that.
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
        """The distribution of the latent, given the image.

        Args:
            x: images (N, in_channels, H, W) in [-1, 1], of any floating dtype, on the model's device; H and W
                multiples of 8 (of f, see the class).
            return_dict: return an `AutoencoderKLOutput` with `latent_dist`, rather than a tuple.

        Returns:
            A `DiagonalGaussianDistribution` over (N, latent_channels, H / f, W / f), in the dtype that the
            convolutions run in: the parameters', or autocast's.

        Raises:
            ValueError: not 4-D, wrong number of channels, a size that is no multiple of f, or with
                ``aggregator="vit"`` an image or a tile of another size than `sample_size`, or another device.
            TypeError: images that are not floating point.
        """
        self._check_image(x)
        moments = self._sliced(self._encode, x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """The image of a latent.

        Args:
            z: latents (N, latent_channels, h, w), in the parameters' dtype (in any floating dtype under
                autocast), on the model's device.
            return_dict: return a `DecoderOutput` with `sample`, rather than a tuple.
            generator: unused; diffusers' pipelines pass it.

        Returns:
            Images (N, in_channels, f h, f w), about in [-1, 1], not clamped.

        Raises:
            ValueError: not 4-D, wrong number of channels, or another device.
            TypeError: another dtype.
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
        """The reconstruction of images (N, in_channels, H, W) in [-1, 1], of the same shape.

        Decodes the posterior's mode, or where `sample_posterior` is set a draw from it with `generator`.
        Raises what `encode` raises.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _encode(self, image: Tensor) -> Tensor:
        """Image to moments (N, 2 latent_channels, h, w), by tiles where they are enabled and it is large."""
        if self.use_tiling and max(image.shape[-2:]) > self.tile_sample_min_size:
            tile = max(self.tile_sample_min_size // self.spatial_compression_ratio, 1)
            return self._tiled(self._encode_tile, image, tile, self.spatial_compression_ratio, 1)
        return self._encode_tile(image)

    def _encode_tile(self, image: Tensor) -> Tensor:
        moments = self.encoder(image)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: Tensor) -> Tensor:
        """Latent to image, by tiles where they are enabled and it is large."""
        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            return self._tiled(
                self._decode_tile, z, self.tile_latent_min_size, 1, self.spatial_compression_ratio
            )
        return self._decode_tile(z)

    def _decode_tile(self, z: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        decoded = self.decoder(z)
        # the wavelet decoder's sub-bands are scaled by 1/2, as haar_pyramid's first level is
        return haar_idwt2d(2 * decoded) if self.config.output_type == "wavelet" else decoded

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function(x)`, one sample at a time where slicing is enabled."""
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([function(sample) for sample in x.split(1)])
        return function(x)

    def _tiled(
        self, function: Callable[[Tensor], Tensor], x: Tensor, tile: int, in_step: int, out_step: int
    ) -> Tensor:
        """`function` on overlapping tiles of `x`, blended.

        A tile is `tile` latent pixels wide; a latent pixel is `in_step` pixels of x and `out_step` of the
        result.
        """
        overlap = int(tile * self.tile_overlap_factor)
        tops, lefts = (tile_starts(size // in_step, tile, overlap) for size in x.shape[-2:])
        rows = []
        for top in tops:
            band = x[:, :, top * in_step : (top + tile) * in_step]
            row = [function(band[..., left * in_step : (left + tile) * in_step]) for left in lefts]
            rows.append(blend(row, [left * out_step for left in lefts], dim=3))
        return blend(rows, [top * out_step for top in tops], dim=2)

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
        # autocast casts any floating dtype by itself
        if z.dtype != dtype and not (autocast_enabled(z.device) and z.is_floating_point()):
            raise TypeError(f"latent must have the model's dtype {dtype}, got {z.dtype}")


def check_channels(what: str, x: Tensor, channels: int) -> None:
    """ValueError unless `x` is (N, channels, H, W)."""
    if x.ndim != 4:
        raise ValueError(f"{what} must be 4-D, (N, {channels}, H, W), got shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"{what} must have {channels} channels, got {x.shape[1]} in {tuple(x.shape)}")


def check_device(what: str, x: Tensor, model: nn.Module, device: torch.device) -> None:
    """ValueError unless `x` is on `device`, where a weight of `model` is, or where that will be to run."""
    if device == x.device or device.type == "meta":  # meta: accelerate's offloading brings the weights later
        return
    device = get_parameter_device(model)  # sees through diffusers' group offloading
    if device != x.device:
        raise ValueError(f"{what} must be on the model's device {device}, got {x.device}")


def nearest_multiples(size: int, factor: int) -> str:
    """The positive multiples of `factor` around `size`, in words."""
    below, above = size // factor * factor, math.ceil(size / factor) * factor
    return " and ".join(str(multiple) for multiple in sorted({below or factor, above or factor}))


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where to put the fewest tiles of one size that cover `size` and overlap by at least `overlap`.

    They are spread evenly, so that no tile is a sliver with little context.
    """
    if size <= tile:
        return [0]
    gaps = math.ceil((size - tile) / max(tile - overlap, 1))
    return [(size - tile) * i // gaps for i in range(gaps + 1)]


def blend(tiles: list[Tensor], starts: list[int], dim: int) -> Tensor:
    """Joins tiles that begin at `starts` along `dim`, crossfading where they overlap."""
    merged = tiles[0]
    for tile, start in zip(tiles[1:], starts[1:], strict=True):
        overlap = merged.shape[dim] - start
        ramp = torch.linspace(0, 1, overlap + 2, device=tile.device, dtype=tile.dtype)[1:-1]
        # a tile is at its worst in its last few pixels; flat ends hide them better than a straight line
        ramp = ramp * ramp * (3 - 2 * ramp)
        ramp = ramp.view([-1 if d == dim else 1 for d in range(tile.ndim)])
        fade = torch.lerp(merged.narrow(dim, start, overlap), tile.narrow(dim, 0, overlap), ramp)
        rest = tile.narrow(dim, overlap, tile.shape[dim] - overlap)
        merged = torch.cat([merged.narrow(dim, 0, start), fade, rest], dim=dim)
    return merged
