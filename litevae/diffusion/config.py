"""The typed configuration of a diffusion model's training, read like the autoencoder's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from litevae import settings
from litevae.errors import UserError
from litevae.training.config import CONFIGS, CheckpointConfig, OptimizerConfig, check_batch_size

FOLDER = CONFIGS / "diffusion"


@dataclass
class DiffusionDataConfig:
    """What is learned: `latents`, a folder that `litevae encode` has written, or `train`, images as in
    `litevae train`, which the autoencoder encodes at each step anew."""

    latents: str = ""
    train: str = ""
    size: int | None = None  # side of the crops of `train`, in pixels; the model's sample_size
    crop: Literal["random", "random_resized", "native"] = "random"  # of `train`: see litevae train
    flip: bool = True  # mirrors half of the crops, or takes the mirrored latents where there are any
    batch_size: int = 64  # latents a step, of all processes together
    workers: int = 4  # processes that read, for each process that trains; 0: none
    max_bad_fraction: float = 0.01  # of the images of `train` may be unusable; the run stops at more


@dataclass
class UNetConfig:
    """Of diffusers' UNet2DModel, with 4 * block_out_channels[0] channels for the noise level.

    The first block works at the latent's own resolution, each other at half of the one before. The defaults
    are small: 7.4 M parameters.
    """

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128, 192])
    layers_per_block: int = 1
    attention_from: int = 1  # the first block with self-attention, counted from 0; the middle always has it
    head_channels: int = 32  # of an attention head
    num_groups: int = 32  # of the GroupNorms
    dropout: float = 0.0


@dataclass
class NoiseConfig:
    """edm: Karras et al. (2022), Table 1. ddpm: Ho et al. (2020), predicting the noise, with LDM's schedule
    (Rombach et al., 2022), whose "linear" is diffusers' scaled_linear.

    EDM's p_mean, p_std, sigma_min and sigma_max are the paper's, for data of standard deviation 0.5; noise levels
    are those times sigma_data / 0.5.
    """

    kind: Literal["edm", "ddpm"] = "edm"
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 1.0  # standard deviation of the scaled latents
    steps: int = 1000
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195


@dataclass
class DiffusionOptimizerConfig(OptimizerConfig):
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class SampleConfig:
    """samples.png. Image i is drawn with the random seed `seed` + i."""

    count: int = 16
    steps: int = 50  # of the sampler, also for FID
    batch_size: int = 16  # images at a time, also for FID


@dataclass
class FIDConfig:
    """FID of `count` samples (Heusel et al., 2017) at the end of a run.

    measure: auto, if the weights of Inception are there and `images` is known; always, which downloads them and
    refuses to begin without; never.
    """

    measure: Literal["auto", "always", "never"] = "auto"
    images: str = ""  # to compare with, all of them, as data.train may be; data.train
    count: int = 50_000


@dataclass
class DiffusionConfig:
    output_dir: str = "runs/diffusion"
    model: str = ""  # folder of the autoencoder, as litevae encode takes it
    seed: int = 0
    max_steps: int = 100_000
    log_every: int = 100  # steps between the lines of metrics.jsonl
    max_bad_steps: int = 10  # so many steps in a row with a loss or gradient that is not finite end the run
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast; weights stay in float32
    ema_decay: float = 0.9999  # at most (1 + n) / (10 + n) at the n-th step; 0 for no averaged model
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    resume: str = ""  # auto: from the newest checkpoint in output_dir, if any; or a checkpoint's folder
    data: DiffusionDataConfig = field(default_factory=DiffusionDataConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optimizer: DiffusionOptimizerConfig = field(default_factory=DiffusionOptimizerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    fid: FIDConfig = field(default_factory=FIDConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return settings.shipped(FOLDER)


def load_config(name: str, overrides: Sequence[str] = ()) -> DiffusionConfig:
    """The defaults, then the file, then the overrides: see `litevae.settings.load`.

    Raises:
        UserError: what `litevae.settings.load` raises, or a value out of range.
    """
    config = settings.load(DiffusionConfig, name, overrides, FOLDER)
    check(config)
    return config


def check(config: DiffusionConfig) -> None:
    """UserError for a value that has the right type but makes no sense."""
    if not config.unet.block_out_channels:
        raise UserError("unet.block_out_channels is empty: give the width of each block")
    least: dict[str, float] = {
        "seed": 0,
        "max_steps": 1,
        "log_every": 1,
        "max_bad_steps": 1,
        "ema_decay": 0,
        "data.batch_size": 1,
        "data.workers": 0,
        "data.max_bad_fraction": 0,
        "unet.layers_per_block": 1,
        "unet.attention_from": 0,
        "unet.head_channels": 1,
        "unet.num_groups": 1,
        "unet.dropout": 0,
        "noise.p_mean": -100,
        "noise.p_std": 1e-6,
        "noise.sigma_min": 1e-6,
        "noise.sigma_max": 1e-6,
        "noise.sigma_data": 1e-6,
        "noise.steps": 2,
        "noise.beta_start": 1e-8,
        "noise.beta_end": 1e-8,
        "optimizer.learning_rate": 0,
        "optimizer.weight_decay": 0,
        "optimizer.warmup_steps": 0,
        "optimizer.max_gradient_norm": 0,
        "optimizer.accumulation": 1,
        "sample.count": 1,
        "sample.steps": 1,
        "sample.batch_size": 1,
        "fid.count": 2,
        "checkpoint.every": 0,
        "checkpoint.keep": 1,
    }
    most: dict[str, float] = {
        "seed": 2**32 - 1,
        "max_steps": 10**9,
        "ema_decay": 0.9999999,
        "data.batch_size": 10**5,
        "data.max_bad_fraction": 0.999,
        "unet.attention_from": len(config.unet.block_out_channels),
        "unet.dropout": 0.999,
        "noise.sigma_min": config.noise.sigma_max,
        "noise.steps": 10**5,
        "noise.beta_start": config.noise.beta_end,
        "noise.beta_end": 0.999,
        "optimizer.learning_rate": 1e6,
        "sample.count": 10**4,
    }
    settings.check_range(config, least, most)
    if config.noise.kind == "ddpm" and config.sample.steps > config.noise.steps:
        raise UserError(
            f"sample.steps must be noise.steps={config.noise.steps} or less, got {config.sample.steps}"
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise UserError(f"optimizer.betas must be at least 0 and below 1, got {list(config.optimizer.betas)}")
    channels, unet = config.unet.block_out_channels, config.unet
    for name, divisor in (("num_groups", unet.num_groups), ("head_channels", unet.head_channels)):
        # without attention in its block, a width is divided into groups only
        divided = channels if name == "num_groups" else [*channels[unet.attention_from :], *channels[-1:]]
        if any(width < 1 or width % divisor for width in divided):
            raise UserError(
                f"unet.block_out_channels must be multiples of unet.{name}={divisor}, got {channels}"
            )
    check_batch_size(config.data.batch_size, config.optimizer.accumulation)
    if bool(config.data.latents) == bool(config.data.train):
        raise UserError(
            "give one of data.latents, a folder of litevae encode, and data.train, images to encode on the fly"
        )
    if config.data.latents and config.data.size is not None:
        raise UserError("data.size is of data.train: the latents of data.latents have theirs")
    if not config.model:
        raise UserError("model is empty: give the folder of the autoencoder, whose decoder makes the samples")
    if not config.output_dir:
        raise UserError("output_dir is empty: give a folder to write to")
