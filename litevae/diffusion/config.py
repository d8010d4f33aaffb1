"""The typed configuration of a diffusion model's training, read like the autoencoder's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from litevae import settings
from litevae.data.config import MOST_WORKERS
from litevae.errors import UserError
from litevae.settings import section, setting
from litevae.training.config import CONFIGS, RunConfig, check_batch_size
from litevae.training.sections import CheckpointConfig, OptimizerConfig

FOLDER = CONFIGS / "diffusion"


@dataclass
class DiffusionDataConfig:
    """Training data: either `latents`, a folder that `litevae encode` has written, or `train`, images as in
    `litevae train`, which the autoencoder encodes anew at each step."""

    latents: str = setting("", "Folder that litevae encode has written.")
    train: str = setting(
        "", "Images to encode during training, instead of data.latents, as in litevae train."
    )
    size: int | None = setting(
        None,
        "Side of the crops of data.train, in pixels; null for the autoencoder's sample_size.",
        minimum=16,
    )
    crop: Literal["random", "random_resized", "native"] = setting(
        "random", "How crops of data.train are taken, as in litevae train."
    )
    flip: bool = setting(
        True, "Mirror half of the crops, or use the mirrored latents if data.latents has them."
    )
    batch_size: int = setting(64, "Latents per step, over all processes together.", minimum=1, maximum=10**5)
    workers: int = setting(
        4,
        "Processes that read data, per training process; 0 reads in the training process.",
        minimum=0,
        maximum=MOST_WORKERS,
    )
    max_bad_fraction: float = setting(
        0.01,
        "Fraction of the images of data.train that may be unusable; the run stops at more.",
        minimum=0,
        below=1,
    )


@dataclass
class UNetConfig:
    """Configuration of diffusers' UNet2DModel, with 4 * block_out_channels[0] channels for the noise level.

    The first block works at the latent's own resolution, and each other block at half the resolution of the one
    before. The defaults are small: 7.4 M parameters.
    """

    block_out_channels: list[int] = setting([64, 128, 192], "Width of each block.", minimum=1, maximum=2**16)
    layers_per_block: int = setting(1, "ResBlocks per block.", minimum=1, maximum=64)
    attention_from: int = setting(
        1, "First block with self-attention, counted from 0; the middle block always has it.", minimum=0
    )
    head_channels: int = setting(32, "Channels of each attention head.", minimum=1)
    num_groups: int = setting(32, "Groups of the GroupNorms.", minimum=1)
    dropout: float = setting(0.0, "Dropout probability.", minimum=0, maximum=0.999)


@dataclass
class NoiseConfig:
    """Noise levels and prediction target of the diffusion model.

    edm: Karras et al. (2022), Table 1. ddpm: Ho et al. (2020), predicting the noise, with LDM's schedule (Rombach
    et al., 2022), whose "linear" is diffusers' scaled_linear.

    EDM's p_mean, p_std, sigma_min and sigma_max are the paper's values, for data of standard deviation 0.5. The
    noise levels are these values times sigma_data / 0.5.
    """

    kind: Literal["edm", "ddpm"] = setting(
        "edm", "Formulation: EDM (Karras et al., 2022) or DDPM with LDM's noise."
    )
    p_mean: float = setting(-1.2, "edm: mean of the logarithm of the noise level in training.", minimum=-100)
    p_std: float = setting(
        1.2, "edm: standard deviation of the logarithm of the noise level in training.", minimum=1e-6
    )
    sigma_min: float = setting(
        0.002, "edm: smallest noise level of the sampler; not above noise.sigma_max.", minimum=1e-6
    )
    sigma_max: float = setting(80.0, "edm: largest noise level of the sampler.", minimum=1e-6)
    sigma_data: float = setting(1.0, "edm: standard deviation of the scaled latents.", minimum=1e-6)
    steps: int = setting(1000, "ddpm: number of noise levels.", minimum=2, maximum=10**5)
    beta_schedule: Literal["scaled_linear", "linear"] = setting(
        "scaled_linear", "ddpm: course of beta, in the names of diffusers; LDM's is scaled_linear."
    )
    beta_start: float = setting(0.0015, "ddpm: first beta; not above noise.beta_end.", minimum=1e-8)
    beta_end: float = setting(0.0195, "ddpm: last beta.", minimum=1e-8, maximum=0.999)
    sampler: Literal["ddpm", "ddim"] = setting(
        "ddpm",
        "ddpm: sampler that adds fresh noise in each step (DDIM's eta = 1), as LDM for FFHQ; ddim adds none (eta = 0), "
        "as LDM for CelebA-HQ.",
    )


@dataclass
class DiffusionOptimizerConfig(OptimizerConfig):
    """AdamW with betas that are usual for diffusion models."""

    betas: tuple[float, float] = setting(
        (0.9, 0.999), "Decay rates of Adam's two moment estimates.", minimum=0, below=1
    )


@dataclass
class SampleConfig:
    """Samples in samples.png. Image i is drawn with the random seed `seed` + i."""

    count: int = setting(16, "Number of images in samples.png.", minimum=1, maximum=10**4)
    steps: int = setting(50, "Steps of the sampler, also for FID; with ddpm, noise.steps at most.", minimum=1)
    batch_size: int = setting(16, "Images that are drawn at a time, also for FID.", minimum=1)


@dataclass
class FIDConfig:
    """FID of `count` samples (Heusel et al., 2017) at the end of a run.

    With `measure=auto`, FID is measured if Inception's weights are present and `images` is known; with `always`,
    the weights are downloaded, and the run does not begin without them; with `never`, FID is not measured.
    """

    measure: Literal["auto", "always", "never"] = setting(
        "auto",
        "When to measure FID; auto: if Inception's weights are present; always: download them if they are not.",
    )
    images: str = setting(
        "", "Images to compare with, all of them, given like data.train; empty for data.train."
    )
    count: int = setting(50_000, "Number of samples to compare.", minimum=2)


@dataclass
class DiffusionConfig(RunConfig):
    """Configuration of a diffusion model's training run."""

    output_dir: str = setting("runs/diffusion", "Folder that the run writes to.")
    model: str = setting("", "Folder of the autoencoder, as litevae encode takes it.")
    normalise: Literal["all", "channel"] = setting(
        "all",
        "all: every channel of the latents by the model's scaling_factor, as LDM; channel: each by its own mean and "
        "standard deviation, which litevae scale has stored beside it.",
    )
    data: DiffusionDataConfig = section(DiffusionDataConfig, "Latents or images to train on.")
    unet: UNetConfig = section(UNetConfig, "The network, diffusers' UNet2DModel.")
    noise: NoiseConfig = section(NoiseConfig, "Noise levels and prediction target of the diffusion model.")
    optimizer: DiffusionOptimizerConfig = section(
        DiffusionOptimizerConfig, "AdamW, which is Adam without weight decay."
    )
    sample: SampleConfig = section(SampleConfig, "Samples in samples.png.")
    fid: FIDConfig = section(FIDConfig, "FID of samples at the end of a run.")
    checkpoint: CheckpointConfig = section(
        CheckpointConfig, "When checkpoints are written, and how many are kept."
    )


def shipped_diffusion_configs() -> list[str]:
    """Returns the names of the configurations of a diffusion model's training that come with the package."""
    return settings.shipped(FOLDER)


def load_diffusion_config(name: str, overrides: Sequence[str] = ()) -> DiffusionConfig:
    """Returns the defaults, replaced by the file's settings and then by the overrides: see `litevae.settings.load`.

    Raises:
        UserError: `litevae.settings.load` raised it, or settings do not fit together.
    """
    config = settings.load(DiffusionConfig, name, overrides, FOLDER)
    check_diffusion_config(config)
    return config


def check_diffusion_config(config: DiffusionConfig) -> None:
    """Checks that settings whose values are in range fit together; a UserError names those that do not."""
    if not config.output_dir:
        raise UserError("output_dir is empty: give a folder to write to")
    check_unet(config.unet)
    check_noise(config.noise, config.sample)
    check_batch_size(config.data.batch_size, config.optimizer.accumulation)
    if bool(config.data.latents) == bool(config.data.train):
        raise UserError(
            "give one of data.latents, a folder of litevae encode, and data.train, images to encode on the fly"
        )
    if config.data.latents and config.data.size is not None:
        raise UserError("data.size is only for data.train: the latents of data.latents have a fixed size")
    if not config.model:
        raise UserError("model is empty: give the folder of the autoencoder, which decodes the samples")


def check_unet(unet: UNetConfig) -> None:
    """Checks that the widths of the U-Net can be divided as its other settings ask; raises a UserError if not."""
    channels = unet.block_out_channels
    if not channels:
        raise UserError("unet.block_out_channels is empty: give the width of each block")
    if unet.attention_from > len(channels):
        raise UserError(f"unet.attention_from must be {len(channels)} or less, got {unet.attention_from}")
    # Attention heads divide only the widths of blocks with attention, which includes the middle block.
    with_attention = [*channels[unet.attention_from :], channels[-1]]
    for name, divisor, widths in (
        ("num_groups", unet.num_groups, channels),
        ("head_channels", unet.head_channels, with_attention),
    ):
        if any(width % divisor for width in widths):
            raise UserError(
                f"unet.block_out_channels must be multiples of unet.{name}={divisor}, got {channels}"
            )


def check_noise(noise: NoiseConfig, sample: SampleConfig) -> None:
    """Checks the order of the noise levels and the sampler's number of steps; raises a UserError if they are wrong."""
    for name, value, maximum in (
        ("sigma_min", noise.sigma_min, noise.sigma_max),
        ("beta_start", noise.beta_start, noise.beta_end),
    ):
        if value > maximum:
            raise UserError(f"noise.{name} must be {maximum} or less, got {value}")
    if noise.kind == "ddpm" and sample.steps > noise.steps:
        raise UserError(f"sample.steps must be noise.steps={noise.steps} or less, got {sample.steps}")
