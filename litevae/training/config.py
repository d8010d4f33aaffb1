"""The typed configuration of a training run, read from YAML and `key=value` overrides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from litevae import settings
from litevae.data.config import DataConfig
from litevae.discriminators import DiscriminatorConfig
from litevae.errors import UserError
from litevae.losses import RECONSTRUCTION_TERMS, TERMS, LossConfig
from litevae.models.config import LITEVAE_ONLY, ModelConfig

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class StageConfig:
    """From step `start` on (the first is 1), crops of this size, and as many a step."""

    example: ClassVar[str] = "{start: 100001, size: 256}"
    start: int = 1
    size: int | None = None  # as before
    batch_size: int | None = None  # as before


@dataclass
class OptimizerConfig:
    """AdamW, without weight decay Adam. The paper's settings (Appendix F): learning rate 1e-4, betas 0.5 and 0.9."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    warmup_steps: int = 0
    max_gradient_norm: float = 1.0  # clipped to; 0 for never
    accumulation: int = 1  # parts that a step's batch is worked through in, to save memory


@dataclass
class AdversaryConfig(DiscriminatorConfig):
    """The discriminator, for loss.adversarial above 0. Its optimizer has the autoencoder's settings but for:"""

    learning_rate: float | None = None  # optimizer.learning_rate
    betas: tuple[float, float] | None = None  # optimizer.betas


@dataclass
class CheckpointConfig:
    """One every so many steps, at the end, and after each validation (`validate_every`) with the highest PSNR so
    far: at most one for a step. The last `keep` and the best are kept."""

    every: int = 1000  # steps; 0 for none at all
    keep: int = 2


@dataclass
class Config:
    output_dir: str = "runs/train"
    seed: int = 0
    max_steps: int = 100_000
    log_every: int = 100  # steps between the lines of metrics.jsonl
    validate_every: int = 1000  # steps between measurements on the validation images
    # steps between measurements of the adversarial gradient against the reconstruction's (Figure 7), which
    # cost two more backward passes each; 0 for none
    gradient_ratio_every: int = 0
    max_bad_steps: int = 10  # so many steps in a row with a loss or gradient that is not finite end the run
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast; weights stay in float32
    channels_last: bool = True
    compile: bool = False
    ema_decay: float = 0.9999  # at most (1 + n) / (10 + n) at the n-th step; 0 for no averaged model
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    resume: str = ""  # auto: from the newest checkpoint in output_dir, if any; or a checkpoint's folder
    init: str = ""  # a model, a run or a checkpoint to take the first weights from
    init_decoder: str = ""  # a diffusers AutoencoderKL to take the decoder's first weights from
    freeze_encoder: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: list[StageConfig] = field(default_factory=list)  # what changes after data.size, data.batch_size
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: AdversaryConfig = field(default_factory=AdversaryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class Stage:
    """Steps `first` to `last` of a run, counted from 1. `first_sample` is the number of crops before it."""

    first: int
    last: int
    size: int
    batch_size: int
    first_sample: int


def list_stages(config: Config) -> list[Stage]:
    """The run's stages in order; each ends where the next begins, the last with `max_steps`."""
    all_stages = [StageConfig(1, config.data.size, config.data.batch_size), *config.stages]
    result: list[Stage] = []
    size, batch_size, sample = config.data.size, config.data.batch_size, 0
    for index, stage in enumerate(all_stages):
        size, batch_size = stage.size or size, stage.batch_size or batch_size
        following = all_stages[index + 1].start if index + 1 < len(all_stages) else config.max_steps + 1
        last = min(following - 1, config.max_steps)
        if stage.start <= last:
            result.append(Stage(stage.start, last, size, batch_size, sample))
            sample += (last - stage.start + 1) * batch_size
    return result


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return settings.shipped(CONFIGS)


def load_config(name: str | None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the file, then the overrides: see `litevae.settings.load`.

    Args:
        name: of a shipped configuration, or a path that ends in .yaml; None for the defaults.
        overrides: such as "max_steps=20" or "data.size=64", in YAML's notation after the sign.

    Raises:
        UserError: no such configuration, broken YAML, an unknown key (the message names the nearest), or a
            value of the wrong type or out of range.
    """
    config = settings.load(Config, name, overrides, CONFIGS)
    check(config)
    return config


def check(config: Config) -> None:
    """UserError for a value that has the right type but makes no sense."""
    least = {
        "max_steps": 1,
        "seed": 0,
        "log_every": 1,
        "validate_every": 1,
        "gradient_ratio_every": 0,
        "data.size": 16,
        "data.batch_size": 1,
        "data.validation_count": 1,
        "data.workers": 0,
        "data.max_bad_fraction": 0,
        "model.latent_channels": 1,
        "model.layers_per_block": 1,
        "model.num_groups": 1,
        "model.finest_level": 1,
        "optimizer.learning_rate": 0,
        "optimizer.weight_decay": 0,
        "optimizer.warmup_steps": 0,
        "optimizer.max_gradient_norm": 0,
        "optimizer.accumulation": 1,
        "max_bad_steps": 1,
        "ema_decay": 0,
        "checkpoint.every": 0,
        "checkpoint.keep": 1,
        **{f"loss.{name}": 0 for name in TERMS},
        "loss.adversarial_start": 0,
    }
    most = {
        "model.latent_channels": 4096,
        "seed": 2**32 - 1,
        "max_steps": 10**9,
        "data.batch_size": 10**5,
        "optimizer.learning_rate": 1e6,
    }
    settings.check_range(config, least, most)
    if config.ema_decay >= 1:
        raise UserError(f"ema_decay must be below 1, got {config.ema_decay}")
    if config.gradient_ratio_every and not config.loss.adversarial:
        raise UserError(
            "gradient_ratio_every measures the adversarial loss's gradient: loss.adversarial must be above 0"
        )
    every, first = config.gradient_ratio_every, max(1, config.loss.adversarial_start)
    if every and -(-first // every) * every > config.max_steps:
        raise UserError(
            f"gradient_ratio_every={every} never comes between loss.adversarial_start={first} and "
            f"max_steps={config.max_steps}"
        )
    if config.loss.ldl and not config.ema_decay:
        raise UserError("loss.ldl compares with the averaged model: ema_decay must be above 0")
    rate = config.discriminator.learning_rate
    if rate is not None and not 0 <= rate <= 1e6:
        raise UserError(f"discriminator.learning_rate must be between 0 and 1e6, got {rate}")
    check_stages(config)
    if config.model.kind == "litevae":
        if config.model.encoder_block_out_channels:
            raise UserError("model.encoder_block_out_channels is for model.kind=sd-vae and vae-small")
    else:
        for name, allowed in LITEVAE_ONLY.items():
            if getattr(config.model, name) != allowed:
                raise UserError(
                    f"model.{name} must be {str(allowed).lower()} for model.kind={config.model.kind}"
                )
    if config.model.encoder_type != "learned" and config.loss.kl:
        raise UserError(
            f"loss.kl must be 0 for model.encoder_type={config.model.encoder_type}, whose latent is a point and no "
            f"distribution, got {config.loss.kl}"
        )
    if config.data.max_bad_fraction >= 1:
        raise UserError(f"data.max_bad_fraction must be below 1, got {config.data.max_bad_fraction}")
    if min(config.model.block_out_channels, default=0) < 1:
        raise UserError(
            f"model.block_out_channels must all be 1 or more, got {config.model.block_out_channels}"
        )
    if not any(getattr(config.loss, name) for name in RECONSTRUCTION_TERMS):
        raise UserError(
            f"every reconstruction loss ({', '.join(RECONSTRUCTION_TERMS)}) has weight 0: "
            "there is nothing to train for"
        )
    for name, betas in (("optimizer", config.optimizer.betas), ("discriminator", config.discriminator.betas)):
        if betas is not None and not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"{name}.betas must be at least 0 and below 1, got {list(betas)}")
    if not config.output_dir:
        raise UserError("output_dir is empty: give a folder to write to")


def check_stages(config: Config) -> None:
    """UserError for stages that are not in order, and for sizes and batches that make no sense."""
    before = 1
    for index, stage in enumerate(config.stages):
        if stage.start <= before:
            raise UserError(f"stages[{index}].start must be above {before}, got {stage.start}")
        if stage.size is not None and stage.size < 16:
            raise UserError(f"stages[{index}].size must be 16 or more, got {stage.size}")
        if stage.batch_size is not None and not 1 <= stage.batch_size <= 10**5:
            raise UserError(f"stages[{index}].batch_size must be 1 to 100000, got {stage.batch_size}")
        if config.model.aggregator == "vit" and stage.size not in (None, config.data.size):
            raise UserError(
                f"stages[{index}].size must be data.size, {config.data.size}, the only one that model.aggregator=vit "
                f"is made for, got {stage.size}"
            )
        before = stage.start
    for listed in list_stages(config):
        check_batch_size(listed.batch_size, config.optimizer.accumulation)


def check_batch_size(
    batch_size: int, accumulation: int, processes: int = 1, name: str = "data.batch_size"
) -> None:
    """Checks that a batch can be shared evenly.

    Args:
        batch_size: samples per step, over all processes.
        accumulation: parts that each process works through its share in.
        processes: number of processes.
        name: name of the setting, for the message.

    Raises:
        UserError: it cannot.
    """
    if batch_size % accumulation:
        raise UserError(f"optimizer.accumulation must divide the batch of {batch_size}, got {accumulation}")
    if batch_size % (accumulation * processes):
        raise UserError(
            f"{name} counts the samples of all processes: {batch_size} cannot be shared by {processes} processes "
            f"with optimizer.accumulation={accumulation}"
        )
